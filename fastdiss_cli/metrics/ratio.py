"""The base of our own metrics: a sum over another sum, as a sacreBLEU metric.

So they have all that sacreBLEU's have: any number of references, a signature, and the paired
significance tests, which draw from the sums of each sentence.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from sacrebleu.metrics.base import Metric, Score, Signature

from fastdiss_cli import __version__


def with_fields(signature: Signature, fields: dict[str, str | None]) -> Signature:
    """Add fields to the signature of one of our own metrics, whose version is ours."""
    for key, value in {**fields, "version": f"fastdiss-{__version__}"}.items():
        signature.update(key, value)
    return signature


class RatioMetric(Metric):
    """100 times a sum over all sentences, over another; a mean where the other counts sentences.

    Attributes:
        name: under which the score is shown.
    """

    name: str

    def signature_fields(self) -> dict[str, str | None]:
        """Return what the signature says besides the number of references and our version."""
        return {}

    @abstractmethod
    def measure(self, hypothesis: str, references: list[str]) -> tuple[float, float]:
        """Return what a sentence adds to both sums."""

    def measure_all(
        self, hypotheses: Sequence[str], references: list[list[str]]
    ) -> list[tuple[float, float]]:
        """Measure all sentences; for metrics that are faster in batches."""
        return [self.measure(*pair) for pair in zip(hypotheses, references, strict=True)]

    def get_signature(self) -> Signature:
        return with_fields(super().get_signature(), self.signature_fields())

    # what sacreBLEU asks of a metric

    def _preprocess_segment(self, sent: str) -> str:
        return sent

    def _extract_reference_info(self, refs: Sequence[str]) -> dict[str, Any]:
        return {"references": list(refs)}

    def _compute_segment_statistics(
        self, hypothesis: str, ref_kwargs: dict[str, Any]
    ) -> list[float]:
        return list(self.measure(hypothesis, **ref_kwargs))

    def _extract_corpus_statistics(
        self, hypotheses: Sequence[str], references: Sequence[Sequence[str | None]]
    ) -> list[tuple[float, float]]:
        rows = [row["references"] for row in self._cache_references(references)]
        return self.measure_all(hypotheses, rows)

    def _aggregate_and_compute(self, stats: list[tuple[float, float]]) -> Score:
        return self._compute_score_from_stats([sum(column) for column in zip(*stats, strict=True)])

    def _compute_score_from_stats(self, stats: Sequence[float]) -> Score:
        part, total = map(float, stats)
        return Score(self.name, 100 * part / max(total, 1))
