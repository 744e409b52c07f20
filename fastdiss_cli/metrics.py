"""The metrics of `score`: sacreBLEU's own, and three more as sacreBLEU metrics.

A metric here has all that sacreBLEU's have: any number of references, a signature, and the paired
significance tests. To add one, write its class and name it in `METRICS`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from sacrebleu.metrics import BLEU, CHRF, TER
from sacrebleu.metrics.base import Metric, Score
from sacrebleu.significance import PairedTest

Words = list[str]


class Rate(Metric):
    """A share in percent: events counted in every sentence, over a total; lower is better."""

    name: str

    @abstractmethod
    def count(self, words: Words, references: list[Words]) -> tuple[int, int]:
        """Return the events in a sentence and what they are a share of."""

    def _preprocess_segment(self, sent: str) -> str:
        return sent

    def _extract_reference_info(self, refs: Sequence[str]) -> dict[str, Any]:
        return {"references": [ref.split() for ref in refs]}

    def _compute_segment_statistics(self, hypothesis: str, ref_kwargs: dict[str, Any]) -> list[int]:
        return list(self.count(hypothesis.split(), ref_kwargs["references"]))

    def _aggregate_and_compute(self, stats: list[list[int]]) -> Score:
        return self._compute_score_from_stats([sum(column) for column in zip(*stats, strict=True)])

    def _compute_score_from_stats(self, stats: list[int]) -> Score:
        events, total = stats
        return Score(self.name, 100 * float(events) / max(float(total), 1))


class WER(Rate):
    """Edits (insert, delete, replace a word) to the nearest reference, over its words.

    Where the words are phonemes this is the phoneme error rate.
    """

    name = "WER"

    def count(self, words: Words, references: list[Words]) -> tuple[int, int]:
        return min((edit_distance(words, reference), len(reference)) for reference in references)


class SER(Rate):
    """Sentences that equal none of their references, over all sentences.

    Where a sentence is the pronunciation of a word this is the word error rate.
    """

    name = "SER"

    def count(self, words: Words, references: list[Words]) -> tuple[int, int]:
        return int(words not in references), 1


class Repetition(Rate):
    """Words that equal the word before them, over all pairs of neighbours."""

    name = "repetition"

    def count(self, words: Words, references: list[Words]) -> tuple[int, int]:
        return sum(a == b for a, b in pairwise(words)), max(len(words) - 1, 0)


METRICS: dict[str, type[Metric]] = {
    "bleu": BLEU,
    "chrf": CHRF,
    "ter": TER,
    "wer": WER,
    "ser": SER,
    "repetition": Repetition,
}


def edit_distance(a: Words, b: Words) -> int:
    """Return the fewest insertions, deletions and replacements that turn a into b."""
    row = list(range(len(b) + 1))
    for i, word in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, start=1):
            best = min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other))
            diagonal, row[j] = row[j], best
    return row[-1]


def paired_test(
    baseline: Sequence[str],
    system: Sequence[str],
    streams: Sequence[Sequence[str | None]],
    metrics: Sequence[str],
    test: str = "bs",
) -> list[tuple[str, float, float, float, str]]:
    """Compare two systems on the same sentences.

    Args:
        baseline, system: their hypotheses.
        streams: sacreBLEU's reference streams.
        metrics: keys of `METRICS`.
        test: ``bs`` (paired bootstrap, Koehn 2004) or ``ar`` (approximate randomisation).

    Returns:
        For each metric: its name, both scores, the p-value and the signature.
    """
    chosen = {name: METRICS[name]() for name in metrics}
    pair = [("baseline", baseline), ("system", system)]
    signatures, scores = PairedTest(pair, chosen, streams, test_type=test)()
    return [
        (
            name,
            scores[name][0].score,
            scores[name][1].score,
            scores[name][1].p_value,
            str(signature),
        )
        for name, signature in signatures.items()
    ]
