"""Shared by the tests: a small parallel corpus, and the command line."""

from __future__ import annotations

import io
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

from fastdiss_cli import logs
from fastdiss_cli.__main__ import main

# models this small gain nothing from more threads, and lose much on a busy machine
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
torch.set_num_threads(1)

# bitwise results hold on a CPU only; test_gpu.py alone sees GPUs, in its own processes
GPU_ENVIRONMENT = dict(os.environ)
os.environ["CUDA_VISIBLE_DEVICES"] = ""

# a shell that starts the tests in the background ignores it for them and all they start
signal.signal(signal.SIGINT, signal.default_int_handler)

GERMAN = ["null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"]
ENGLISH = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SIZES = {"train": 200, "valid": 20, "test": 20}


def run_cli(*args: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run ``fastdiss ARGS`` in this process, where torch is already imported; capture output."""
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


def run_process(
    *args: str | Path, environment: Mapping[str, str] = os.environ
) -> subprocess.CompletedProcess[str]:
    """Run ``fastdiss ARGS`` in a new process, and capture its output as text."""
    return subprocess.run(
        [sys.executable, "-m", "fastdiss_cli", *map(str, args)],
        capture_output=True,
        encoding="utf-8",
        env=environment,
    )


class Ranks:
    """``fastdiss ARGS`` in several processes, as with torchrun (but torch is already imported).

    Args:
        count: the number of processes.
        args: the command line.
        prepare: a module-level function, called in each rank with its number before the command.
    """

    def __init__(
        self, count: int, *args: str | Path, prepare: Callable[[int], None] | None = None
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["conftest", "fastdiss_cli.training.loop", "torch._dynamo"])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._pipes, self.processes = [], []
        for rank in range(count):
            receiver, sender = context.Pipe(duplex=False)
            given = (rank, count, port, args, sender, prepare)
            process = context.Process(target=_run_rank, args=given, daemon=True)
            process.start()
            sender.close()
            self._pipes.append(receiver)
            self.processes.append(process)

    def results(self) -> list[subprocess.CompletedProcess[str]]:
        """Wait for all processes and return their outputs, empty if one was killed."""
        done = []
        for receiver, process in zip(self._pipes, self.processes, strict=True):
            try:
                done.append(receiver.recv() if receiver.poll(120) else None)
            except EOFError:
                done.append(None)
            process.join(10)
            if done[-1] is None:
                process.kill()
                done[-1] = subprocess.CompletedProcess([], process.exitcode, "", "")
        return done


def _run_rank(rank: int, count: int, port: int, args: tuple, sender, prepare) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if prepare is not None:
        prepare(rank)
    sender.send(run_cli(*args))


def run_ranks(count: int, *args: str | Path, **more) -> list[subprocess.CompletedProcess[str]]:
    """Run ``fastdiss ARGS`` in several processes and return their outputs."""
    return Ranks(count, *args, **more).results()


def one_line_error(done: subprocess.CompletedProcess[str], *parts: str, code: int = 1) -> str:
    """Return the single error line of a command that failed; assert that it has the given parts.

    Args:
        code: the expected exit code; 2 is for usage errors.
    """
    assert done.returncode == code, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert line.startswith("fastdiss: error: ")
    for part in parts:
        assert part in line
    return line


@pytest.fixture(autouse=True)
def speaking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Log as the first rank; a test that is another one for a while leaves no silence."""
    monkeypatch.setattr(logs, "_quiet", False)


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


@pytest.fixture(scope="session")
def data_bin(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the corpus as a dataset of characters."""
    folder = tmp_path_factory.mktemp("data") / "bin"
    done = run_cli(
        "preprocess", "-s", "de", "-t", "en", "--destdir", folder, "--model-type", "char",
        *(f"--{split}pref={corpus / split}" for split in SIZES),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder
