"""The formats in which corpora are published: each reader yields one sentence pair after another.

Readers get the files of one part of a corpus. A third column, where there is one, holds all the
references of a sentence, tab-separated.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path

from fastdiss_cli.data.text import ParallelText, read_lines
from fastdiss_cli.errors import FastdissError

Row = tuple[str, ...]
Rows = Callable[..., Iterator[Row]]

_SEGMENT = re.compile(r"<seg\b[^>]*>(.*)</seg>", re.IGNORECASE)
_TALK_FACTS = ("<url>", "<talkid>", "<keywords>")
_TALK_TAGS = re.compile(r"</?(title|description)>")


def parallel(read: Callable[[Path], Iterator[str]]) -> Rows:
    """Return a reader of parallel files: line i of each belongs together."""

    def rows(*paths: Path) -> Iterator[Row]:
        for number, row in enumerate(zip_longest(*map(read, paths)), start=1):
            if None in row:
                short = paths[row.index(None)].name
                raise FastdissError(
                    f"{short} ends after {number - 1:,} sentences, before "
                    f"{' and '.join(path.name for path in paths if path.name != short)}"
                )
            yield row

    return rows


def in_turn(read: Rows) -> Rows:
    """Return a reader of several pairs of files, source and target, one pair after the other."""

    def rows(*paths: Path) -> Iterator[Row]:
        for source, target in zip(paths[::2], paths[1::2], strict=True):
            yield from read(source, target)

    return rows


def talk_lines(path: Path) -> Iterator[str]:
    """Yield the lines of IWSLT's training text, titles and descriptions of the talks included."""
    for line in read_lines(path):
        if not any(fact in line for fact in _TALK_FACTS):
            yield straight(_TALK_TAGS.sub("", line).strip())


def segments(path: Path) -> Iterator[str]:
    """Yield what stands between ``<seg>`` tags: the test sets of IWSLT (XML) and WMT (SGML)."""
    for line in read_lines(path):
        match = _SEGMENT.search(line)
        if match:
            yield html.unescape(match[1].strip()).replace("\n", " ")


def talk_segments(path: Path) -> Iterator[str]:
    return map(straight, segments(path))


def straight(text: str) -> str:
    """Return text with straight apostrophes, which most of IWSLT's lines have already."""
    return text.replace("\u2019", "'")


def json_rows(path: Path) -> Iterator[Row]:
    """Yield the pairs of DiffuSeq's JSON lines: ``{"src": ..., "trg": ...}``."""
    return ParallelText(str(path), "src", "trg", "jsonl").pairs()


def inflections(path: Path) -> Iterator[Row]:
    """Yield SIGMORPHON's ``lemma TAB form TAB features``, spelled with a blank between characters.

    A blank within a word becomes ``_``.
    """
    for number, line in enumerate(read_lines(path), start=1):
        fields = line.split("\t")
        if len(fields) != 3:
            raise FastdissError(f"{path.name}: line {number} is not lemma, form, features")
        lemma, form, features = fields
        yield f"{_spelled(lemma)} | {features.replace(';', ' ')}", _spelled(form)


def _spelled(word: str) -> str:
    return " ".join(word.replace(" ", "_"))
