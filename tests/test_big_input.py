"""Memory does not grow with the input: preprocess, generate, and opening a dataset."""

from __future__ import annotations

import os
import select
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ENGLISH, GERMAN, run_cli

from fastdiss_cli.data.sentencepiece import train_tokenizer

NETWORK = {"model_dim": 8, "ffn_dim": 8, "heads": 2, "encoder_layers": 1, "decoder_layers": 1}
FEW, MANY = 200_000, 2_000_000  # lines for preprocess
SLACK = 5_000  # kilobytes; 1,800,000 pairs with 12 bytes a side in the index would be 43,000
COUNTER = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print("PEAK", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
sys.exit(code)
"""


def peak_of(*args: str | Path, stdout: int = subprocess.DEVNULL) -> int:
    """Run ``fastdiss ARGS``; return the peak memory, in kilobytes, of it or of a worker."""
    done = subprocess.run(
        [sys.executable, "-c", COUNTER, sys.executable, "-m", "fastdiss_cli", *map(str, args)],
        stdout=stdout,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    return int(done.stderr.split()[-1])


def write_lines(path: Path, words: list[str], count: int) -> None:
    """Write lines of two to four words, which repeat every thousand lines."""
    lines = [" ".join(words[int(digit)] for digit in f"{i % 1000:02d}") for i in range(1000)]
    block = "".join(f"{line}\n" for line in lines).encode()
    with open(path, "wb") as file:
        for _ in range(count // 1000):
            file.write(block)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_preprocess_in_flat_memory(tmp_path: Path, workers: int) -> None:
    """From 200,000 lines to two million, the largest process does not grow.

    It is the main process, which reads and writes; with one worker, also the only one.
    """
    (tmp_path / "spm").write_bytes(train_tokenizer([*GERMAN, *ENGLISH], "word", 300).model)
    peaks = []
    for count in (FEW, MANY):
        for language, words in (("de", GERMAN), ("en", ENGLISH)):
            write_lines(tmp_path / f"x.{language}", words, count)
        peaks.append(peak_of(
            "preprocess", "-s", "de", "-t", "en", "--trainpref", tmp_path / "x",
            "--tokenizer", tmp_path / "spm", "--destdir", tmp_path / "d", "--workers", str(workers),
        ))  # fmt: skip
    print(f"peak: {peaks[0]:,} and {peaks[1]:,} kB")
    assert peaks[1] - peaks[0] < SLACK


@pytest.fixture(scope="module")
def checkpoint(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    data = [f"--{split}pref={corpus / split}" for split in ("train", "valid")]
    preprocess = ("preprocess", "-s", "de", "-t", "en", *data, "--model-type", "word")
    assert run_cli(*preprocess, "--destdir", folder / "d").returncode == 0
    done = run_cli(
        "train", folder / "d", "--arch", "fastdiss_tiny", "--save-dir", folder, "--max-update",
        "1", "--set=train.valid_sentences=0", "--set=model.latent_dim=4",
        *(f"--set=model.{key}={value}" for key, value in NETWORK.items()),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "checkpoint_last.safetensors"


@pytest.mark.slow
def test_generate_in_flat_memory(checkpoint: Path, tmp_path: Path) -> None:
    """From 4,000 lines to 16,000, decoded 1,000 at a time."""
    peaks = []
    for count in (4_000, 16_000):
        write_lines(tmp_path / "x", GERMAN, count)
        peaks.append(peak_of(
            "generate", "--path", checkpoint, "--steps", "1", "--input", tmp_path / "x",
            "--buffer-size", "1000", "--results-path", tmp_path,
        ))  # fmt: skip
    print(f"peak: {peaks[0]:,} and {peaks[1]:,} kB")
    assert (tmp_path / "generate-x.txt").read_text("utf-8").count("\nD-") == 16_000
    # -4,000 to 50,000 more were measured, as glibc takes 64,000 at a time (`keep_freed_memory`);
    # with --buffer-size 16000 it is 143,000 more
    assert peaks[1] - peaks[0] < 96_000


def test_a_line_in_is_a_line_out(checkpoint: Path) -> None:
    """An answer comes while stdin is still open."""
    command = [sys.executable, "-m", "fastdiss_cli", "generate", "--path", str(checkpoint)]
    with subprocess.Popen(
        [*command, "--steps", "1", "--input", "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"},
    ) as process:
        for number, line in enumerate(["drei vier", "", "neun"]):
            process.stdin.write(f"{line}\n".encode())
            process.stdin.flush()
            output = b""
            while f"I-{number}\t".encode() not in output:
                ready, _, _ = select.select([process.stdout], [], [], 120)
                assert ready, "no answer while stdin is open"
                output += os.read(process.stdout.fileno(), 1 << 16)
            assert output.startswith(f"S-{number}\t{line}\n".encode())
        process.stdin.close()
        assert b"3 sentences" in process.stdout.read()
    assert process.returncode == 0


OPEN = """
import resource, sys
from pathlib import Path
from fastdiss_cli.data.dataset import TokenFile
from fastdiss_cli.errors import FastdissError
before = resource.getrusage(resource.RUSAGE_SELF)
file = TokenFile(Path(sys.argv[1]))
print(len(file), file[0].tolist(), file[-1][-2:].tolist(), sep="|", end="|")
after = resource.getrusage(resource.RUSAGE_SELF)
print(after.ru_maxrss - before.ru_maxrss, end="|")
try:
    file.sizes
except FastdissError as error:
    print(error)
"""


def test_opening_reads_the_ends_only(tmp_path: Path) -> None:
    """Sixty megabytes of index and eight gigabytes of tokens, of which only the ends are read.

    The rest is sparse zeros, which are invalid in an index, so that reading it would be noticed
    twice.
    """
    sentences, first, last = 5_000_000, 3, 2**31 - 1
    size = 2**33
    with open(tmp_path / "x.idx", "wb") as file:
        file.write(struct.pack("<9sQBQi", b"MMIDIDX\0\0", 1, 8, sentences, first))
        file.seek(26 + 4 * (sentences - 1))
        file.write(struct.pack("<i2q", last, 0, 2 * first))
        file.seek(26 + 12 * sentences - 8)
        file.write(struct.pack("<q", size - 2 * last))
    with open(tmp_path / "x.bin", "wb") as file:
        file.write(struct.pack("<3H", 7, 8, 9))
        file.seek(size - 2)
        file.write(struct.pack("<H", 5))
    if sum(path.stat().st_blocks for path in tmp_path.iterdir()) > 10_000:
        pytest.skip("a file system without sparse files")
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(tmp_path / "x")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    count, head, tail, grown, message = done.stdout.split("|")
    assert (int(count), head, tail) == (sentences, "[7, 8, 9]", "[0, 5]")
    assert int(grown) < 2_000  # kilobytes
    assert "sizes and offsets do not match" in message
