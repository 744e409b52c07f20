"""What several test files share: a small parallel corpus, and the command line."""

from __future__ import annotations

import io
import os
import random
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

from fastdiss_cli.__main__ import main

# models this small gain nothing from more threads, and lose much on a busy machine
torch.set_num_threads(1)

GERMAN = ["null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"]
ENGLISH = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SIZES = {"train": 200, "valid": 20, "test": 20}


def run_cli(*args: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run ``fastdiss ARGS`` within this process, which has torch already, its output captured."""
    out, err = io.StringIO(), io.StringIO()
    words = ["fastdiss", *map(str, args)]
    lines = io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8")
    before = sys.argv, sys.stdin
    sys.argv, sys.stdin = words, lines
    code = 0
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        sys.argv, sys.stdin = before
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def run_process(*args: str | Path) -> subprocess.CompletedProcess[str]:
    """Run ``fastdiss ARGS`` in a process of its own, its output captured as text."""
    return subprocess.run(
        [sys.executable, "-m", "fastdiss_cli", *map(str, args)],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def write_pairs(prefix: Path, count: int, seed: int | str = 1) -> None:
    """Write ``prefix.de`` and ``prefix.en``: numbers of one to eight digits, in words."""
    draw = random.Random(seed)
    numbers = [draw.choices(range(10), k=draw.randint(1, 8)) for _ in range(count)]
    for language, words in (("de", GERMAN), ("en", ENGLISH)):
        lines = [" ".join(words[digit] for digit in number) for number in numbers]
        Path(f"{prefix}.{language}").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with {train,valid,test}.{de,en}: 200, 20 and 20 pairs."""
    folder = tmp_path_factory.mktemp("corpus")
    for split, count in SIZES.items():
        write_pairs(folder / split, count, seed=split)
    return folder
