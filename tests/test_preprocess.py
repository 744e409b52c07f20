"""``fastdiss preprocess``: from text to a dataset, and all ways to fail."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import one_line_error, run_process, write_pairs
from sentencepiece import SentencePieceTrainer

from fastdiss_cli.__main__ import main
from fastdiss_cli.data.binarized import BinarizedDataset
from fastdiss_cli.data.encoding import CHUNK
from fastdiss_cli.data.sentencepiece import train_tokenizer

LANGUAGES = ("-s", "de", "-t", "en")


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture
def preprocess(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run ``fastdiss preprocess -s de -t en ARGS`` within this process."""

    def run(*args: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["fastdiss", "preprocess", *LANGUAGES, *map(str, args)])
        with pytest.raises(SystemExit) as caught:
            main()
            sys.exit(0)
        return Outcome(caught.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def small(corpus: Path) -> tuple[str | Path, ...]:
    """The flags for a small dataset of one split."""
    return ("--trainpref", corpus / "train", "--vocab-size", "300")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def text_of(dataset: BinarizedDataset, split: str) -> list[tuple[str, str]]:
    """Decode a split, every sentence of which must end in eos."""
    src, tgt = dataset.src_tokenizer, dataset.tgt_tokenizer
    files = dataset[split]
    pairs = list(zip(files["src"], files["tgt"], strict=True))
    assert all(s[-1] == src.eos and t[-1] == tgt.eos for s, t in pairs)
    return [(src.decode(s.tolist()), tgt.decode(t.tolist())) for s, t in pairs]


def lines_of(prefix: Path) -> list[tuple[str, str]]:
    sides = [Path(f"{prefix}.{lang}").read_text("utf-8").splitlines() for lang in ("de", "en")]
    return list(zip(*sides, strict=True))


def assert_fails(outcome: Outcome, *message: str) -> None:
    """Check for exit code 1, one error line at the end, and no traceback."""
    assert outcome.code == 1
    assert outcome.out == ""
    *before, error = outcome.err.splitlines()
    assert error.startswith("fastdiss: error: ")
    assert not [line for line in before if "rror" in line or "Traceback" in line]
    for part in message:
        assert part in error


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("model_type", ["unigram", "word"])
def test_text_goes_in_and_comes_out(
    preprocess: Command, corpus: Path, tmp_path: Path, joined: bool, model_type: str
) -> None:
    outcome = preprocess(
        *("--trainpref", corpus / "train", "--validpref", corpus / "valid"),
        *("--testpref", corpus / "test", "--destdir", tmp_path / "d", "--vocab-size", 300),
        *("--joined" if joined else "--separate", "--model-type", model_type, "--verify"),
    )
    assert (outcome.code, outcome.out) == (0, "")
    assert "240 sentence pairs intact" in outcome.err
    dataset = BinarizedDataset(tmp_path / "d", verify=True)
    for split in ("train", "valid", "test"):
        assert text_of(dataset, split) == lines_of(corpus / split)
    manifest = dataset.manifest
    assert (manifest.source, manifest.target, manifest.joined) == ("de", "en", joined)
    assert (manifest.tokenizers["src"] == manifest.tokenizers["tgt"]) == joined
    assert manifest.sentences == {"train": 200, "valid": 20, "test": 20}
    assert max(manifest.vocab_sizes.values()) <= 300
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_a_line_break_in_a_field_becomes_a_blank_and_is_reported(
    preprocess: Command, tmp_path: Path
) -> None:
    rows = [{"de": "ein\nHund", "en": "a dog"}, {"de": "zwei", "en": "two\n\ncats"}] * 40
    rows += [{"de": "null", "en": "zero"}] * 40
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--format", "jsonl", "--model-type", "char", "--destdir", tmp_path / "d")
    done = preprocess("--trainpref", tmp_path / "x", *options)
    assert done.code == 0, done.err
    assert "train: 80 pairs with a line break in a field: replaced by a blank" in done.err
    assert "decoding changes" not in done.err
    expected = [("ein Hund", "a dog"), ("zwei", "two  cats")] * 40 + [("null", "zero")] * 40
    assert text_of(BinarizedDataset(tmp_path / "d"), "train") == expected


def test_fields_of_other_names_are_reported_before_any_work(
    preprocess: Command, tmp_path: Path
) -> None:
    (tmp_path / "x.jsonl").write_text('{"source": "eins", "target": "one"}\n' * 3)
    text = ("--trainpref", tmp_path / "x", "--format", "jsonl", "--destdir", tmp_path / "d")
    outcome = preprocess(*text)
    assert_fails(outcome, "line 1 lacks the text fields 'de' and 'en' (it has source, target)")
    assert "tokenizer" not in outcome.err and not (tmp_path / "d").exists()


@pytest.mark.parametrize("format", ["jsonl", "tsv"])
def test_other_formats_give_the_same_tokens(
    preprocess: Command, corpus: Path, tmp_path: Path, small: tuple, format: str
) -> None:
    form = {"jsonl": '{{"de": "{}", "en": "{}"}}\n', "tsv": "{}\t{}\n"}[format]
    text = "".join(form.format(*pair) for pair in lines_of(corpus / "train"))
    (tmp_path / f"x.{format}").write_text(text, encoding="utf-8")
    options = ("--format", format, "--vocab-size", 300)
    assert preprocess(*small, "--destdir", tmp_path / "text").code == 0
    assert (
        preprocess("--trainpref", tmp_path / "x", *options, "--destdir", tmp_path / "d").code == 0
    )
    first, second = (BinarizedDataset(tmp_path / name) for name in ("text", "d"))
    assert first.hash == second.hash


def test_given_tokenizers(preprocess: Command, corpus: Path, tmp_path: Path) -> None:
    pairs = lines_of(corpus / "train")
    models = []
    for side, language in enumerate(("de", "en")):
        tokenizer = train_tokenizer([pair[side] for pair in pairs], "char", 400)
        (tmp_path / f"{language}.model").write_bytes(tokenizer.model)
        models.append(tokenizer)
    german, both = tmp_path / "de.model", f"{tmp_path}/de.model,{tmp_path}/en.model"
    given = ("--testpref", corpus / "test", "--destdir", tmp_path / "d")
    for names, expected in ((german, [models[0]] * 2), (both, models)):
        done = preprocess(*given, "--tokenizer", names, "--vocab-size", 400, "--separate")
        assert done.code == 0 and "--vocab-size has no effect" in done.err
        assert "--joined/--separate has no effect" in done.err
        assert ("will be replaced" in done.err) == (names == both)
        assert "--model-type" not in done.err
        dataset = BinarizedDataset(tmp_path / "d", verify=True)
        used = [dataset.src_tokenizer.hash, dataset.tgt_tokenizer.hash]
        assert used == [tokenizer.hash for tokenizer in expected]
        assert dataset.manifest.joined == (names is german)
        assert text_of(dataset, "test") == lines_of(corpus / "test")
        assert list(dataset.splits) == ["test"]


def test_a_foreign_tokenizer_that_changes_text_is_reported(
    preprocess: Command, tmp_path: Path
) -> None:
    """SentencePiece's own defaults normalise: here a ligature and two blanks."""
    model = tmp_path / "spm"
    words = iter(["der hund", "the dog"] * 20)
    SentencePieceTrainer.train(
        sentence_iterator=words, model_prefix=str(model), vocab_size=20, minloglevel=3,
        hard_vocab_limit=False,
    )  # fmt: skip
    for language, text in (("de", "der hund\nder  hund\nder ﬁsch\n"), ("en", "the dog\n" * 3)):
        (tmp_path / f"text.{language}").write_text(text, encoding="utf-8")
    outcome = preprocess(
        "--testpref",
        tmp_path / "text",
        "--tokenizer",
        f"{model}.model",
        "--destdir",
        tmp_path / "d",
    )
    assert outcome.code == 0
    assert "test: decoding changes 2 sources and 0 targets: the tokenizer" in outcome.err


def test_workers_do_not_change_a_byte(tmp_path: Path, preprocess: Command) -> None:
    write_pairs(tmp_path / "big", 2 * CHUNK + 100)
    (tmp_path / "spm").write_bytes(train_tokenizer(["eins two"], "char", 300).model)
    for workers in ("1", "2"):
        outcome = preprocess(
            *("--trainpref", tmp_path / "big", "--tokenizer", tmp_path / "spm"),
            *("--workers", workers, "--destdir", tmp_path / workers),
        )
        assert outcome.code == 0
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    dataset = BinarizedDataset(tmp_path / "2", verify=True)
    assert text_of(dataset, "train") == lines_of(tmp_path / "big")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_line_is_located_by_any_worker(
    tmp_path: Path, preprocess: Command, workers: int
) -> None:
    write_pairs(tmp_path / "x", 2 * CHUNK)
    lines = (tmp_path / "x.en").read_bytes().split(b"\n")
    lines[CHUNK + 6] = b"on\xe9"
    (tmp_path / "x.en").write_bytes(b"\n".join(lines))
    (tmp_path / "spm").write_bytes(train_tokenizer(["eins two"], "char", 300).model)
    given = ("--trainpref", tmp_path / "x", "--tokenizer", tmp_path / "spm", "--workers", workers)
    outcome = preprocess(*given, "--destdir", tmp_path / "d")
    assert_fails(outcome, f"x.en: line {CHUNK + 7} is not valid UTF-8 (byte 3 of the line)")
    assert not (tmp_path / "d").exists()


def test_failure_while_workers_run(tmp_path: Path, preprocess: Command) -> None:
    write_pairs(tmp_path / "x", CHUNK + 50)
    with open(tmp_path / "x.en", "a") as file:
        file.write("one more\n")
    (tmp_path / "spm").write_bytes(train_tokenizer(["eins two"], "char", 300).model)
    given = ("--trainpref", tmp_path / "x", "--tokenizer", tmp_path / "spm", "--workers", 2)
    outcome = preprocess(*given, "--destdir", tmp_path / "d")
    assert_fails(outcome, f"x.en has {CHUNK + 51:,} lines", f"x.de has {CHUNK + 50:,}")
    assert not (tmp_path / "d").exists()


def test_several_test_sets(preprocess: Command, corpus: Path, tmp_path: Path, small: tuple) -> None:
    tests = f"{corpus / 'test'},{corpus / 'valid'}"
    assert preprocess(*small, "--testpref", tests, "--destdir", tmp_path / "d").code == 0
    dataset = BinarizedDataset(tmp_path / "d", verify=True)
    assert list(dataset.splits) == ["train", "test", "test1"]
    assert text_of(dataset, "test") == lines_of(corpus / "test")
    assert text_of(dataset, "test1") == lines_of(corpus / "valid")


def test_a_dataset_is_not_replaced_by_one_of_fewer_splits(
    preprocess: Command, corpus: Path, tmp_path: Path, small: tuple
) -> None:
    out = ("--destdir", tmp_path / "d")
    assert preprocess(*small, "--validpref", corpus / "valid", *out).code == 0
    before = contents(tmp_path / "d")
    given = ("--tokenizer", tmp_path / "d" / "tokenizer.src", "--testpref", corpus / "test")
    assert_fails(preprocess(*given, *out), "whose train and valid would be lost")
    assert contents(tmp_path / "d") == before
    assert preprocess(*small, "--validpref", corpus / "test", *out).code == 0


def test_the_training_text_has_one_name(preprocess: Command, corpus: Path, tmp_path: Path) -> None:
    both = f"{corpus / 'train'},{corpus / 'valid'}"
    outcome = preprocess("--trainpref", both, "--destdir", tmp_path / "d")
    assert outcome.code == 2 and "--trainpref takes one name, the others several" in outcome.err


def test_empty_sides_are_kept_and_reported(preprocess: Command, tmp_path: Path) -> None:
    (tmp_path / "x.de").write_text("eins\n\n \nvier\n")
    (tmp_path / "x.en").write_text("one\ntwo\nthree\n\n")
    prefix = ("--trainpref", tmp_path / "x", "--vocab-size", 300)
    outcome = preprocess(*prefix, "--destdir", tmp_path / "d")
    assert outcome.code == 0
    first = f"(the first in line 2 of {tmp_path / 'x.de'} and {tmp_path / 'x.en'})"
    assert f"train: 3 pairs with an empty side {first}: kept" in outcome.err
    dataset = BinarizedDataset(tmp_path / "d", verify=True)
    expected = [("eins", "one"), ("", "two"), (" ", "three"), ("vier", "")]
    assert text_of(dataset, "train") == expected


def test_verify_alone_checks_what_is_there(
    preprocess: Command, tmp_path: Path, small: tuple
) -> None:
    preprocess(*small, "--destdir", tmp_path / "d")
    before = contents(tmp_path / "d")
    outcome = preprocess("--destdir", tmp_path / "d", "--verify")
    assert outcome.code == 0 and "200 sentence pairs intact" in outcome.err
    assert contents(tmp_path / "d") == before
    more = ("--tokenizer", "nowhere", "--separate", "--format", "tsv")
    told = preprocess("--destdir", tmp_path / "d", "--verify", *more).err
    for flag in ("--tokenizer", "--joined/--separate", "--format"):
        assert f"{flag} has no effect: without text, --verify only checks a dataset" in told
    remedy = "for another direction make a dataset with `fastdiss preprocess -s fr -t en`"
    assert_fails(preprocess("--destdir", tmp_path / "d", "--verify", "-s", "fr"), remedy)
    path = tmp_path / "d" / "train.src.bin"
    path.write_bytes(b"\x05" + path.read_bytes()[1:])
    assert_fails(preprocess("--destdir", tmp_path / "d", "--verify"), "train.src.bin", "sha256")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--trainpref"),
        (("--testpref", "x"), "--tokenizer"),
        (("--trainpref", "x", "--format", "json"), "jsonl"),
        (("--trainpref", "x", "--format", "jsonl", "-s", "a", "-t", "a"), "name the same field"),
        (("--trainpref", "x", "--model-type", "unigrm"), "unigram"),
        (("--trainpref", "x", "--workers", "-1"), "--workers"),
        (("--trainpref", "x", "--workers", "two"), "--workers"),
        (("--trainpref", "x", "--tokenizer", "a,b,c"), "--tokenizer"),
        (("--trainpref", "x", "--vocabsize", "300"), "--vocab"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_usage(preprocess: Command, tmp_path: Path, arguments: tuple, message: str) -> None:
    outcome = preprocess(*arguments, "--destdir", tmp_path / "d")
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err and "Traceback" not in outcome.err
    assert list(tmp_path.iterdir()) == []


def unequal(prefix: Path) -> None:
    with open(f"{prefix}.en", "a") as file:
        file.write("one more\n")


def not_utf8(prefix: Path) -> None:
    path = Path(f"{prefix}.de")
    path.write_bytes(path.read_bytes() + b"schl\xe4cht\n")


def emptied(prefix: Path) -> None:
    for language in ("de", "en"):
        Path(f"{prefix}.{language}").write_text("")


def removed(prefix: Path) -> None:
    Path(f"{prefix}.en").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (unequal, "x.en has 21 lines"),
        (not_utf8, "x.de: line 21 is not valid UTF-8"),
        (emptied, "x.de is empty"),
        (removed, "x.en: no such file"),
    ],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_failure_leaves_the_older_dataset(
    preprocess: Command,
    corpus: Path,
    tmp_path: Path,
    small: tuple,
    split: str,
    spoil: Callable[[Path], None],
    message: str,
) -> None:
    preprocess(*small, "--destdir", tmp_path / "d")
    before = contents(tmp_path / "d")
    write_pairs(tmp_path / "x", 20)
    spoil(tmp_path / "x")
    prefixes = {"train": corpus / "train", split: tmp_path / "x"}
    flags = [part for name, prefix in prefixes.items() for part in (f"--{name}pref", prefix)]
    outcome = preprocess(*flags, "--vocab-size", 300, "--destdir", tmp_path / "d")
    assert_fails(outcome, message)
    assert "tokenizer" not in outcome.err  # reported before any work
    assert contents(tmp_path / "d") == before
    assert sorted(path.suffix for path in tmp_path.iterdir() if path.name[0] != "x") == [""]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--vocab-size", "10"), "--vocab-size 10 is too small"),
        (("--tokenizer", "nowhere.model"), "nowhere.model: cannot read the tokenizer"),
        (("--tokenizer", __file__), "not a SentencePiece model"),
        (("--tokenizer", "/usr"), "/usr is a folder: give files, of a dataset /usr/tokenizer.src,"),
    ],
    ids=["vocabulary", "missing", "no model", "folder"],
)
def test_tokenizer_failures(
    preprocess: Command, tmp_path: Path, small: tuple, flags: tuple, message: str
) -> None:
    assert_fails(preprocess(*small, *flags, "--destdir", tmp_path / "d"), message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["notes.txt", "checkpoints/last", "train.de-en.de.bin"])
