"""Write fairseq's output lines, and read them back for scoring.

For sentence ``i``, tab-separated, in corpus order:

    S-i  source              T-i  reference            E-i_k  step k of sampling (history)
    H-i  score  pieces       D-i  score  text          P-i    score of each piece
    I-i  decoder evaluations

E, H, D, P and I are repeated for each of the ``--nbest`` candidates, the chosen one first.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastdiss_cli import logs
from fastdiss_cli.data.text import decode_lines, on_one_line, read_lines, read_references
from fastdiss_cli.errors import FastdissError

if TYPE_CHECKING:  # `score` reads these files, and should not wait for torch
    from rich.text import Text

    from fastdiss_cli.data.tokenizer import Tokenizer
    from fastdiss_cli.models.registry import Hypothesis

_LINE = re.compile(r"([STHDPI])-([0-9]{1,18})\t(.*)", re.DOTALL)
_SUMMARY = re.compile(r"Generate .* sentences/s, NFE [\d.]+$")
_HISTORY = re.compile(r"E-[0-9]{1,18}_[0-9]+\t")
# (upper bound, rich style): red and an underline, to suit dark and light terminals and colour-blind
# readers; label smoothing keeps the confidence of certain pieces near 0.9
_CONFIDENCE_STYLES = ((0.5, "bold underline red"), (0.8, "red"), (1.1, ""))


def format_lines(
    number: int,
    source: str,
    hypothesis: Hypothesis,
    tokenizer: Tokenizer,
    reference: str | None = None,
    colour: bool = False,
) -> str:
    """Return the output lines of one sentence, each ending in a newline.

    Args:
        number: the number of the sentence in the corpus.
        source, reference: their text.
        hypothesis: the chosen hypothesis, with its `runners_up`.
        tokenizer: the tokenizer of the target side.
        colour: colour the history by confidence, for a terminal.
    """
    lines = [f"S-{number}\t{on_one_line(source)}"]
    if reference is not None:
        lines.append(f"T-{number}\t{on_one_line(reference)}")
    for candidate in (hypothesis, *hypothesis.runners_up):
        pieces = on_one_line(" ".join(tokenizer.pieces(candidate.tokens)))
        score = f"{candidate.score:.4f}"
        lines += [
            *_history_lines(number, candidate, tokenizer, colour),
            f"H-{number}\t{score}\t{pieces}",
            f"D-{number}\t{score}\t{hypothesis_text(candidate, tokenizer)}",
            f"P-{number}\t" + " ".join(f"{value:.4f}" for value in candidate.token_scores),
            f"I-{number}\t{candidate.nfe}",
        ]
    return "\n".join(lines) + "\n"


def confidence_legend() -> Text:
    """Return the legend for the colours of a history."""
    from rich.text import Text

    (unsure, first), (likely, second), _ = _CONFIDENCE_STYLES
    return Text.assemble(
        "confidence of a piece: ",
        (f"below {unsure}", first),
        ", ",
        (f"below {likely}", second),
        f", {likely} and more",
    )


def hypothesis_text(hypothesis: Hypothesis, tokenizer: Tokenizer) -> str:
    """Return a hypothesis as one line of text."""
    return on_one_line(tokenizer.decode(hypothesis.tokens))


@dataclass
class Generated:
    """The contents of a generate file, or of plain text, in corpus order.

    Attributes:
        candidates: the hypotheses of each sentence, the chosen one first.
        references: the references, if the file has them.
        summary: the last line of a complete generate file, or "".
    """

    candidates: list[list[str]]
    references: list[str] | None = None
    summary: str = ""

    @property
    def hypotheses(self) -> list[str]:
        return [candidates[0] for candidates in self.candidates]


def read_system(path: Path) -> Generated:
    """Read a system's answers from plain text or from a generate file; ``-`` is stdin.

    Raises:
        FastdissError: the file is empty, or a generate file has repeated or missing sentences.
    """
    from_stdin = str(path) == "-"
    lines = list(decode_lines(sys.stdin.buffer, "stdin") if from_stdin else read_lines(path))
    if not lines:
        raise FastdissError("stdin is empty: give --sys FILE" if from_stdin else f"{path} is empty")
    plain = Generated([[line] for line in lines])
    summary = next((line for line in reversed(lines) if _SUMMARY.match(line)), "")
    # if stdout and stderr share a file, it starts with log lines; the summary identifies it
    if not (summary or _LINE.match(lines[0]) or _HISTORY.match(lines[0])):
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
            newest, rest = number, rest.split("\t", 1)[-1]
        found[kind].setdefault(number, []).append(rest)
    answers, references = found["D"], found["T"]
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
    return Generated(
        [answers[number] for number in sorted(answers)],
        [references[number][0] for number in sorted(answers)]
        if references.keys() == answers.keys()
        else None,
        summary,
    )


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
    return joined


def reference_streams(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """Transpose references by sentence into sacreBLEU's streams; missing ones are None."""
    most = max(map(len, references))
    return [[row[i] if i < len(row) else None for row in references] for i in range(most)]


def _history_lines(
    number: int, candidate: Hypothesis, tokenizer: Tokenizer, colour: bool
) -> list[str]:
    lines = []
    for k, step in enumerate(candidate.history, start=1):
        shown = tokenizer.pieces(step.tokens)
        if colour:
            confident = zip(shown, step.confidences, strict=False)
            shown = [_coloured(piece, confidence) for piece, confidence in confident]
        lines.append(f"E-{number}_{k}\tt={step.time:.3f}\t{on_one_line(' '.join(shown))}")
    return lines


def _coloured(piece: str, confidence: float) -> str:
    from rich.style import Style

    style = next(style for limit, style in _CONFIDENCE_STYLES if confidence < limit)
    return Style.parse(style).render(piece)
