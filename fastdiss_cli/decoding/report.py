"""The figures of a generate run: quality and speed, as a line or as a table by step count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sacrebleu.metrics import BLEU
from sacrebleu.metrics.bleu import BLEUScore

from fastdiss_cli.decoding.systems import reference_streams
from fastdiss_cli.errors import FastdissError
from fastdiss_cli.logs import counted

if TYPE_CHECKING:
    from fastdiss_cli.decoding.generation import Run


@dataclass
class Summary:
    """The figures of one run, with a score if there are references."""

    run: Run
    bleu: BLEUScore | None = None
    signature: str = ""

    @property
    def speed(self) -> float:
        """Sentences per second, over encoder, sampling and selection."""
        return self.run.sentences / self.run.seconds if self.run.seconds else 0.0

    @property
    def nfe(self) -> float:
        """Decoder evaluations per non-empty sentence."""
        return self.run.nfe / max(self.run.sentences - self.run.empty, 1)

    def line(self, name: str, arch: str, **more: str) -> str:
        """Return the summary line of a split, or of raw text, named ``name``.

        It shows the options of decoding and ``more``. Switches are shown if they are on, even those
        that change no answer, because they take time.
        """
        shown = {k: v for k, v in {**vars(self.run.options), **more}.items() if v is not False}
        how = "".join(f" {key}={str(value).replace(' ', '')}" for key, value in shown.items())
        quality = f"{self.bleu.format(signature=self.signature)} | " if self.bleu else ""
        return (
            f"Generate {name} with {arch}{how}: {quality}"
            f"{counted(self.run.sentences, 'sentence')} in {self.run.seconds:.1f} s, "
            f"{_digits(self.speed)} sentences/s, NFE {self.nfe:.1f}"
        )


def summarise(
    runs: Sequence[Run], texts: Sequence[Sequence[str]], references: Sequence[Sequence[str]]
) -> list[Summary]:
    """Score the hypotheses of each run.

    Args:
        runs: the runs.
        texts: the hypotheses of each run, in corpus order.
        references: the references of each sentence, or an empty list.

    Raises:
        FastdissError: the numbers of references and sentences differ.
    """
    if not references:
        return [Summary(run) for run in runs]
    if len(references) != len(texts[0]):
        raise FastdissError(
            f"--ref has {counted(len(references), 'line')}, but the input has "
            f"{counted(len(texts[0]), 'sentence')}"
        )
    summaries = []
    for run, hypotheses in zip(runs, texts, strict=True):
        metric = BLEU(force=True)  # no advice to stderr on text that looks tokenized
        score = metric.corpus_score(hypotheses, reference_streams(references))
        summaries.append(Summary(run, score, metric.get_signature().format()))
    return summaries


def _digits(speed: float) -> str:
    """Return a speed with one decimal, or with three significant digits if it is below 10."""
    return f"{speed:.1f}" if speed >= 10 or not speed else f"{speed:#.3g}"


def table(summaries: Sequence[Summary]) -> str:
    """Return the table of quality and speed by step count."""
    lines = [f"{'steps':>5}  {'NFE':>6}  {'BLEU':>6}  {'sentences/s':>11}"]
    for summary in summaries:
        bleu = f"{summary.bleu.score:.2f}" if summary.bleu else "-"
        steps = summary.run.options.steps
        lines.append(f"{steps:>5}  {summary.nfe:>6.1f}  {bleu:>6}  {_digits(summary.speed):>11}")
    if summaries[0].bleu:
        lines.append(f"BLEU signature: {summaries[0].signature}")
    return "\n".join(lines)
