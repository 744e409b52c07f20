"""Write fairseq's output lines.

For sentence ``i``, tab-separated, in corpus order:

    S-i  source              T-i  reference            E-i_k  step k of sampling (history)
    H-i  score  pieces       D-i  score  text          P-i    score of each piece
    I-i  decoder evaluations

E, H, D, P and I are repeated for each of the ``--nbest`` candidates, the chosen one first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastdiss_cli.data.text import on_one_line

if TYPE_CHECKING:
    from rich.text import Text

    from fastdiss_cli.data.tokenizer import Tokenizer
    from fastdiss_cli.models.registry import Hypothesis

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
