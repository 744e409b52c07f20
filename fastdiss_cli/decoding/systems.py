"""Read what is scored: the answers of a system, in text or generate files, and references."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastdiss_cli import logs
from fastdiss_cli.data.text import decode_lines, read_lines
from fastdiss_cli.errors import FastdissError

# what `output` and `report` write
_LINE = re.compile(r"([STHDPI])-([0-9]{1,18})\t(.*)", re.DOTALL)
_SCORE = re.compile(r"-?(\d+\.?\d*(e-?\d+)?|inf|nan)")
_HISTORY = re.compile(r"E-[0-9]{1,18}_[0-9]+\t")
_SUMMARY = re.compile(
    r"Generate \S+ with (?P<arch>\S+)(?P<options>( \w+=\S+)*): .*?"
    r"(?P<speed>\d[\d,]*(?:\.\d+)?) sentences/s, NFE (?P<nfe>\d+(?:\.\d+)?)$"
)
_FAIRSEQS_SUMMARY = re.compile(r"Generate \S+ with beam=\d+: ")


STDIN = Path("-")


def shown(path: Path) -> Path:
    """Return the path under which a system appears in messages and tables."""
    return Path("stdin") if path == STDIN else path


@dataclass
class Figures:
    """The figures in a summary line.

    Attributes:
        arch: the architecture.
        options: the options of decoding, as text.
        speed: sentences per second.
        nfe: decoder evaluations per non-empty sentence.
    """

    arch: str
    options: dict[str, str]
    speed: float
    nfe: float

    @property
    def steps(self) -> int | None:
        """Denoising steps; None for a model that has none."""
        return int(self.options["steps"]) if "steps" in self.options else None

    @property
    def stops_early(self) -> bool:
        return "early_exit" in self.options


def parse_summary(line: str) -> Figures | None:
    """Parse a line of `Summary.line`; return None for any other line."""
    match = _SUMMARY.match(line)
    if match is None:
        return None
    options = dict(option.split("=", 1) for option in match["options"].split())
    speed = float(match["speed"].replace(",", ""))
    return Figures(match["arch"], options, speed, float(match["nfe"]))


@dataclass
class Generated:
    """The contents of a generate file, or of plain text, in corpus order.

    Attributes:
        candidates: the hypotheses of each sentence, the chosen one first.
        sources, references: those of the file, if it has them.
        summary: the last line of a complete generate file, or "".
    """

    candidates: list[list[str]]
    sources: list[str] | None = None
    references: list[str] | None = None
    summary: str = ""

    @property
    def hypotheses(self) -> list[str]:
        return [candidates[0] for candidates in self.candidates]


def generate_files(path: Path) -> list[Path]:
    """Return a file, or the generate files of a folder.

    Raises:
        FastdissError: a folder has none.
    """
    if not path.is_dir():
        return [path]
    found = sorted(path.glob("generate-*.txt"))
    if not found:
        below = sorted({str(file.parent) for file in path.glob("*/generate-*.txt")})
        hint = f"; there are some in {', '.join(below[:4])}" if below else ""
        if parts := sorted(path.glob("generate-*.txt.part")):
            hint = f"; {parts[0].name} is of a run that did not finish"
        raise FastdissError(f"{path} is a folder without generate-*.txt{hint}")
    return found


def by_steps(paths: list[Path]) -> list[Path]:
    """Sort the files of one run by their number of steps; all others keep their place."""
    runs = [path.with_name(re.sub(r"\.steps\d+", "", path.name)) for path in paths]
    steps = [int(n[1]) if (n := re.search(r"\.steps(\d+)", path.name)) else 0 for path in paths]
    order = sorted(range(len(paths)), key=lambda i: (runs.index(runs[i]), steps[i]))
    return [paths[i] for i in order]


def read_system(path: Path) -> Generated:
    """Read a system's answers from plain text or a generate file, also fairseq's; ``-`` is stdin.

    Raises:
        FastdissError: the file is empty, or a generate file has repeated or missing sentences.
    """
    from_stdin, path = path == STDIN, shown(path)
    lines = list(decode_lines(sys.stdin.buffer, "stdin") if from_stdin else read_lines(path))
    if not lines:
        raise FastdissError(f"{path} is empty" + ": give --sys FILE" * from_stdin)
    plain = Generated([[line] for line in lines])
    ends = (
        line for line in reversed(lines) if parse_summary(line) or _FAIRSEQS_SUMMARY.match(line)
    )
    summary = next(ends, "")
    # fairseq's file starts with log lines, as ours does if stderr goes there, too: the summary
    # identifies it
    if not (summary or _LINE.match(lines[0]) or _HISTORY.match(lines[0])):
        _warn_of_pieces(path, lines)
        return plain
    found: dict[str, dict[int, list[str]]] = {"S": {}, "D": {}, "T": {}}
    newest = -1  # sentence with a D line
    for line in lines:
        match = _LINE.match(line)
        if match is None or match[1] not in found:
            continue
        kind, number, rest = match[1], int(match[2]), match[3]
        if number in found[kind] and not (kind == "D" and number == newest):
            raise FastdissError(f"{path}: {kind}-{number} appears twice")
        if kind == "D":
            newest = number
            score, tab, text = rest.partition("\t")
            if tab or _SCORE.fullmatch(score):  # an empty text may have lost its tab
                rest = text
        found[kind].setdefault(number, []).append(rest)
    answers = found["D"]
    if not answers:
        if any(match and match[1] == "H" for match in map(_LINE.match, lines)):
            raise FastdissError(
                f"{path} has H- lines, which show pieces, but no D- lines, which are text: give "
                "the unmodified generate file"
            )
        if summary:
            raise FastdissError(f"{path} holds no sentences")
        if all(map(_LINE.match, lines)):
            raise FastdissError(f"{path} has lines of a generate file, but no D- lines")
        return plain
    missing = next(number for number in itertools.count() if number not in answers)
    if missing < len(answers):
        raise FastdissError(f"{path}: no D-{missing} line; the file is not complete")
    if not summary:
        logs.warn(
            f"{path} has no last line (Generate ...) and may be truncated: scoring its "
            f"{logs.counted(len(answers), 'sentence')}"
        )
    numbers = sorted(answers)
    sources, references = (
        [rows[number][0] for number in numbers] if rows.keys() == answers.keys() else None
        for rows in (found["S"], found["T"])
    )
    return Generated([answers[number] for number in numbers], sources, references, summary)


def _warn_of_pieces(path: Path, lines: list[str]) -> None:
    """Warn of lines that look like the subwords of SentencePiece or subword-nmt."""
    lines = list(filter(None, lines))
    if lines and all("▁" in text for text in lines):
        mark = "▁"
    elif sum("@@ " in text for text in lines) > len(lines) / 2:
        mark = "@@"
    else:
        return
    logs.warn(
        f"{path}: the lines hold subwords ({mark}), not text, and score too low: take the D- lines "
        "of a generate file, not H-, or give the file itself"
    )


def read_references(path: Path) -> list[list[str]]:
    """Return the references of each sentence.

    A ``.tsv`` (or ``.tsv.gz``) file holds any number of tab-separated alternatives per line, every
    other file exactly one. Empty ones beside others, as spreadsheets pad lines with, are left out
    with a warning: they would make an empty answer correct.
    """
    if not path.name.lower().removesuffix(".gz").endswith(".tsv"):
        rows = [[line] for line in read_lines(path)]
        if tabs := sum("\t" in line for (line,) in rows):
            logs.warn(
                f"{path}: {logs.counted(tabs, 'line')} with tabs, each taken as one reference: "
                "for alternatives, the name must end in .tsv"
            )
        return rows
    rows = [line.split("\t") for line in read_lines(path)]
    kept = [[text for text in row if text.strip()] or [""] for row in rows]
    if padded := sum(len(row) != len(own) for row, own in zip(rows, kept, strict=True)):
        logs.warn(f"{path}: ignoring empty alternatives in {logs.counted(padded, 'line')}")
    return kept


def read_all_references(paths: Sequence[Path], count: int | None) -> list[list[str]]:
    """Read reference files and join their alternatives by line.

    Args:
        paths: one or more files; see `read_references`.
        count: the number of sentences, if known.

    Raises:
        FastdissError: a file is empty, has a different number of lines, or is a generate file.
    """
    joined: list[list[str]] = []
    for path in paths:
        rows = read_references(path)
        if not rows:
            raise FastdissError(f"{path} is empty: references are needed")
        if all(_LINE.match("\t".join(row)) for row in rows):
            raise FastdissError(
                f"{path} has numbered lines of a generate file, not plain text: extract the text "
                "from its T- lines with `cut -f2-`"
            )
        count = len(rows) if count is None else count
        if len(rows) != count:
            raise FastdissError(
                f"{path} has {logs.counted(len(rows), 'line')} for "
                f"{logs.counted(count, 'sentence')}: "
                "references need one line per sentence"
            )
        joined = [a + b for a, b in zip(joined or [[]] * count, rows, strict=True)]
    if empty := sum(len(row) > 1 and not all(map(str.strip, row)) for row in joined):
        logs.warn(
            f"--ref: {logs.counted(empty, 'sentence')} with an empty reference beside others, "
            "which counts like them, as in sacreBLEU: a .tsv may have fewer alternatives on a line"
        )
    return joined


def reference_streams(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """Transpose references by sentence into sacreBLEU's streams; missing ones are None."""
    most = max(map(len, references))
    return [[row[i] if i < len(row) else None for row in references] for i in range(most)]
