"""Read raw text: one sentence per line, parallel files, JSON lines or TSV, plain or gzipped."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from glob import escape
from io import BufferedReader
from itertools import chain, islice, zip_longest
from operator import itemgetter
from pathlib import Path
from typing import IO, Any

from fastdiss_cli.errors import FastdissError

FORMATS = ("text", "jsonl", "tsv")
_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can write them, UTF-8 cannot


def read_lines(path: Path) -> Iterator[str]:
    r"""Yield the lines of a UTF-8 file, split on ``\n`` only.

    A byte order mark at the start and one carriage return at the end of a line (Windows line
    ends) are not part of the text.

    Raises:
        FastdissError: the file cannot be read, or a line is not UTF-8.
    """
    with _open(path) as file:
        yield from decode_lines(file, str(path))


def count_lines(path: Path) -> int:
    """Return how many lines `read_lines` yields; the file must be readable more than once.

    Raises:
        FastdissError: the file cannot be read.
    """
    count, last = 0, b"\n"
    with _open(path) as file:
        while block := file.read(1 << 20):
            count, last = count + block.count(b"\n"), block[-1:]
    return count + (last != b"\n")


def decode_lines(lines: Iterable[bytes], name: str) -> Iterator[str]:
    """Yield the text of raw lines, such as an open binary file; see `read_lines`."""
    try:
        for number, line in enumerate(lines, start=1):
            yield from _decode(line, name, number)
    except OSError as error:
        if error.errno:
            error.filename = name
        raise


class IncomingLines(Iterator[bytes]):
    r"""The lines of a pipe or a terminal, each as soon as it arrives.

    Args:
        file: the input, split on ``\n``; the last line may lack it.

    Attributes:
        waiting: the number of lines that can be read without blocking.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._lines: deque[bytes] = deque()
        self._parts: list[bytes] = []  # of a line that is not complete yet

    @property
    def waiting(self) -> int:
        return len(self._lines)

    def __next__(self) -> bytes:
        while not self._lines:
            block = self._file.read1(1 << 16)  # type: ignore[attr-defined]
            if not block and not self._parts:
                raise StopIteration
            first, *more = block.split(b"\n")
            self._parts.append(first)
            if more or not block:
                self._lines += [b"".join(self._parts), *more[:-1]]
                self._parts = [part for part in more[-1:] if part]
        return self._lines.popleft()


@dataclass(frozen=True)
class Block:
    """Successive sentence pairs as undecoded bytes, which are cheap to cut and to hand over.

    Attributes:
        paths: the file of each side, or the single file that holds both.
        data: the same number of lines of each file.
        first: the number of the first line.
        pair_of: parses a line of the single file: (text, file name, number) -> (source, target).
    """

    paths: tuple[Path, ...]
    data: tuple[bytes, ...]
    first: int
    pair_of: Callable[[str, str, int], tuple[str, str]] | None

    def sides(self) -> tuple[list[str], list[str]]:
        """Return the sources and the targets; those from JSON may contain line breaks.

        Raises:
            FastdissError: a line is not UTF-8, or malformed.
        """
        names = [str(path) for path in self.paths]
        columns = [_decode(*file, self.first) for file in zip(self.data, names, strict=True)]
        if self.pair_of is not None:
            rows = enumerate(columns[0], start=self.first)
            pairs = [self.pair_of(line, names[0], number) for number, line in rows]
            columns = [list(side) for side in zip(*pairs, strict=True)]
        sources, targets = columns
        return sources, targets


