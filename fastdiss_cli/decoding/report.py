"""The figures of a generate run: quality and speed, as a line or as a table by step count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from sacrebleu.metrics import BLEU
from sacrebleu.metrics.bleu import BLEUScore

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


class CorpusBleu:
    """sacreBLEU's BLEU of a corpus that comes sentence by sentence, and is not kept."""

    def __init__(self) -> None:
        self._metric = BLEU(force=True)  # no advice to stderr on text that looks tokenized
        self._sums = np.zeros(2 * self._metric.max_ngram_order + 2, dtype=np.int64)
        self._num_refs: set[int] = set()

    def add(self, hypothesis: str, references: Sequence[str]) -> None:
        """Count a sentence; one without references does not count."""
        if references:
            part = self._metric.corpus_score([hypothesis], [[text] for text in references])
            self._sums += [*part.counts, *part.totals, part.sys_len, part.ref_len]
            self._num_refs.add(len(references))

    @classmethod
    def total(cls, parts: Sequence[CorpusBleu]) -> CorpusBleu:
        """Return the BLEU of all sentences of the parts."""
        whole = cls()
        for part in parts:
            whole._sums += part._sums
            whole._num_refs |= part._num_refs
        return whole

    def result(self) -> tuple[BLEUScore | None, str]:
        """Return the score and its signature; None and "" without references."""
        if not self._num_refs:
            return None, ""
        metric = self._metric
        *counts, sys_len, ref_len = self._sums.tolist()
        correct, total = counts[: metric.max_ngram_order], counts[metric.max_ngram_order :]
        how = metric.smooth_method, metric.smooth_value, metric.effective_order
        score = BLEU.compute_bleu(correct, total, sys_len, ref_len, *how)
        metric.num_refs = max(self._num_refs) if len(self._num_refs) == 1 else -1  # -1: it varies
        return score, metric.get_signature().format()


def _digits(speed: float) -> str:
    """Return a speed with one decimal, or with three significant digits if it is below 10."""
    return f"{speed:.1f}" if speed >= 10 or not speed else f"{speed:#.3g}"


def table(summaries: Sequence[Summary]) -> str:
    """Return the table of quality and speed by step count."""
    lines = [f"{'steps':>5}  {'NFE':>6}  {'BLEU':>6}  {'sentences/s':>11}"]
    for summary in summaries:
        bleu = f"{summary.bleu.score:.2f}" if summary.bleu else "-"
        options = summary.run.options
        # a diagnosis takes evaluations that are none of sampling's
        speed = "-" if getattr(options, "diagnose", False) else _digits(summary.speed)
        lines.append(f"{options.steps:>5}  {summary.nfe:>6.1f}  {bleu:>6}  {speed:>11}")
    if summaries[0].bleu:
        lines.append(f"BLEU signature: {summaries[0].signature}")
    return "\n".join(lines)
