"""fairseq's data-bins, read as they are; its flags, translated; and docs/fairseq.md.

fairseq itself is not needed: `write_data_bin` writes the bytes that its `mmap` format is made of,
and shares no code with the package.
"""

from __future__ import annotations

import hashlib
import pickle
import random
import re
import shlex
import shutil
import struct
import subprocess
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
import typer.main
from conftest import SIZES, one_line_error, run_cli
from runs import NETWORK

from fastdiss_cli.__main__ import command_line
from fastdiss_cli.checkpoints.checkpoint import Checkpoint
from fastdiss_cli.commands.fairseq_flags import OLD_FLAGS, NoEquivalent, rewrite_flags
from fastdiss_cli.data.dictionary import Dictionary
from fastdiss_cli.data.opening import open_dataset
from fastdiss_cli.data.sentencepiece import SentencePiece, train_tokenizer
from fastdiss_cli.data.tokenizer_file import make_tokenizer
from fastdiss_cli.errors import FastdissError

CODES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2", 9: "<u4", 10: "<u8"}
LANGUAGES = ("de", "en")
DOCUMENT = Path(__file__).parent.parent / "docs" / "fairseq.md"
TINY = ["--device=cpu", "--max-update=3", "--max-tokens=500", "--set=train.valid_sentences=4"]
TINY += [f"--set=model.{key}={value}" for key, value in NETWORK.items()]


def segment(line: str) -> str:
    """Cut words as subword-nmt would write it."""
    return " ".join(f"{word[:3]}@@ {word[3:]}" if len(word) > 4 else word for word in line.split())


def write_dictionary(path: Path, lines: Iterable[str]) -> dict[str, int]:
    """Write ``dict.<language>.txt`` by frequency, padded to a multiple of 8; return the ids."""
    counts = Counter(word for line in lines for word in line.split())
    rows = [(word, count) for word, count in counts.most_common()]
    made_up = -(len(rows) + 4) % 8
    rows += [(f"madeupword{i:04d}", 0) for i in range(made_up)]
    path.write_text("".join(f"{word} {count}\n" for word, count in rows), encoding="utf-8")
    return {word: i for i, (word, _) in enumerate(rows, start=4)}


def write_tokens(stem: Path, sentences: list[list[int]], code: int = 8) -> None:
    """Write ``stem.bin`` and ``stem.idx``."""
    dtype = np.dtype(CODES[code])
    sizes = [len(sentence) for sentence in sentences]
    starts = [sum(sizes[:i]) * dtype.itemsize for i in range(len(sizes))]
    tokens = np.array([i for sentence in sentences for i in sentence])
    Path(f"{stem}.bin").write_bytes(tokens.astype(dtype).tobytes())
    count = len(sizes)
    Path(f"{stem}.idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQ", 1, code, count)
        + struct.pack(f"<{count}i", *sizes)
        + struct.pack(f"<{count}q", *starts)
    )


def write_data_bin(
    folder: Path, text: dict[str, dict[str, list[str]]], joined: bool = True, code: int = 8
) -> Path:
    """Write text, {split: {language: lines}}, as ``fairseq-preprocess -s de -t en`` does."""
    folder.mkdir(parents=True)
    for language in LANGUAGES:
        seen = LANGUAGES if joined else (language,)
        lines = [line for side in seen for line in text["train"][side]]
        ids = write_dictionary(folder / f"dict.{language}.txt", lines)
        for split, sides in text.items():
            rows = [[ids.get(w, 3) for w in line.split()] + [2] for line in sides[language]]
            write_tokens(folder / f"{split}.de-en.{language}", rows, code)
    (folder / "preprocess.log").write_text("Namespace(no_progress_bar=False, ...)\n")
    return folder


@pytest.fixture(scope="module")
def raw(corpus: Path) -> dict[str, dict[str, list[str]]]:
    """Return the corpus as lines, {split: {language: lines}}."""
    return {
        split: {
            language: (corpus / f"{split}.{language}").read_text(encoding="utf-8").splitlines()
            for language in LANGUAGES
        }
        for split in SIZES
    }