@pytest.mark.parametrize("with_dataset", [False, True])
def test_a_folder_with_other_files_is_not_replaced(
    preprocess: Command, tmp_path: Path, small: tuple, name: str, with_dataset: bool
) -> None:
    folder = tmp_path / "d"
    if with_dataset:
        assert preprocess(*small, "--destdir", folder).code == 0
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("precious")
    outcome = preprocess(*small, "--destdir", folder)
    assert_fails(outcome, "holds other files", name.split("/")[0])
    assert (folder / name).read_text() == "precious"
    assert (folder / "manifest.json").exists() == with_dataset


def test_a_file_is_not_replaced(preprocess: Command, tmp_path: Path, small: tuple) -> None:
    (tmp_path / "d").write_text("precious")
    assert_fails(preprocess(*small, "--destdir", tmp_path / "d"), "is a file")
    assert (tmp_path / "d").read_text() == "precious"


def test_a_dataset_is_replaced_whole(
    preprocess: Command, corpus: Path, tmp_path: Path, small: tuple
) -> None:
    more = (*small, "--testpref", corpus / "test", "--separate")
    assert preprocess(*small, "--destdir", tmp_path / "d").code == 0
    assert preprocess(*more, "--destdir", tmp_path / "d").code == 0
    assert list(BinarizedDataset(tmp_path / "d", verify=True).splits) == ["train", "test"]
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
    assert preprocess(*more, "--destdir", tmp_path / "new").code == 0
    assert contents(tmp_path / "d") == contents(tmp_path / "new")


