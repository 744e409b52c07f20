"""Rates of wrong words, wrong sentences and repeated words; lower is better."""

from __future__ import annotations

from itertools import pairwise

from fastdiss_cli.metrics.ratio import RatioMetric

_OF_WORDS: dict[str, str | None] = {"case": "mixed", "tok": "none"}  # split at blanks


class WER(RatioMetric):
    """Edits (insert, delete, replace a word) to the nearest reference, over its length in words.

    If the words are phonemes, this is the phoneme error rate.
    """

    name = "WER"

    def signature_fields(self) -> dict[str, str | None]:
        return _OF_WORDS

    def measure(self, hypothesis: str, references: list[str]) -> tuple[int, int]:
        words, rows = hypothesis.split(), [reference.split() for reference in references]
        return min((edit_distance(words, row), len(row)) for row in rows)


class SER(RatioMetric):
    """Sentences that equal none of their references, over all sentences.

    If each sentence is the pronunciation of a word, this is the word error rate.
    """

    name = "SER"

    def signature_fields(self) -> dict[str, str | None]:
        return _OF_WORDS

    def measure(self, hypothesis: str, references: list[str]) -> tuple[int, int]:
        words = hypothesis.split()
        return int(all(words != reference.split() for reference in references)), 1


class Repetition(RatioMetric):
    """Words that equal the previous word, over all pairs of adjacent words."""

    name = "repetition"

    def signature_fields(self) -> dict[str, str | None]:
        return {**_OF_WORDS, "nrefs": None}  # it uses none

    def measure(self, hypothesis: str, references: list[str]) -> tuple[int, int]:
        words = hypothesis.split()
        return sum(a == b for a, b in pairwise(words)), max(len(words) - 1, 0)


def edit_distance(a: list[str], b: list[str]) -> int:
    """Return the minimum number of insertions, deletions and replacements that turn a into b."""
    row = list(range(len(b) + 1))
    for i, word in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, start=1):
            best = min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other))
            diagonal, row[j] = row[j], best
    return row[-1]
