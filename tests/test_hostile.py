"""Hostile text, names and recipes in all four commands: no crash, and no shifted line."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import run_cli, run_process
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fastdiss_cli.config import parse_settings, read_recipe
from fastdiss_cli.data.binarized import BinarizedDataset
from fastdiss_cli.decoding.output import format_lines
from fastdiss_cli.decoding.systems import read_system
from fastdiss_cli.errors import FastdissError
from fastdiss_cli.models.registry import Hypothesis

NETWORK = {"model_dim": 8, "ffn_dim": 8, "heads": 2, "encoder_layers": 1, "decoder_layers": 1}
TINY = ["--arch", "fastdiss_tiny", "--max-update", "2", "--set=model.latent_dim=4"]
TINY += [f"--set=model.{key}={value}" for key, value in NETWORK.items()]
TINY += ["--set=train.valid_sentences=5", "--set=train.max_positions=200"]
LONG = ("Donaudampfschifffahrts " * 5000)[:100_000]  # 4,348 words
HOSTILE = [
    "",
    " ",
    "eins zwei",
    "\t",
    "a\tb\tc",
    "\0",
    "nul\0nul\0",
    "".join(map(chr, range(1, 10))) + "".join(map(chr, range(11, 32))) + "\x7f",
    "eins\u2028zwei\u2029drei",
    "\x85",
    "eins\x85",
    "\x0b\x0c\x1c\x1d\x1e",
    "eins\rzwei",
    "\rdrei",
    "👩‍👩‍👧‍👦 🇩🇪 😀",
    "שלום עולם \u202emirror\u202c",
    "e\u0301\u0301\u0301\u0301",
    "\ufeffmarked",
    "\ufffe\uffff\U0010ffff",
    "\u2581eins\u2581",
    "█▓▒░ ⛄ 龘",
    "D-0\t0.0\tnot an answer",
    "S-3\tnot a source",
    "<s> </s> <pad> <unk> <0x0A>",
    "[bold]:dog:[/bold] %s {} \\n \x1b[31mred",
    "x" * 3_000,
    "  leading and trailing  ",
]
TARGETS = [*HOSTILE[1:], HOSTILE[0]]


def lines_of(output: str, kind: str) -> list[list[str]]:
    rows = [line.split("\t", 2) for line in output.split("\n")]
    return [row for row in rows if row[0].startswith(f"{kind}-") and row[0][2:].isdecimal()]


def write_sides(
    prefix: Path, source: Sequence[str], target: Sequence[str], end: str = "\n"
) -> None:
    for language, lines in (("de", source), ("en", target)):
        Path(f"{prefix}.{language}").write_bytes("".join(f"{line}{end}" for line in lines).encode())


def ran(*args: str | Path, stdin: str = "") -> Any:
    done = run_cli(*args, stdin=stdin)
    assert done.returncode == 0, done.stderr
    return done


def one_line_error(*args: str | Path, code: int = 1) -> str:
    done = run_cli(*args)
    assert done.returncode == code and "Traceback" not in done.stderr, (
        done.returncode,
        done.stderr,
    )
    line = done.stderr.splitlines()[-1]
    assert line.startswith("fastdiss: error: ") and done.stderr.count("rror: ") == 1
    return line


def preprocess(folder: Path, destdir: Path, *more: str | Path) -> Any:
    prefs = [f"--{split}pref={folder / split}" for split in ("train", "valid", "test")]
    return ran("preprocess", "-s", "de", "-t", "en", *prefs, "--destdir", destdir, *more)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a hostile corpus; target lines are source lines in another order."""
    folder = tmp_path_factory.mktemp("räume und Wörter 漢字")
    for split, lines in (("train", HOSTILE * 3), ("valid", HOSTILE[:12]), ("test", HOSTILE)):
        write_sides(folder / split, lines, [*lines[1:], lines[0]])
    return folder


@pytest.fixture(scope="module", params=["unigram", "word"])
def data_bin(request: pytest.FixtureRequest, text: Path) -> Path:
    folder = text / f"Daten {request.param} ö"
    done = preprocess(text, folder, "--vocab-size", "400", "--model-type", request.param)
    empty = [not (a.strip() and b.strip()) for a, b in zip(HOSTILE, TARGETS, strict=True)]
    assert f"test: {len(HOSTILE)} pairs" in done.stderr
    assert f"test: {sum(empty)} pairs with an empty side" in done.stderr
    assert "test: decoding changes 1 source and 1 target: U+2581" in done.stderr
    return folder


@pytest.fixture(scope="module")
def checkpoint(data_bin: Path) -> Path:
    save_dir = data_bin.with_name(f"Modelle {data_bin.name}")
    ran("train", data_bin, "--save-dir", save_dir, *TINY)
    return save_dir / "checkpoint_last.safetensors"