class ParallelText:
    """The sentence pairs of one split, in one file or two.

    Args:
        prefix: for ``text``, ``prefix.source`` and ``prefix.target`` are read; for ``jsonl`` and
            ``tsv``, the file ``prefix`` itself or ``prefix.jsonl`` / ``prefix.tsv``. Each may
            end in ``.gz``.
        source, target: the two languages; they are file endings for ``text``, keys for ``jsonl``,
            and names only for ``tsv`` (columns 1 and 2).
        format: one of `FORMATS`.

    Attributes:
        paths: the file of each side, or the single file that holds both.

    Raises:
        FastdissError: a file is missing.
    """

    def __init__(self, prefix: str, source: str, target: str, format: str) -> None:
        self.paths: tuple[Path, ...]
        self._pair_of = None
        if format == "text":
            self.paths = tuple(_existing(prefix, f"{prefix}.{side}") for side in (source, target))
        else:
            ending = f".{format}"
            names = [prefix] if prefix.endswith(ending) else [prefix, prefix + ending]
            self.paths = (_existing(prefix, *names),)
            self._pair_of = partial(_json_pair, source, target) if format == "jsonl" else _tsv_pair

    def count(self) -> int:
        """Count the pairs by reading all files, and check the first pair.

        Raises:
            FastdissError: a file is empty, the sides have different line counts, or the first
                pair is malformed.
        """
        counts = {count_lines(path) for path in self.paths}
        if len(counts) > 1 or 0 in counts:
            deque(self.blocks(), maxlen=0)  # raises an error that says why
        next(self.blocks(1)).sides()
        return counts.pop()

    def blocks(self, size: int = 1024) -> Iterator[Block]:
        """Yield the pairs in blocks of ``size``; the last may have fewer.

        Raises:
            FastdissError: a file is empty, or the sides have different line counts.
        """
        first = 1
        blocks = zip_longest(*(_raw_lines(path, size) for path in self.paths), fillvalue=[])
        for lines in blocks:
            block = Block(self.paths, tuple(map(b"".join, lines)), first, self._pair_of)
            if len(lines[0]) != len(lines[-1]):
                block.sides()  # invalid text may be the cause, so report it first
                raise _unequal(self.paths, first - 1, chain([lines], blocks))
            yield block
            first += len(lines[0])
        if first == 1:
            raise FastdissError(f"{self.paths[0]} is empty; at least one sentence is needed")

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Yield (source, target), with line breaks replaced by blanks; see `Block.sides`."""
        for block in self.blocks():
            yield from zip(*(map(on_one_line, side) for side in block.sides()), strict=True)


def on_one_line(text: str) -> str:
    """Return the text with line breaks replaced by blanks."""
    return text.replace("\n", " ")


def _existing(prefix: str, *names: str) -> Path:
    for name in names:
        for path in (Path(name), Path(f"{name}.gz")):
            if path.is_file():
                return path
    begin = Path(prefix)
    found = sorted(p.name for p in begin.parent.glob(f"{escape(begin.name)}.*"))
    hint = f"; there are {', '.join(found[:4])}" if found else ""
    if found and names[0] != prefix:
        hint += " (-s and -t name the languages)"
    if begin.is_file():
        hint = f"; {prefix} is itself a file: give the common prefix of both names, or its --format"
    others = [*names[1:], f"{names[-1]}.gz"]
    raise FastdissError(f"{names[0]}: no such file (nor {', '.join(others)}){hint}")


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading; report any failure meanwhile with its name."""
    try:
        zipped = path.suffix.lower() == ".gz"
        with BufferedReader(gzip.open(path)) if zipped else open(path, "rb") as file:
            yield file
    except gzip.BadGzipFile as error:
        if str(error).startswith("Not a gzipped file"):
            raise FastdissError(f"{path} is not gzipped: its name must not end in .gz") from None
        raise FastdissError(f"{path} is damaged: {error}") from None
    except (EOFError, zlib.error) as error:
        raise FastdissError(f"{path} is damaged: {error}") from None
    except IsADirectoryError:
        raise FastdissError(f"{path} is a folder: give a file") from None
    except OSError as error:
        raise FastdissError(f"{path}: {error.strerror or error}") from None