@pytest.fixture(scope="module")
def text(raw: dict[str, dict[str, list[str]]]) -> dict[str, dict[str, list[str]]]:
    """Return the corpus segmented, {split: {language: lines}}."""
    return {
        split: {language: list(map(segment, lines)) for language, lines in sides.items()}
        for split, sides in raw.items()
    }


@pytest.fixture(scope="module")
def joined(text, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data_bin(tmp_path_factory.mktemp("joined") / "bin", text)


@pytest.fixture(scope="module")
def separate(text, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data_bin(tmp_path_factory.mktemp("separate") / "bin", text, joined=False)


def trained(data_bin: Path, save_dir: Path, *more: str | Path) -> Path:
    done = run_cli("train", data_bin, "--save-dir", save_dir, "--arch=fastdiss_tiny", *TINY, *more)
    assert done.returncode == 0, done.stderr
    return save_dir / "checkpoint_last.safetensors"


@pytest.fixture(scope="module")
def checkpoint(separate: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(separate, tmp_path_factory.mktemp("checkpoint"))


def lines_of(output: str, kind: str) -> list[list[str]]:
    return [line.split("\t") for line in output.splitlines() if line.startswith(f"{kind}-")]


# the bytes


def test_these_are_the_bytes_of_fairseq(tmp_path: Path) -> None:
    (tmp_path / "dict.de.txt").write_bytes(b"der 7\nHund 3\n")
    (tmp_path / "dict.en.txt").write_bytes(b"the 6\ndog 3\n")
    index = bytes.fromhex(
        "4d4d494449445800 00 0100000000000000 08 0200000000000000"
        "03000000 01000000  0000000000000000 0600000000000000"
    )
    for language in LANGUAGES:
        (tmp_path / f"train.de-en.{language}.bin").write_bytes(bytes.fromhex("04000500020002 00"))
        (tmp_path / f"train.de-en.{language}.idx").write_bytes(index)
    dataset = open_dataset(tmp_path, verify=True)
    assert [ids.tolist() for ids in dataset["train"]["src"]] == [[4, 5, 2], [2]]
    assert dataset.src_tokenizer.decode([4, 5, 2]) == "der Hund"
    assert dataset.tgt_tokenizer.decode([4, 5, 2]) == "the dog"
    write_tokens(tmp_path / "own", [[4, 5, 2], [2]])
    assert (tmp_path / "own.idx").read_bytes() == index


@pytest.mark.parametrize("code", CODES)
def test_every_whole_number_type(tmp_path: Path, text, code: int) -> None:
    folder = write_data_bin(tmp_path / "bin", text, code=code)
    dataset = open_dataset(folder, verify=True)
    rows = [dataset.tgt_tokenizer.pieces(ids.tolist()) for ids in dataset["test"]["tgt"]]
    assert [" ".join(pieces) for pieces in rows] == [f"{t} </s>" for t in text["test"]["en"]]


@pytest.mark.parametrize("is_joined", [True, False])
def test_splits_sides_and_dictionaries(tmp_path: Path, text, raw, is_joined: bool) -> None:
    more = {**text, "test1": {side: lines[:5] for side, lines in text["test"].items()}}
    dataset = open_dataset(write_data_bin(tmp_path / "bin", more, is_joined), verify=True)
    assert dataset.splits.keys() == {"train", "valid", "test", "test1"}
    assert (dataset.src_tokenizer.hash == dataset.tgt_tokenizer.hash) == is_joined
    for split, sides in raw.items():
        for side, language in (("src", "de"), ("tgt", "en")):
            tokenizer = getattr(dataset, f"{side}_tokenizer")
            assert [tokenizer.decode(i) for i in dataset[split][side]] == sides[language]
            assert [tokenizer.encode(line) for line in text[split][language]] == [
                ids.tolist() for ids in dataset[split][side]
            ]
    assert len(dataset["test1"]["src"]) == 5


# dictionaries


def test_dictionary_numbers_words_as_fairseq_does() -> None:
    tokenizer = Dictionary(b"the 100\nHa@@ 5\nus 4\n, 3\nmadeupword0000 0\n")
    assert (tokenizer.bos, tokenizer.pad, tokenizer.eos, tokenizer.unk) == (0, 1, 2, 3)
    assert tokenizer.vocab_size == 9
    assert tokenizer.encode("  the\tHa@@ us <s> Maus") == [4, 5, 6, 3, 3, 2]
    assert tokenizer.encode("") == [2]
    assert tokenizer.pieces([0, 5, 6, 3, 8, 2]) == [
        "<s>", "Ha@@", "us", "<unk>", "madeupword0000", "</s>",
    ]  # fmt: skip
    assert tokenizer.decode([0, 4, 5, 6, 7, 3, 2, 1]) == "the Haus , <unk>"
    assert tokenizer.decode([4, 5, 2]) == "the Ha"  # a word that was never finished
    texts = ["the Ha@@ us", "the Maus"]
    assert tokenizer.altered(texts, tokenizer.encode_all(texts)) == {1}


def test_what_the_dictionary_shows_is_undone() -> None:
    pieces = Dictionary("▁the 9\n▁ha 2\nus 2\n@@ 1\n".encode())
    assert pieces.decode(pieces.encode("▁the ▁ha us @@")) == "the haus@@"
    words = Dictionary("the 9\n@@ 4\na▁b 1\n".encode())
    assert words.decode(words.encode("the @@ a▁b")) == "the @@ a▁b"


def test_a_flagged_word_takes_the_place_of_the_earlier() -> None:
    tokenizer = Dictionary(b"a 9\r\n<unk> 1 #fairseq:overwrite\r\na 2 #fairseq:overwrite\r\n")
    assert tokenizer.encode("a <unk> b") == [6, 5, 3, 2]
    assert tokenizer.pieces([4, 6]) == ["a", "a"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (b"", "the dictionary is empty"),
        (b"a 1\na 1\n", "line 2 repeats the word 'a'"),
        (b"a 1\n</s> 1\n", "line 2 repeats the word '</s>'"),
        (b"a 1\n\nb 1\n", "line 2 is not a word and its count"),
        (b"a 1\nb\n", "line 2 is not a word and its count"),
        (b"a 1\nb x\n", "line 2 is not a word and its count"),
        (b"a 1\n\xff 1\n", "not valid UTF-8"),
    ],
)
def test_other_lines_are_refused(model: bytes, message: str) -> None:
    with pytest.raises(FastdissError, match=re.escape(message)):
        Dictionary(model, "dict.de.txt")


def test_bytes_identify_their_tokenizer() -> None:
    model = train_tokenizer(["eins zwei 3\n"], "char", 270).model
    assert isinstance(make_tokenizer(model), SentencePiece)
    for text in ("the 100\nof 2\n", "the 100", "# 3 #fairseq:overwrite\n", "1 2\r\n"):
        assert isinstance(make_tokenizer(text.encode()), Dictionary)


# through the commands


def test_it_trains_generates_and_scores_as_it_is(
    separate: Path, checkpoint: Path, raw, tmp_path: Path
) -> None:
    before = {path.name: path.read_bytes() for path in separate.iterdir()}
    done = run_cli(
        "generate", separate, "--path", checkpoint, "--steps=2", "--results-path", tmp_path
    )
    assert done.returncode == 0 and "de to en" in done.stderr
    written = (tmp_path / "generate-test.txt").read_text(encoding="utf-8")
    assert [line[1] for line in lines_of(written, "S")] == raw["test"]["de"]
    assert [line[1] for line in lines_of(written, "T")] == raw["test"]["en"]
    for h, d in zip(lines_of(written, "H"), lines_of(written, "D"), strict=True):
        assert f"{h[2]} ".replace("@@ ", "").rstrip() == d[2]
    assert any("@@" in h[2] for h in lines_of(written, "H"))
    scored = run_cli("score", "--sys", tmp_path / "generate-test.txt", "--metrics", "bleu")
    assert scored.stdout.strip() in done.stdout
    assert {path.name: path.read_bytes() for path in separate.iterdir()} == before


def test_the_checkpoint_is_complete(separate: Path, checkpoint: Path, text) -> None:
    saved = Checkpoint.load(checkpoint)
    for side, language in (("src", "de"), ("tgt", "en")):
        content = (separate / f"dict.{language}.txt").read_bytes()
        assert saved.tensors[f"tokenizer.{side}"].numpy().tobytes() == content
        assert saved.tokenizer(side).hash == hashlib.sha256(content).hexdigest()
    lines = "\n".join(text["test"]["de"]) + "\n"
    done = run_cli("generate", "--path", checkpoint, "--input=-", "--buffer-size=9", stdin=lines)
    alone = run_cli("generate", separate, "--path", checkpoint)
    assert lines_of(done.stdout, "D") == lines_of(alone.stdout, "D")
    assert "unknown" not in done.stderr


def test_unknown_words_of_the_input_are_counted(checkpoint: Path) -> None:
    done = run_cli("generate", "--path", checkpoint, "--input=-", stdin="vier elf\nzwölf\n")
    assert [line[1] for line in lines_of(done.stdout, "S")] == ["vier <unk>", "<unk>"]
    assert "2 of 3 source tokens are unknown" in done.stderr


def test_other_dictionaries_are_refused_with_both_hashes(joined: Path, checkpoint: Path) -> None:
    message = one_line_error(run_cli("generate", joined, "--path", checkpoint))
    for tokenizer in (
        Checkpoint.load(checkpoint).tokenizer("src"),
        open_dataset(joined).src_tokenizer,
    ):
        assert tokenizer.hash[:16] in message


def test_a_training_resumes_on_the_same_data_only(separate: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(separate, tmp_path / "bin")
    trained(folder, tmp_path / "c")
    for path in folder.glob("test.*"):  # a test set may come and go
        path.unlink()
    trained(folder, tmp_path / "c", "--max-update=4")
    again = ["train", folder, "--save-dir", tmp_path / "c", "--arch=fastdiss_tiny", *TINY]
    again += ["--max-update=5"]
    for name, old, new, message in (
        ("valid.de-en.en.bin", b"\x04\0", b"\x05\0", "dataset was"),
        ("dict.en.txt", b"two ", b"TWO ", "the target tokenizer of"),
    ):
        content = (folder / name).read_bytes()
        assert old in content
        (folder / name).write_bytes(content.replace(old, new, 1))
        assert message in one_line_error(run_cli(*again))
        (folder / name).write_bytes(content)
    assert run_cli(*again).returncode == 0


def test_verify_reads_a_data_bin(joined: Path) -> None:
    done = run_cli("preprocess", "--verify", "--destdir", joined)
    assert done.returncode == 0 and "240 sentence pairs intact" in done.stderr


def test_a_data_bin_trains_like_a_dataset_of_fastdiss(
    separate: Path, checkpoint: Path, text, tmp_path: Path
) -> None:
    for split in ("train", "valid"):
        for language in LANGUAGES:
            path = tmp_path / f"{split}.{language}"
            path.write_text("\n".join(text[split][language]) + "\n", encoding="utf-8")
    dictionaries = ",".join(str(separate / f"dict.{language}.txt") for language in LANGUAGES)
    done = run_cli(
        "preprocess", "-s", "de", "-t", "en", "--destdir", tmp_path / "bin",
        "--trainpref", tmp_path / "train", "--validpref", tmp_path / "valid",
        "--tokenizer", dictionaries,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for ending in ("bin", "idx"):
        ours = (tmp_path / "bin" / f"train.tgt.{ending}").read_bytes()
        assert ours == (separate / f"train.de-en.en.{ending}").read_bytes()
    ours, theirs = (Checkpoint.load(c) for c in (trained(tmp_path / "bin", tmp_path), checkpoint))
    assert ours.progress == theirs.progress and ours.tensors.keys() == theirs.tensors.keys()
    assert all(torch.equal(value, theirs.tensors[name]) for name, value in ours.tensors.items())


def test_text_is_binarized_with_the_same_dictionaries(
    separate: Path, text, checkpoint: Path, tmp_path: Path
) -> None:
    for language in LANGUAGES:
        lines = [*text["test"][language], "elf"]
        (tmp_path / f"new.{language}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    dictionaries = ",".join(str(separate / f"dict.{language}.txt") for language in LANGUAGES)
    done = run_cli(
        "preprocess", "-s", "de", "-t", "en", "--testpref", tmp_path / "new",
        "--destdir", tmp_path / "bin", "--tokenizer", dictionaries, "--verify",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (
        "unknown 1 and 1" in done.stderr
        and "decoding changes 1 source and 1 target: " in done.stderr
    )
    ours, theirs = open_dataset(tmp_path / "bin"), open_dataset(separate)
    for side in ("src", "tgt"):
        rows = [ids.tolist() for ids in theirs["test"][side]]
        assert [ids.tolist() for ids in ours["test"][side]] == [*rows, [3, 2]]
    assert run_cli("generate", tmp_path / "bin", "--path", checkpoint).returncode == 0


# languages


def test_files_of_one_direction_serve_both(joined: Path, raw, tmp_path: Path) -> None:
    forward = open_dataset(joined)
    back = open_dataset(joined, "en", "de")
    assert back.languages == ("en", "de") and open_dataset(joined, target="de").languages == (
        "en",
        "de",
    )
    assert [back.src_tokenizer.decode(ids) for ids in back["valid"]["src"]] == raw["valid"]["en"]
    assert [back.tgt_tokenizer.decode(ids) for ids in back["valid"]["tgt"]] == raw["valid"]["de"]
    assert back.hash != forward.hash == open_dataset(joined, "de", "en").hash
    path = trained(joined, tmp_path, "-s", "en", "-t", "de")
    done = run_cli("generate", joined, "--path", path, "--source-lang=en", "--target-lang=de")
    assert done.returncode == 0 and "en to de" in done.stderr
    assert [line[1] for line in lines_of(done.stdout, "T")] == raw["test"]["de"]


def test_parts_of_a_training_set_are_not_overlooked(
    text, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """fairseq trains on train, train1, ... together."""
    folder = write_data_bin(tmp_path / "bin", text | {"train1": text["valid"]})
    open_dataset(folder)
    warning = f"{folder}: fairseq would also train on train1; only `train` is used here"
    assert warning in capsys.readouterr().err


def test_an_open_choice_of_languages_is_asked_for(joined: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(joined, tmp_path / "bin")
    shutil.copy(folder / "dict.de.txt", folder / "dict.fr.txt")
    for ending in ("bin", "idx"):
        for language in ("fr", "en"):
            source = folder / f"train.de-en.{language.replace('fr', 'de')}.{ending}"
            shutil.copy(source, folder / f"train.fr-en.{language}.{ending}")
        shutil.copy(source, folder / f"train.de-None.de.{ending}")  # --only-source
    message = one_line_error(run_cli("train", folder, "--save-dir", tmp_path / "c"))
    assert "holds de-en, fr-en: choose with --source-lang and --target-lang" in message
    assert open_dataset(folder, "fr").languages == ("fr", "en")
    assert open_dataset(folder, "de").languages == ("de", "en")
    with pytest.raises(FastdissError, match="choose with"):
        open_dataset(folder, target="en")
    with pytest.raises(FastdissError, match="choose with"):
        open_dataset(folder, "de", "fr")


def test_a_dataset_of_fastdiss_has_its_one_direction(data_bin: Path, tmp_path: Path) -> None:
    assert open_dataset(data_bin, "de", "en").hash == open_dataset(data_bin).hash
    message = one_line_error(run_cli("train", data_bin, "-s", "en", "--save-dir", tmp_path, *TINY))
    assert "goes from de to en" in message
    done = run_cli("generate", "--path=x", "--input=-", "-s", "de")
    one_line_error(done, "--source-lang", code=2)


# damage


def test_what_is_wrong_is_reported_in_one_line(joined: Path, tmp_path: Path) -> None:
    def error_of(name: str, change) -> str:
        """Apply ``change(folder)`` to a copy; both commands must report the same error."""
        folder = shutil.copytree(joined, tmp_path / name)
        change(folder)
        for command in (
            ["train", folder, "--save-dir", tmp_path / "c", *TINY],
            ["preprocess", "--verify", "--destdir", folder],
        ):
            line = one_line_error(run_cli(*command))
            assert "fastdiss preprocess" not in line
        assert not (tmp_path / "c").exists()
        return line

    def write(name: str, content: bytes):
        return lambda folder: (folder / name).write_bytes(content)

    def drop(*names: str):
        return lambda folder: [path.unlink() for name in names for path in folder.glob(name)]

    def tokens(sentences: list[list[int]], code: int = 8):
        return lambda folder: write_tokens(folder / "test.de-en.de", sentences, code)

    legacy = b"TNTIDX\x00\x00" + struct.pack("<QQQQQ", 1, 4, 4, 20, 20)
    line = error_of("legacy", write("train.de-en.de.idx", legacy))
    assert "train.de-en.de.idx is in fairseq's lazy or cached format, not mmap" in line
    assert "run `fairseq-preprocess --dataset-impl mmap` again" in line
    assert "huffman" in error_of(
        "huffman", write("test.de-en.en.idx", b"HUFFIDX\x00\x00" + b"\0" * 20)
    )
    assert "no SPLIT.SRC-TGT.LANG.idx" in error_of("raw", drop("*.idx", "*.bin"))
    assert "dict.en.txt: cannot read the dictionary" in error_of("no dict", drop("dict.en.txt"))
    assert "dict.de.txt: cannot read the dictionary" in error_of("no dicts", drop("dict.*"))
    assert "there is test.de-en.de.idx, but the side en is missing" in error_of(
        "no side", drop("test.de-en.en.*")
    )
    assert "train.de-en.de.bin: No such file" in error_of("no bin", drop("train.de-en.de.bin"))
    content = (joined / "train.de-en.de.bin").read_bytes()
    cut = write("train.de-en.de.bin", content[:-4])
    assert "2554 bytes, but the index ends at 2558" in error_of("cut", cut)
    assert "no index header" in error_of("noise", write("valid.de-en.de.idx", b"\x01" * 40))
    assert "id 6000 is outside the vocabulary" in error_of("id", tokens([[6000, 2]] * 20))
    assert "id -1 is outside the vocabulary" in error_of("minus", tokens([[-1, 2]] * 20, code=4))
    assert "the first is number 1" in error_of("eos", tokens([[4, 2], [4, 4]] * 10))
    assert "20 sentences do not end with eos" in error_of("empty", tokens([[]] * 20))
    assert "19 sentences on one side and 20 on the other" in error_of("count", tokens([[2]] * 19))
    floats = bytearray((joined / "test.de-en.de.idx").read_bytes())
    floats[17] = 7
    assert "dtype code 7" in error_of("floats", write("test.de-en.de.idx", bytes(floats)))
    bad = write("dict.de.txt", b"a\nb 1\n")
    assert "dict.de.txt: line 1 is not a word and its count" in error_of("dict", bad)


def test_damage_is_reported_or_read(text, tmp_path: Path) -> None:
    """There are no hashes, so tokens may differ, but there must be no crash."""
    few = {split: {k: v[:8] for k, v in sides.items()} for split, sides in text.items()}
    folder = write_data_bin(tmp_path / "bin", few)
    files = sorted(path for path in folder.iterdir() if path.suffix != ".log")
    draw, refused = random.Random(1), 0
    for _ in range(200):
        path = draw.choice(files)
        content = path.read_bytes()
        start = draw.randrange(len(content))
        end = start + draw.choice([0, 1, 8, len(content)])
        path.write_bytes(content[:start] + draw.randbytes(draw.choice([0, 1, 8])) + content[end:])
        try:
            dataset = open_dataset(folder, verify=True)
            for sides in dataset.splits.values():
                for ids in sides["tgt"]:
                    dataset.tgt_tokenizer.decode(ids.tolist())
        except FastdissError as error:
            refused += 1
            assert "\n" not in str(error)
        path.write_bytes(content)
    assert 100 < refused < 200
    open_dataset(folder, verify=True)


def test_a_checkpoint_of_fairseq_is_refused(joined: Path, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_best.pt"
    path.write_bytes(pickle.dumps({"model": {}}))
    message = one_line_error(run_cli("generate", joined, "--path", path))
    assert "are pickle" in message and "fastdiss train" in message


def test_generate_checks_the_split(separate: Path, checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(separate, tmp_path / "bin")
    write_tokens(folder / "test.de-en.de", [[6000, 2]] * 20)
    generate = ["generate", folder, "--path", checkpoint]
    assert "id 6000 is outside" in one_line_error(run_cli(*generate))
    assert run_cli(*generate, "--gen-subset=valid").returncode == 0
    assert "'test2'; it has" in one_line_error(run_cli(*generate, "--gen-subset=test2"))


def test_unknown_words_of_references_are_told(
    separate: Path, checkpoint: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(separate, tmp_path / "bin")
    write_tokens(folder / "test.de-en.en", [[3, 4, 2]] * 20)
    generate = ["generate", folder, "--path", checkpoint, "--results-path", tmp_path]
    done = run_cli(*generate)
    assert "20 of 60 tokens of the references are unknown to the dictionary" in done.stderr
    text = tmp_path / "text"
    text.write_text("a\n" * 20)
    assert "unknown to the dictionary" not in run_cli(*generate, "--ref", text).stderr


# flags


def test_old_flags_are_translated_with_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    line = (
        "generate D --task=translation_lev --path c --decoding-steps 20 --length-beam-size=7 "
        "--remove-bpe sentencepiece --bleu-mbr --post-process=@@ --remove-bpe --beam 4"
    )
    new = "generate D --path c --steps 20 --length-beam 7 --select mbr --mbr-weights equal --beam 4"
    assert " ".join(rewrite_flags(line.split())) == new
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 7
    assert lines[1] == "--decoding-steps is --steps 20 here"
    assert lines[3].startswith("--remove-bpe is not needed here: D- and T- lines are text")


def test_a_translated_flag_can_be_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    new = rewrite_flags(["train", "D", "--adam-betas", "(0.9, 0.98)"])
    hint = capsys.readouterr().err.removeprefix("--adam-betas is ").removesuffix(" here\n")
    assert ["train", "D", *shlex.split(hint)] == new


@pytest.mark.parametrize("line", ["train D --decoding-steps", "train --decoding-steps --lr 1"])
def test_an_old_flag_without_its_value(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        rewrite_flags(line.split())
    assert capsys.readouterr().err == "fastdiss: error: --decoding-steps needs a value\n"
    with pytest.raises(SystemExit):
        rewrite_flags(["generate", "--cpu=False"])
    assert capsys.readouterr().err == "fastdiss: error: --cpu takes no value\n"


def test_difformers_noise_of_decoding_is_the_temperature_here(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert rewrite_flags(["generate", "D", "--decoding-noise-factor", "1"]) == ["generate", "D"]
    with pytest.raises(SystemExit):
        rewrite_flags(["generate", "D", "--decoding-noise-factor", "2"])
    output = capsys.readouterr().err
    assert "--temperature 0.25" in output and "'2' is not supported" in output


def test_average_checkpoints_is_average() -> None:
    line = "average --inputs ck --num-update-checkpoints=5 --output mean.safetensors"
    wanted = "average ck --last 5 --output mean.safetensors"
    assert rewrite_flags(line.split()) == wanted.split()


def test_the_word_after_remove_bpe_may_be_the_dataset() -> None:
    assert rewrite_flags(["generate", "--remove-bpe", "data-bin"]) == ["generate", "data-bin"]


def test_one_rank_speaks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert rewrite_flags(["generate", "--decoding-steps", "2"]) == ["generate", "--steps", "2"]
    assert not capsys.readouterr().err
    monkeypatch.delenv("WORLD_SIZE")  # left over: there are no others
    rewrite_flags(["generate", "--decoding-steps", "2"])
    assert "--decoding-steps is --steps 2 here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("train D --min-lr 1e-9 --apply-bert-init", ["--min-lr (", "--apply-bert-init (there"]),
        ("train D --optimizer=sgd", ["(the optimizer is AdamW; 'sgd' is not supported)"]),
        ("train D --batch-size 50", ["--batch-size (batches are counted in tokens: --max-tokens)"]),
        ("train D --tensorboard-logdir x", ["-logdir (--set train.tensorboard=true writes"]),
        ("train D --wandb-project x", ["--wandb-project (metrics.jsonl in --save-dir"]),
        ("generate D --decoding-early-stopping 5", ["less 5"]),
        ("generate D --iter-decode-max-iter x", ["use --steps"]),
        ("generate D --remove-bpe=_EOW", ["'_EOW' cannot be undone"]),
        ("generate --post-process wordpiece D", ["'wordpiece' cannot be undone"]),
        ("generate D --prefix-size 2", ["--prefix-size (answers are generated as a whole; '2'"]),
        ("preprocess --srcdict d --tgtdict e", ["--tokenizer SRC,TGT"]),
        ("score --sentence-bleu", ["scores are corpus-level"]),
        ("score ref.txt -i out.txt", ["sacreBLEU's REF -i HYP is --sys HYP --ref REF"]),
    ],
)
def test_what_has_no_equivalent_exits_with_2(line: str, parts: list[str]) -> None:
    done = run_cli(*line.split())
    one_line_error(done, "error: no equivalent, leave out: ", *parts, code=2)


def test_old_and_new_flags_meet_nowhere() -> None:
    """Every old flag translates to flags that the command has, and shadows none of them."""
    root = typer.main.get_command(command_line())
    for command, table in OLD_FLAGS.items():
        known = {
            name for p in root.commands[command].params for name in (*p.opts, *p.secondary_opts)
        }
        assert not known & table.keys()
        for flag, old in table.items():
            assert old.takes in ("none", "one", "maybe"), flag
            for value in ("", "0", "1", "bleu", "mmap"):
                try:
                    new = old.translate(value)
                except NoEquivalent as reason:
                    assert str(reason), flag
                    continue
                assert all(word in known for word in new if word.startswith("--")), flag
                assert new or old.remark, flag


def test_an_old_command_line_runs(separate: Path, checkpoint: Path) -> None:
    done = run_cli(
        *("generate", separate, "--gen-subset", "test", "--task", "difformer"),
        *("--path", checkpoint, "--decoding-steps", "2", "--decoding-early-stopping", "0"),
        *("--length-beam-size", "2", "--noise-beam-size", "2", "--bleu-mbr", "--remove-bpe"),
        *("--fp16", "--cpu", "--retain-iter-history"),
    )
    assert done.returncode == 0, done.stderr
    assert "steps=2 length_beam=2 noise_beam=2" in done.stdout.splitlines()[-1]
    assert len(lines_of(done.stdout, "E")) == 40


# the document


def blocks() -> list[str]:
    """Return the command lines of the document's fenced blocks, in order."""
    found = re.findall(r"^ *```\n(.*?)^ *```$", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
    return [line.strip() for block in found for line in block.splitlines()]


def test_every_command_of_the_document_runs(
    text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_data_bin(tmp_path / "data-bin" / "iwslt14.de-en", text)
    for split, sides in text.items():
        for language, lines in sides.items():
            Path(f"{split}.bpe.{language}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    lines = blocks()
    assert sum(line.startswith("fastdiss ") for line in lines) == 10
    for line in lines:
        if not line.startswith("fastdiss "):
            subprocess.run(line, shell=True, check=True)
            continue
        words = shlex.split(line)[1:]
        if words[0] == "train":
            latent = [] if "transformer" in line else ["--set=model.latent_dim=8"]
            words += [*TINY, *latent]
        elif "teacher" in line:
            words += ["--max-len-b", "5"]  # it has learned nothing, and would not end
        done = run_cli(*words)
        assert done.returncode == 0, (line, done.stderr)
    assert len(open_dataset(Path("data-bin/distilled"))["train"]["tgt"]) == SIZES["train"]


def test_every_flag_of_the_document_is_translated_as_it_says() -> None:
    rows = re.findall(r"^\| (\w+) \| `(-.*?)` \| `(.*?)` \|$", DOCUMENT.read_text(), re.MULTILINE)
    assert len(rows) == 29
    for command, old, new in rows:
        assert rewrite_flags([command, *shlex.split(old)]) == [command, *shlex.split(new)]
