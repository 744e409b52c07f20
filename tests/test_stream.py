"""generate --input -: a line in, a line out, at once and in order; waiting lines in batches."""

from __future__ import annotations

import io
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import run_cli
from runs import command

from fastdiss_cli import logs
from fastdiss_cli.data.text import IncomingLines
from fastdiss_cli.decoding import translation
from fastdiss_cli.decoding.translation import text_input
from fastdiss_cli.models.difformer import Difformer

WORDS = ["null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"]
LINES = [f"{a} {b}" for a in WORDS for b in WORDS]


@pytest.fixture(scope="module")
def checkpoint(data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    done = run_cli(*command(data_bin, folder, max_update=30, lr=1e-2, valid_sentences=0))
    assert done.returncode == 0, done.stderr
    return folder / "checkpoint_last.safetensors"


class Blocks(io.RawIOBase):
    """A pipe whose writer has written one more block at each read."""

    def __init__(self, blocks: list[bytes]) -> None:
        self._blocks = iter(blocks)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:
        block = next(self._blocks, b"")
        buffer[: len(block)] = block
        return len(block)


def coming(*blocks: bytes) -> IncomingLines:
    return IncomingLines(io.BufferedReader(Blocks(list(blocks))))


def test_lines_are_given_as_soon_as_they_are_there() -> None:
    lines = coming(b"one\ntwo\nthr", b"ee", b"\n\nf", b"our")
    found = [(line, lines.waiting) for line in lines]
    assert found == [(b"one", 1), (b"two", 0), (b"three", 1), (b"", 0), (b"four", 0)]
    assert list(coming()) == [] and list(coming(b"\n")) == [b""]
    assert list(coming(b"a\r\nb\n")) == [b"a\r", b"b"]


def test_what_waits_is_decoded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows double while lines wait; after a pause a line is answered alone again."""

    class Letters:
        unk = 0

        def encode_source(self, line: str) -> list[int]:
            return [ord(line)]

    blocks = [b"".join(b"%c\n" % letter for letter in b"abcdefghij"), b"k\n", b"l\nm\nn\n"]
    stdin = io.TextIOWrapper(io.BufferedReader(Blocks(blocks)))
    monkeypatch.setattr(sys, "stdin", stdin)
    monkeypatch.setattr(translation, "WINDOW", 3)
    windows = text_input("-", Letters(), 0).windows
    shown = ["".join(chr(ids[0]) for ids, _ in window) for window in windows]
    assert shown == ["a", "bc", "def", "ghi", "j", "k", "lm", "n"]


def answers(out: str, kind: str = "D") -> list[str]:
    return [line.split("\t")[2] for line in out.splitlines() if line.startswith(f"{kind}-")]


def test_many_lines_take_few_batches(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    right = Difformer.decode

    def counted(self, memory, sentences, *more):
        sizes.append(len(sentences))
        return right(self, memory, sentences, *more)

    monkeypatch.setattr(Difformer, "decode", counted)
    text = "\n".join(LINES) + "\n"
    (tmp_path / "lines").write_text(text, encoding="utf-8")
    more = ["generate", "--path", checkpoint, "--steps=2", "--device=cpu", "--input"]
    done = run_cli(*more, "-", stdin=text)
    assert sizes == [1, 2, 4, 8, 16, 32, 37]
    assert answers(done.stdout) == answers(run_cli(*more, tmp_path / "lines").stdout)
    assert done.stdout.splitlines()[-1] == done.stderr.splitlines()[-1]
    assert "100 sentences in" in done.stderr and "sentences/s" in done.stderr


def test_plain_is_a_line_for_a_line(data_bin: Path, checkpoint: Path, tmp_path: Path) -> None:
    more = ["generate", "--path", checkpoint, "--device=cpu", "--steps=2"]
    lines = [*LINES[:5], "", "drei\x85vier"]
    text = "\n".join(lines) + "\n"
    expected = answers(run_cli(*more, "--input=-", stdin=text).stdout)
    plain = run_cli(*more, "--input=-", "--plain", stdin=text)
    assert plain.stdout.split("\n") == [*expected, ""] and len(expected) == 7
    assert plain.stderr.splitlines()[-1].startswith("Generate input with fastdiss_tiny")

    done = run_cli(*more, data_bin, "--plain", "--results-path", tmp_path, "--steps=1,2")
    assert done.stdout.startswith("steps")  # the table
    whole = run_cli(*more, data_bin)
    written = (tmp_path / "generate-test.steps2.txt").read_text(encoding="utf-8")
    assert written.split("\n") == [*answers(whole.stdout), ""]
    assert run_cli(*more, data_bin, "--plain", "--print-history").returncode == 2


def test_a_stream_writes_no_progress_to_a_log(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe that nobody reads would fill up in some hours, and stop the answers."""
    monkeypatch.setattr(logs, "PLAIN_EVERY", 0.0)
    (tmp_path / "text").write_text("eins\nzwei\n")
    more = ["generate", "--path", checkpoint, "--device=cpu", "--steps=1", "--plain", "--input"]
    assert "generating 2/2 (100 %)" in run_cli(*more, tmp_path / "text").stderr
    done = run_cli(*more, "-", stdin="eins\nzwei\n")
    assert done.returncode == 0 and "generating" not in done.stderr


def test_an_invalid_line_ends_what_comes_after_it(piped: subprocess.Popen[bytes]) -> None:
    output, message = piped.communicate(b"eins\nzwei\n\xff\ndrei\n")
    assert piped.returncode == 1 and output.count(b"\n") == 2
    assert b"stdin: line 3 is not valid UTF-8" in message.splitlines()[-1]


def test_a_line_that_would_take_hours_ends_what_comes_after_it(
    piped: subprocess.Popen[bytes],
) -> None:
    output, message = piped.communicate(b"eins\n" + b"eins " * 10_001 + b"\ndrei\n")
    assert piped.returncode == 1 and output.count(b"\n") == 1
    assert b"stdin: line 2 has 50,007 tokens, and at most 10,000 are" in message.splitlines()[-1]


@pytest.fixture
def piped(checkpoint: Path) -> Iterator[subprocess.Popen[bytes]]:
    args = ["generate", "--path", str(checkpoint), "--steps=1", "--input=-", "--plain"]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    with subprocess.Popen(
        [sys.executable, "-m", "fastdiss_cli", *args, "--device=cpu"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=env,
    ) as process:
        yield process
        process.kill()


def read(process: subprocess.Popen[bytes], lines: int) -> list[str]:
    """Wait for ``count`` lines; nothing may follow them."""
    output = b""
    while output.count(b"\n") < lines:
        assert select.select([process.stdout], [], [], 60)[0], "no answer while stdin is open"
        output += os.read(process.stdout.fileno(), 1 << 16)
    assert output.endswith(b"\n") and output.count(b"\n") == lines
    return output.decode().splitlines()


def test_an_answer_comes_before_the_next_line(
    checkpoint: Path, piped: subprocess.Popen[bytes]
) -> None:
    """Single lines, a line that comes in two pieces, and many lines at once."""

    def write(text: str) -> None:
        piped.stdin.write(text.encode())
        piped.stdin.flush()

    found = []
    for line in LINES[:3]:
        write(line + "\n")
        found += read(piped, 1)
    write(LINES[3][:2])
    assert not select.select([piped.stdout], [], [], 0.3)[0]
    write(LINES[3][2:] + "\n")
    found += read(piped, 1)
    write("\n".join(LINES[4:60]) + "\n")
    found += read(piped, 56)
    output, message = piped.communicate(LINES[60].encode())  # without an end of line
    found += output.decode().splitlines()
    more = ["generate", "--path", checkpoint, "--steps=1", "--device=cpu", "--input=-"]
    assert found == answers(run_cli(*more, stdin="\n".join(LINES[:61])).stdout)
    assert piped.returncode == 0 and b"61 sentences in" in message.splitlines()[-1]


def test_a_pipe_that_does_not_block_is_not_at_its_end(checkpoint: Path) -> None:
    """As an earlier program may leave it."""
    line = [sys.executable, "-m", "fastdiss_cli", "generate", "--path", checkpoint, "--input", "-"]
    end, start = os.pipe()
    os.set_blocking(end, False)
    with (
        os.fdopen(start, "w", encoding="utf-8") as pipe,
        subprocess.Popen([*line, "--plain"], stdin=end, stdout=subprocess.PIPE) as process,
    ):
        os.close(end)
        for word in ("drei", "vier"):
            print(word, file=pipe, flush=True)
            assert process.stdout.readline().strip()
        pipe.close()
        assert process.wait(60) == 0 and not process.stdout.read()


def test_a_reader_that_stops_ends_it_silently(checkpoint: Path) -> None:
    line = [sys.executable, "-m", "fastdiss_cli", "generate", "--path", checkpoint, "--input", "-"]
    with subprocess.Popen(
        [*line, "--plain", "--device=cpu"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdin.write("drei vier\n")
        process.stdin.flush()
        assert process.stdout.readline().strip()
        process.stdout.close()
        process.stdin.write("fünf\n")
        process.stdin.flush()
        assert process.wait(60) == 141
        assert len(process.stderr.read().splitlines()) == 1  # what it began to do