def stored(line: str) -> str:
    """Return the text that a line is stored as: U+2581 is lost."""
    return line.replace("\u2581", " ")


def test_what_is_stored_decodes_to_the_text(data_bin: Path) -> None:
    dataset = BinarizedDataset(data_bin, verify=True)
    for side, lines in (("src", HOSTILE), ("tgt", TARGETS)):
        tokenizer = dataset.src_tokenizer if side == "src" else dataset.tgt_tokenizer
        found = [tokenizer.decode(ids.tolist()) for ids in dataset["test"][side]]
        assert found == [stored(line) for line in lines]


def test_no_line_shifts_from_a_dataset(data_bin: Path, checkpoint: Path) -> None:
    results = data_bin.with_name(f"Ergebnisse {data_bin.name} é")
    ran("generate", data_bin, "--path", checkpoint, "--steps", "1", "--results-path", results)
    path = results / "generate-test.txt"
    output = path.read_bytes().decode()
    numbers = [f"{number}" for number in range(len(HOSTILE))]
    for kind in "STHDPI":
        assert [row[0][2:] for row in lines_of(output, kind)] == numbers
    assert ["\t".join(row[1:]) for row in lines_of(output, "S")] == [*map(stored, HOSTILE)]
    scored = ran("score", "--sys", path, "--json", "--metrics", "bleu,chrf")
    assert len(json.loads(scored.stdout)) == 2
    found = read_system(path)
    assert len(found.hypotheses) == len(HOSTILE)
    references = [stored(line).removesuffix("\r") for line in TARGETS]
    assert found.references == references


@pytest.mark.parametrize("way", ["file", "stdin"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_no_line_shifts_from_raw_text(checkpoint: Path, tmp_path: Path, way: str, end: str) -> None:
    text = "".join(f"{line}{end}" for line in HOSTILE)
    path = tmp_path / "Eingabe mit Lücke.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    source, given = (path, "") if way == "file" else ("-", "\ufeff" + text)
    done = ran("generate", "--path", checkpoint, "--steps", "1", "--input", source, stdin=given)
    for kind in "SHDPI":
        numbers = [row[0][2:] for row in lines_of(done.stdout, kind)]
        assert numbers == [f"{number}" for number in range(len(HOSTILE))]
    sources = ["" if line.isspace() else stored(line) for line in HOSTILE]
    assert ["\t".join(row[1:]) for row in lines_of(done.stdout, "S")] == sources


@settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    lines=st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n"), max_size=20),
        min_size=1,
        max_size=8,
    )
)
@example(lines=["D-0\t1\tx", "D-0\t1\tx"])
@example(lines=["\r"])
def test_any_text_gives_a_line_for_a_line(
    data_bin: Path, checkpoint: Path, lines: list[str]
) -> None:
    if "word" in data_bin.name:
        pytest.skip("one tokenizer is enough")
    text = "".join(f"{line}\n" for line in lines)
    done = ran(
        "generate",
        "--path",
        checkpoint,
        "--steps",
        "1",
        "--input",
        "-",
        "--buffer-size",
        "3",
        stdin=text,
    )
    assert [row[0] for row in lines_of(done.stdout, "D")] == [f"D-{i}" for i in range(len(lines))]
    expected = [stored(line).removesuffix("\r") for line in lines]
    expected[0] = expected[0].removeprefix("\ufeff")
    assert ["\t".join(row[1:]) for row in lines_of(done.stdout, "S")] == expected


@pytest.mark.slow
def test_a_line_of_100_000_characters(tmp_path: Path) -> None:
    """It is stored, left out of training with a warning, and translated."""
    for split in ("train", "valid", "test"):
        short = LONG[:46]  # long lines are left out when a tokenizer is trained
        write_sides(tmp_path / split, [short, LONG, "zwei"], ["one", LONG, "two"])
    made = preprocess(tmp_path, tmp_path / "d", "--model-type", "word")
    dataset = BinarizedDataset(tmp_path / "d")
    assert f"longest {dataset['train']['src'].sizes.max():,} and" in made.stderr
    assert dataset.src_tokenizer.decode(dataset["train"]["src"][1].tolist()) == LONG
    trained = ran("train", tmp_path / "d", "--save-dir", tmp_path / "c", *TINY)
    assert "train: 1 of 3 sentence pairs are longer" in trained.stderr
    path = tmp_path / "c" / "checkpoint_last.safetensors"
    done = ran("generate", tmp_path / "d", "--path", path, "--steps", "1")
    assert [row[1] for row in lines_of(done.stdout, "S")] == [short, LONG, "zwei"]
    assert [row[0] for row in lines_of(done.stdout, "D")] == ["D-0", "D-1", "D-2"]