def test_a_damaged_dataset_can_be_made_again(
    preprocess: Command, tmp_path: Path, small: tuple
) -> None:
    preprocess(*small, "--destdir", tmp_path / "d")
    (tmp_path / "d" / "manifest.json").write_text("{")
    assert_fails(preprocess("--destdir", tmp_path / "d", "--verify"), "manifest.json is damaged")
    assert preprocess(*small, "--destdir", tmp_path / "d", "--verify").code == 0


def test_into_the_working_folder_or_behind_a_link(
    preprocess: Command, tmp_path: Path, small: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    monkeypatch.chdir(here)
    assert preprocess(*small, "--destdir", ".").code == 0
    assert (here / "manifest.json").exists()
    link = tmp_path / "link"
    link.symlink_to(there)
    assert preprocess(*small, "--destdir", link).code == 0
    assert link.is_symlink() and (there / "manifest.json").exists()


def test_in_a_process_of_its_own(corpus: Path, tmp_path: Path, small: tuple) -> None:
    made = run_process("preprocess", *LANGUAGES, *small, "--destdir", tmp_path / "d", "--verify")
    assert (made.returncode, made.stdout) == (0, "")
    assert "200 sentence pairs intact" in made.stderr
    shutil.copy(corpus / "train.de", tmp_path / "x.de")
    prefix = ("--trainpref", tmp_path / "x")
    failed = run_process("preprocess", *LANGUAGES, *prefix, "--destdir", tmp_path / "d")
    assert_fails(Outcome(failed.returncode, failed.stdout, failed.stderr), "x.en: no such file")
    assert run_process("preprocess", "--destdir", tmp_path / "d").returncode == 2
    for wrong, message in (
        (["--trainpref", ""], "an argument is empty"),
        (["--testpref", "a,"], "a name is empty"),
        (["--tokenizer", ""], "an argument is empty"),
    ):
        done = run_process("preprocess", "--destdir", tmp_path / "d", *wrong)
        one_line_error(done, message, code=2)


def test_a_missing_file_is_reported_before_a_tokenizer_is_trained(
    tmp_path: Path, preprocess: Command
) -> None:
    write_pairs(tmp_path / "train", 20)
    outcome = preprocess(
        *("--trainpref", tmp_path / "train", "--testpref", tmp_path / "tset"),
        *("-s", "de", "-t", "en", "--destdir", tmp_path / "d"),
    )
    assert outcome.code == 1 and "tset.de: no such file" in outcome.err
    assert "training" not in outcome.err
