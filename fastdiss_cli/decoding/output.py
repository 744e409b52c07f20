"""fairseq's output lines: write them, and read them back for scoring.

For sentence ``i``, tab-separated, in corpus order:

    S-i  source              T-i  reference            E-i_k  step k of sampling (history)
    H-i  score  pieces       D-i  score  text          P-i    score of each piece
    I-i  decoder evaluations
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.style import Style

from fastdiss_cli.data.text import read_lines, read_references
from fastdiss_cli.data.tokenizer import Tokenizer
from fastdiss_cli.errors import FastdissError
from fastdiss_cli.models.registry import Hypothesis

_LINE = re.compile(r"([STHDPI])-([0-9]{1,18})\t(.*)", re.DOTALL)
_HISTORY = re.compile(r"E-[0-9]{1,18}_[0-9]+\t")
# red, yellow, no colour: readable on dark and light terminals
_CONFIDENCE_STYLES = ((0.5, Style(color="red")), (0.9, Style(color="yellow")), (1.1, Style()))


def format_lines(
    number: int,
    source: str,
    hypothesis: Hypothesis,
    tokenizer: Tokenizer,
    reference: str | None = None,
    colour: bool = False,
) -> str:
    """Return the lines of one sentence, each ended by a newline.

    Args:
        number: of the sentence in the corpus.
        source, reference: their text.
        hypothesis: the chosen one.
        tokenizer: of the target side.
        colour: colour the history by confidence, for a terminal.
    """
    pieces = _one_line(" ".join(tokenizer.pieces(hypothesis.tokens)))
    score = f"{hypothesis.score:.4f}"
    lines = [f"S-{number}\t{_one_line(source)}"]
    if reference is not None:
        lines.append(f"T-{number}\t{_one_line(reference)}")
    for k, step in enumerate(hypothesis.history, start=1):
        shown = tokenizer.pieces(step.tokens)
        if colour:
            shown = [
                _confidence_style(c).render(p)
                for p, c in zip(shown, step.confidences, strict=False)
            ]
        lines.append(f"E-{number}_{k}\tt={step.time:.3f}\t{_one_line(' '.join(shown))}")
    lines += [
        f"H-{number}\t{score}\t{pieces}",
        f"D-{number}\t{score}\t{hypothesis_text(hypothesis, tokenizer)}",
        f"P-{number}\t" + " ".join(f"{value:.4f}" for value in hypothesis.token_scores),
        f"I-{number}\t{hypothesis.nfe}",
    ]
    return "\n".join(lines) + "\n"


def hypothesis_text(hypothesis: Hypothesis, tokenizer: Tokenizer) -> str:
    """Return a hypothesis as one line of text."""
    return _one_line(tokenizer.decode(hypothesis.tokens))


@dataclass
class Generated:
    """What a generate file says: hypotheses, and references where it has them, in corpus order."""

    hypotheses: list[str]
    references: list[str] | None


def read_system(path: Path) -> Generated:
    """Read a system's answers from plain text or from a generate file.

    Raises:
        FastdissError: the file is empty, or a generate file has a sentence twice or not at all.
    """
    lines = list(read_lines(path))
    if not lines:
        raise FastdissError(f"{path} is empty")
    if not (_LINE.match(lines[0]) or _HISTORY.match(lines[0])):
        return Generated(lines, None)
    found: dict[str, dict[int, str]] = {"D": {}, "T": {}}
    for line in lines:
        match = _LINE.match(line)
        if match is None:
            continue
        kind, number, rest = match[1], int(match[2]), match[3]
        if kind in found:
            if number in found[kind]:
                raise FastdissError(f"{path}: {kind}-{number} is there twice")
            found[kind][number] = rest.split("\t", 1)[-1] if kind == "D" else rest
    if not found["D"]:
        return Generated(lines, None)
    missing = next(number for number in itertools.count() if number not in found["D"])
    if missing < len(found["D"]):
        raise FastdissError(f"{path}: no D-{missing} line; the file is not complete")
    references = found["T"] if found["T"].keys() == found["D"].keys() else None
    return Generated(_in_order(found["D"]), None if references is None else _in_order(references))


def read_all_references(paths: Sequence[Path], count: int | None) -> list[list[str]]:
    """Read reference files and join their alternatives by line.

    Args:
        paths: one or more files; see `read_references`.
        count: how many sentences there are, if that is known.

    Raises:
        FastdissError: a file has another number of lines.
    """
    joined: list[list[str]] = []
    for path in paths:
        rows = read_references(path)
        count = len(rows) if count is None else count
        if len(rows) != count:
            raise FastdissError(
                f"{path} has {len(rows):,} lines where there are {count:,} sentences: "
                "references need a line for a sentence"
            )
        joined = [a + b for a, b in zip(joined or [[]] * count, rows, strict=True)]
    return joined


def reference_streams(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """Transpose references by sentence into sacreBLEU's streams; missing ones are None."""
    most = max(map(len, references))
    return [[row[i] if i < len(row) else None for row in references] for i in range(most)]


def _in_order(lines: dict[int, str]) -> list[str]:
    return [lines[number] for number in sorted(lines)]


def _one_line(text: str) -> str:
    """A model may write any byte; a line break within a line would shift all that follow."""
    return text.replace("\n", " ")


def _confidence_style(confidence: float) -> Style:
    return next(style for limit, style in _CONFIDENCE_STYLES if confidence < limit)