def test_a_corpus_of_one_line(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        write_sides(tmp_path / split, ["eins"], ["one"])
    preprocess(tmp_path, tmp_path / "d", "--vocab-size", "270")
    ran("train", tmp_path / "d", "--save-dir", tmp_path / "c", *TINY)
    path = tmp_path / "c" / "checkpoint_best.safetensors"
    done = ran("generate", tmp_path / "d", "--path", path, "--steps", "1")
    assert len(lines_of(done.stdout, "D")) == 1
    unknown = ran("generate", "--path", path, "--steps", "1", "--input", "-", stdin="漢字\n")
    assert [row[1] for row in lines_of(unknown.stdout, "S")] == ["漢字"]


def test_a_sentence_of_unknown_characters_with_a_foreign_tokenizer(tmp_path: Path) -> None:
    """Without byte fallback, unknown characters are counted and reported, and kept."""
    from sentencepiece import SentencePieceTrainer

    SentencePieceTrainer.train(
        sentence_iterator=iter(["eins zwei drei"] * 9), model_prefix=str(tmp_path / "spm"),
        vocab_size=20, hard_vocab_limit=False, minloglevel=3,
    )  # fmt: skip
    for split in ("train", "valid", "test"):
        write_sides(tmp_path / split, ["漢字", "eins", "😀"], ["one", "漢", ""])
    done = preprocess(tmp_path, tmp_path / "d", "--tokenizer", tmp_path / "spm.model")
    assert "test: decoding changes 2 sources and 2 targets: " in done.stderr
    manifest = BinarizedDataset(tmp_path / "d", verify=True).manifest
    assert manifest.splits["test"]["src"].unknown >= 2
    assert [manifest.splits["test"][side].altered for side in ("src", "tgt")] == [2, 2]
    ran("train", tmp_path / "d", "--save-dir", tmp_path / "c", *TINY)
    path = tmp_path / "c" / "checkpoint_last.safetensors"
    done = ran("generate", tmp_path / "d", "--path", path)
    assert len(lines_of(done.stdout, "D")) == 3
    told = "the tokenizer has changed 2 of 3 references (as T- lines show), and BLEU is of these"
    assert told in done.stderr
    given = ran("generate", tmp_path / "d", "--path", path, "--ref", tmp_path / "test.en")
    assert "the tokenizer has changed" not in given.stderr


@pytest.mark.parametrize(
    "bad",
    [b"\xff", b"gut\n\xe4", b"\xed\xa0\x80", b"\xf0\x9f", b"\xc0\x80", b"\xf4\x90\x80\x80"],
    ids=repr,
)
def test_bad_utf8_is_one_line_in_every_command(
    checkpoint: Path, tmp_path: Path, bad: bytes
) -> None:
    number = bad.count(b"\n") + 1
    for name in ("x.de", "x.en"):
        (tmp_path / name).write_bytes(bad + b"\n")
    message = f"line {number} is not valid UTF-8"
    into = ("--trainpref", tmp_path / "x", "--destdir", tmp_path / "d", "--vocab-size", "300")
    assert message in one_line_error("preprocess", "-s", "de", "-t", "en", *into)
    assert message in one_line_error("generate", "--path", checkpoint, "--input", tmp_path / "x.de")
    assert message in one_line_error(
        "score", "--sys", tmp_path / "x.de", "--ref", tmp_path / "x.en"
    )


def test_score_of_hostile_text_is_that_of_its_lines(tmp_path: Path) -> None:
    """All lines but the first are equal, whatever they contain."""
    lines = ["first of all", *HOSTILE]
    path = tmp_path / "Antworten ä.txt"
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())
    found = read_system(path)
    assert found.hypotheses == [line.removesuffix("\r") for line in lines]
    scores = json.loads(ran("score", "--sys", path, "--ref", path, "--json").stdout)
    assert [round(row["score"]) for row in scores] == [100, 100, 0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("D-999999999999\t0\tx\n", "no D-0 line"),
        (f"D-{'9' * 5000}\t0\tx\n", None),
        ("D-0\t0\tx\nD-2\t0\tx\n", "no D-1 line"),
        ("D-0\t0\tx\nD-1\t0\tx\nD-0\t0\tx\n", "D-0 appears twice"),
        ("plain\nD-0\t0\tx\nD-0\t0\tx\n", None),
        ("D-٣\t0\tx\n", None),
    ],
    ids=["far", "farther", "gap", "twice", "plain", "digits"],
)
def test_what_looks_like_a_generate_file(tmp_path: Path, content: str, message: str | None) -> None:
    path = tmp_path / "x"
    path.write_text(content, encoding="utf-8")
    if message is None:
        assert read_system(path).hypotheses == content.split("\n")[:-1]
    else:
        assert message in one_line_error("score", "--sys", path, "--ref", path)


