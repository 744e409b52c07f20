"""Diversity of a system's answers: within sentences, a corpus, or the candidates.

These metrics use no references. They are defined on a whole file, so they have no paired test.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from statistics import fmean

from sacrebleu.metrics.base import Score, Signature

from fastdiss_cli.errors import FastdissError
from fastdiss_cli.metrics.ratio import with_fields


class Diversity(ABC):
    """A percentage, computed from the candidates of each sentence, the chosen one first."""

    name: str

    @abstractmethod
    def signature_fields(self) -> dict[str, str | None]:
        """Return the fields of the signature, besides our version."""

    @abstractmethod
    def measure(self, candidates: Sequence[Sequence[str]]) -> float:
        """Return the value as a fraction."""

    def corpus_score(self, candidates: Sequence[Sequence[str]]) -> Score:
        return Score(self.name, 100 * self.measure(candidates))

    def get_signature(self) -> Signature:
        return with_fields(Signature({"num_refs": None}), self.signature_fields())


class Distinct(Diversity):
    """Distinct n-grams over all n-grams of the chosen hypotheses; words are split at blanks.

    Source: Li et al. 2016, "A Diversity-Promoting Objective Function for Neural Conversation
    Models".
    """

    def __init__(self, order: int) -> None:
        self.order, self.name = order, f"distinct-{order}"

    def signature_fields(self) -> dict[str, str]:
        return {"tok": "none", "over": "corpus"}

    def measure(self, candidates: Sequence[Sequence[str]]) -> float:
        ngrams = [ngram for row in candidates for ngram in _ngrams(row[0], self.order)]
        return len(set(ngrams)) / max(len(ngrams), 1)


class SentenceDistinct(Diversity):
    """Distinct words over all words of a chosen hypothesis, averaged over sentences.

    DiffuSeq (Gong et al. 2023) and papers that compare with it call this dist-1.
    """

    name = "sentence-distinct"

    def signature_fields(self) -> dict[str, str]:
        return {"tok": "none", "over": "sentence"}

    def measure(self, candidates: Sequence[Sequence[str]]) -> float:
        rows = [_ngrams(row[0], 1) for row in candidates]
        return fmean(len(set(words)) / max(len(words), 1) for words in rows)


class SelfBLEU(Diversity):
    """Sentence BLEU of each candidate against each other one, averaged over pairs and sentences.

    As in DiffuSeq (Gong et al. 2023), but with sacreBLEU's sentence BLEU.
    """

    name = "self-BLEU"

    def signature_fields(self) -> dict[str, str]:
        return {"case": "mixed", "eff": "yes", "tok": "13a", "smooth": "exp"}

    def measure(self, candidates: Sequence[Sequence[str]]) -> float:
        from fastdiss_cli.decoding.mbr import expected_utilities  # numpy is slow to import

        rows = [row for row in candidates if list(row) != [""]]  # an empty source has one only
        if not rows or any(len(row) == 1 for row in rows):
            raise FastdissError(
                "self-bleu needs several candidates per sentence: "
                "`fastdiss generate --noise-beam 5 --nbest 5` writes five"
            )
        return fmean(values.mean() for values in expected_utilities(rows)) / 100


def _ngrams(text: str, order: int) -> list[tuple[str, ...]]:
    words = text.split()
    return list(zip(*(words[i:] for i in range(order)), strict=False))