def _raw_lines(path: Path, size: int) -> Iterator[list[bytes]]:
    """Yield the lines of a file, ``size`` at a time."""
    with _open(path) as file:
        while lines := list(islice(file, size)):
            yield lines


def _decode(raw: bytes, name: str, first: int) -> list[str]:
    """Decode the bytes of one or more lines; see `read_lines` for what a line is."""
    if first == 1:
        raw = raw.removeprefix(b"\xef\xbb\xbf")
    no_text = f"{name} is not text, or text in UTF-16 (it has NUL bytes): give plain UTF-8"
    if len(raw) > 8 and 3 * raw.count(0) > len(raw):
        raise FastdissError(no_text)  # UTF-16 without a mark may be valid UTF-8
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        start = raw.rfind(b"\n", 0, error.start) + 1
        number = first + raw.count(b"\n", 0, start)
        if b"\0" in raw:
            raise FastdissError(no_text) from None
        raise FastdissError(
            f"{name}: line {number} is not valid UTF-8 (byte {error.start - start + 1} of the "
            "line); convert the file, for example with iconv"
        ) from None
    lines = text.removesuffix("\n").split("\n")
    return [line.removesuffix("\r") for line in lines] if "\r" in text else lines


def _unequal(
    paths: tuple[Path, ...], before: int, rest: Iterable[Sequence[list[bytes]]]
) -> FastdissError:
    counts = [before, before]
    for lines in rest:
        counts = [count + len(side) for count, side in zip(counts, lines, strict=True)]
    (shorter, few), (longer, many) = sorted(zip(paths, counts, strict=True), key=itemgetter(1))
    return FastdissError(
        f"{longer} has {many:,} lines but {shorter} has {few:,}: parallel files must "
        "have the same number of lines"
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object from its fields.

    Raises:
        ValueError: a field is repeated, of which Python would keep the last.
    """
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {twice!r} is repeated")
    return row


def _json_pair(source: str, target: str, line: str, name: str, number: int) -> tuple[str, str]:
    try:
        row = json.loads(line, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        if not line.strip():
            raise FastdissError(f"{name}: line {number} is empty: remove it") from None
        what = error
        if isinstance(error, json.JSONDecodeError):
            what = f"{error.msg}, column {error.colno}"  # it knows of no line but this one
        raise FastdissError(f"{name}: line {number} is not valid JSON ({what})") from None
    if not isinstance(row, dict):
        raise FastdissError(f"{name}: line {number} is not a JSON object: write one per line")
    for key in (source, target):
        if key in row and not isinstance(row[key], str):
            value = json.dumps(row[key], ensure_ascii=False)
            shown = value if len(value) <= 40 else f"{value[:37]}..."
            raise FastdissError(
                f"{name}: line {number} has {shown} for {key!r}, not a string in quotes"
            )
    missing = [repr(key) for key in (source, target) if key not in row]
    if missing:
        texts = [key for key, value in row.items() if isinstance(value, str)]
        has = f"it has {', '.join(texts[:6])}" if texts else "it has none"
        raise FastdissError(
            f"{name}: line {number} lacks the text field{'s' * (len(missing) > 1)} "
            f"{' and '.join(missing)} ({has}): name "
            "the fields with -s and -t"
        )
    src, tgt = row[source], row[target]
    if _SURROGATE.search(src) or _SURROGATE.search(tgt):
        raise FastdissError(
            f"{name}: line {number} contains half a character (a lone \\u surrogate); "
            "fix or remove the line"
        )
    return src, tgt


def _tsv_pair(line: str, name: str, number: int) -> tuple[str, str]:
    columns = line.split("\t")
    if len(columns) < 2:
        raise FastdissError(f"{name}: line {number} has no tab: source and target are needed")
    if len(columns) > 2:
        raise FastdissError(
            f"{name}: line {number} has {len(columns)} columns, not just source and target: "
            "choose two, as with `cut -f1,2`"
        )
    return columns[0], columns[1]