def test_a_line_break_that_a_model_writes_shifts_no_line(data_bin: Path) -> None:
    """The bytes of every control character are pieces of the vocabulary."""
    tokenizer = BinarizedDataset(data_bin).tgt_tokenizer
    tokens = tokenizer.encode("a\nb\n\n\rc\n")[:-1]
    hypothesis = Hypothesis(tokens, 0.0, [0.0] * len(tokens), 1)
    lines = format_lines(0, "eins\nzwei", hypothesis, tokenizer, "one\ntwo").split("\n")
    assert [line[:4] for line in lines] == [f"{kind}-0\t" for kind in "STHDPI"] + [""]
    assert lines[3] == "D-0\t0.0000\ta b  \rc "


# names


@pytest.mark.parametrize("name", ["two\nlines", ":dog: [red]", "\x1b[31m"])
def test_a_name_is_reported_unchanged_in_one_line(tmp_path: Path, name: str) -> None:
    line = one_line_error("score", "--sys", tmp_path / name, "--ref", "x")
    assert ":dog: [red]" in line if "dog" in name else "x" not in name


def test_names_that_are_not_text(tmp_path: Path) -> None:
    """File names are bytes, which may be invalid UTF-8."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    write_sides(folder / "train", ["eins zwei", "drei"], ["one two", "three"])
    done = run_process(
        "preprocess", "-s", "de", "-t", "en", "--trainpref", folder / "train",
        "--destdir", folder / "d", "--vocab-size", "300", "--verify",
    )  # fmt: skip
    assert done.returncode == 0 and "2 sentence pairs intact" in done.stderr, done.stderr
    assert BinarizedDataset(folder / "d").manifest.made_with["prefixes"]["train"] == str(
        folder / "train"
    )
    missing = run_process("score", "--sys", folder / "none", "--ref", folder / "none")
    assert missing.returncode == 1 and "caf\\udce9/none" in missing.stderr, missing.stderr


# recipes


def test_a_recipe_is_data(data_bin: Path, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    calls = [
        f"!!python/object/apply:os.system ['touch {mark}']",
        f"!!python/object/apply:subprocess.check_output [[touch, {mark}]]",
        f"!!python/object/new:os.mkdir ['{mark}']",
        f"!!python/object/apply:builtins.open ['{mark}', 'w']",
        "!!python/name:os.system ''",
    ]
    train = ["train", data_bin, "--save-dir", tmp_path / "c"]
    for call in calls:
        recipe = tmp_path / "Rezept ü.yaml"
        for text in (call, f"train: {{seed: {call}}}", f"model:\n  {call}: 1\n"):
            recipe.write_text(text, encoding="utf-8")
            assert "is not a valid recipe" in one_line_error(*train, "--config", recipe)
        assert "cannot read the value" in one_line_error(*train, f"--set=train.seed={call}", code=2)
    assert not mark.exists() and not (tmp_path / "c").exists()


ALIASES = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 8)}]\n"
    for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    "value",
    ["2001-99-99", "!!int x", "!!float x", "!!bool x", "!!timestamp x", "9" * 5000, "0x_",
     "[" * 1000, "{[a]: b}", "\0", "&a [*a]", "!!binary é", "{<<: x}"],
    ids=lambda value: repr(value[:12]),
)  # fmt: skip
def test_yaml_of_every_kind_is_one_line(tmp_path: Path, value: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"train: {{seed: {value}}}", encoding="utf-8")
    for parse in (lambda: read_recipe(recipe), lambda: parse_settings([f"train.seed={value}"])):
        try:
            parse()
        except FastdissError as error:
            assert "\n" not in str(error)


def test_aliases_of_aliases_are_not_written_out(data_bin: Path, tmp_path: Path) -> None:
    """A kilobyte of YAML that stands for a billion words."""
    recipe = tmp_path / "recipe.yaml"
    indented = "".join(f"  {line}\n" for line in ALIASES.splitlines())
    recipe.write_text(f"train:\n  seed: *j\nmodel:\n{indented}".replace("seed: *j", "lr: 1"))
    message = one_line_error("train", data_bin, "--config", recipe)
    assert f"{recipe}: model.a is not an option of" in message
    eight = ", ".join(["*{0}"] * 8)
    nested = (
        "[&a [x, x], "
        + ", ".join(f"&{new} [{eight.format(old)}]" for old, new in ("ab", "bc", "cd"))
        + "]"
    )
    line = one_line_error("train", data_bin, f"--set=train.lr={nested}", code=2)
    assert "train.lr must be a number" in line and len(line) < 500
    text = ALIASES.replace("j: &j ", "train:\n  lr: ")
    recipe.write_text(text.replace("a: &a", "model:\n  dropout: &a", 1))
    assert "error" in one_line_error("train", data_bin, "--config", recipe)
