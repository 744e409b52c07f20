"""The base of our own metrics: a ratio of two sums, as a sacreBLEU metric.

So they support all that sacreBLEU's do: any number of references, a signature, and the paired
significance tests, which resample the contributions of single sentences.
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
    """100 times the ratio of two sums over sentences; a mean if the second sum counts sentences.

    Attributes:
        name: the name that the score is shown with.
    """

    name: str

    def signature_fields(self) -> dict[str, str | None]:
        """Return the fields of the signature, besides the number of references and our version."""
        return {}

    @abstractmethod
    def measure(self, hypothesis: str, references: list[str]) -> tuple[float, float]:
        """Return the contributions of a sentence to both sums."""

    def measure_all(
        self, hypotheses: Sequence[str], references: list[list[str]]
    ) -> list[tuple[float, float]]:
        """Measure all sentences; for metrics that are faster in batches."""
        return [self.measure(*pair) for pair in zip(hypotheses, references, strict=True)]

    def get_signature(self) -> Signature:
        return with_fields(super().get_signature(), self.signature_fields())

    # sacreBLEU's interface

    def _preprocess_segment(self, sent: str) -> str:
        return sent

    def _extract_reference_info(self, refs: Sequence[str]) -> dict[str, Any]:
        return {"references": list(refs)}

    def _compute_segment_statistics(
        self, hypothesis: str, ref_kwargs: dict[str, Any]
    ) -> list[float]:
        return list(self.measure(hypothesis, **ref_kwargs))

    def _extract_corpus_statistics(
        self, hypotheses: Sequence[str], references: Sequence[Sequence[str | None]] | None
    ) -> list[tuple[float, float]]:
        cache = self._cache_references(references) if references else self._ref_cache
        return self.measure_all(hypotheses, [row["references"] for row in cache])

    def _aggregate_and_compute(self, stats: list[tuple[float, float]]) -> Score:
        return self._compute_score_from_stats([sum(column) for column in zip(*stats, strict=True)])

    def _compute_score_from_stats(self, stats: Sequence[float]) -> Score:
        part, total = map(float, stats)
        return Score(self.name, 100 * part / max(total, 1))
