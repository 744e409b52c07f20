"""The embedded corpus: the same everywhere, held-out sources held out, references complete."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parent.parent / "data" / "make_corpus.py"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    command = [sys.executable, SCRIPT, folder, "--train", "3000", "--valid", "200", "--test", "200"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def grammar() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_corpus", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_corpus"] = module
    spec.loader.exec_module(module)
    return module


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def test_the_same_text_everywhere(text: Path) -> None:
    """The results in the README are for this text, which must not change by accident."""
    names = sorted(path.name for path in text.iterdir())
    assert names == [
        "test.de", "test.en", "test.refs.tsv", "train.de", "train.en",
        "valid.de", "valid.en", "valid.refs.tsv",
    ]  # fmt: skip
    digest = hashlib.sha256(b"".join((text / name).read_bytes() for name in names)).hexdigest()
    assert digest[:16] == "377e25011274ca61"


def test_held_out_sources_are_not_in_train(text: Path) -> None:
    train, valid, test = ({*lines(text / f"{split}.de")} for split in ("train", "valid", "test"))
    assert not train & valid and not train & test and not valid & test


def test_references_hold_the_target_first_and_then_other_answers(text: Path) -> None:
    rows = [line.split("\t") for line in lines(text / "test.refs.tsv")]
    assert [row[0] for row in rows] == lines(text / "test.en")
    assert all(len({*row}) == len(row) for row in rows)
    assert sum(len(row) > 1 for row in rows) > len(rows) / 2  # most sources have several


def test_numbers_in_words(grammar: ModuleType) -> None:
    assert grammar.german(21) == "einundzwanzig" and grammar.german(30) == "dreißig"
    assert (
        grammar.german(716) == "siebenhundertsechzehn" and grammar.german(101) == "einhunderteins"
    )
    assert grammar.english(45) == ["forty-five"] and grammar.english(300) == ["three hundred"]
    assert grammar.english(716) == ["seven hundred and sixteen", "seven hundred sixteen"]
    assert grammar.ordinal(3) == ("dritte", "third") and grammar.ordinal(8) == ("achte", "eighth")
    assert grammar.ordinal(22) == ("zweiundzwanzigste", "twenty-second")
    assert len({grammar.german(n) for n in range(1000)}) == 1000
    assert len({answer for n in range(1000) for answer in grammar.english(n)}) == 100 + 9 + 9 * 198


def test_bad_arguments_are_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path, "--train", "0"], capture_output=True, text=True
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
