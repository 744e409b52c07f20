"""What several test files share: a small parallel corpus, and the command line."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

GERMAN = ["null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"]
ENGLISH = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SIZES = {"train": 200, "valid": 20, "test": 20}


def run_cli(*args: str | Path) -> subprocess.CompletedProcess[str]:
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
