"""Shell completion: the script that it installs, and that it does not wait for torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastdiss_cli.models.registry import architectures

# what a shell does on Tab; the last word is the one to complete
BASH = """
eval "$(fastdiss --show-completion bash)"
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
_fastdiss_completion fastdiss
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def fastdiss(tmp_path: Path) -> Path:
    """Return a folder with the command `fastdiss`, to which importing torch is fatal."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch is imported')")
    path = f"{tmp_path}:{Path(__file__).parents[1]}"
    script = f'#!/bin/sh\nPYTHONPATH="{path}" exec "{sys.executable}" -m fastdiss_cli "$@"'
    (tmp_path / "fastdiss").write_text(script)
    (tmp_path / "fastdiss").chmod(0o755)
    return tmp_path


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not here")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fastdiss", "ex"], ["export"]),
        (["fastdiss", "train", "--arch", "fastdiss_s"], ["fastdiss_small"]),
        (["fastdiss", "train", "--arch", ""], sorted(architectures())),
        (["fastdiss", "models", "transformer_t"], ["transformer_tiny"]),
        (["fastdiss", "generate", "--noise"], ["--noise-beam"]),
        (["fastdiss", "generate", "--solver", "dd"], ["ddim", "ddpm"]),
        (["fastdiss", "preprocess", "--model-type", "u"], ["unigram"]),
    ],
)
def test_bash_completes(fastdiss: Path, words: list[str], expected: list[str]) -> None:
    env = {**os.environ, "PATH": f"{fastdiss}:{os.environ['PATH']}"}
    # so that the shell is the one named above, whichever shell runs the tests
    env["_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION"] = "1"
    done = subprocess.run(
        ["bash", "-c", BASH, "bash", *words], env=env, capture_output=True, text=True
    )
    assert sorted(done.stdout.split()) == expected, done.stderr
