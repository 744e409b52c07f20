"""Minimum-Bayes-risk selection among the candidate translations of one sentence.

The utilities are sacreBLEU's sentence scores (version 2, default settings), computed for all
pairs of candidates at once.
"""
# C candidates, U different texts among them, N tokens in those, G different n-grams of any order

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain, count

import numpy as np
from sacrebleu import BLEU

from fastdiss_cli.errors import FastdissError

METRICS = ("bleu", "chrf")
BLEU_ORDER = 4
# The k-th order without any match counts as 2^-k matches: m such orders give a factor of
# 2^-(1 + ... + m).
SMOOTHING = np.exp2([-m * (m + 1) / 2 for m in range(BLEU_ORDER + 1)])
CHRF_ORDER = 6
CHRF_BETA = 2

_tokenizer_13a = BLEU(effective_order=True).tokenizer


def expected_utility(candidates: Sequence[str], metric: str = "bleu") -> np.ndarray:
    """Average each candidate's utility over the C - 1 other candidates.

    A repeated text counts once for each time that it occurs, and equal texts get equal values,
    to the last bit. A single candidate is scored against itself.

    Args:
        candidates: C texts, detokenised; empty texts are allowed.
        metric: "bleu" or "chrf".

    Returns:
        Mean utilities in 0..100, float64 [C]; the largest marks the candidate to choose.

    Raises:
        FastdissError: the metric is unknown.

    Source: Kumar and Byrne 2004 (minimum Bayes risk), all samples with one weight.
    """
    texts, index = _different(candidates)
    utilities = pairwise_utility(texts, metric)
    if len(candidates) > 1:
        others = np.bincount(index) - np.eye(len(texts))
        utilities = utilities * others / (len(candidates) - 1)
    return utilities.sum(axis=1)[index]


def _different(candidates: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Return the U different texts and each candidate's place among them [C]."""
    places: dict[str, int] = {}
    index = [places.setdefault(text, len(places)) for text in candidates]
    return list(places), np.array(index, dtype=np.int64)


def pairwise_utility(texts: Sequence[str], metric: str = "bleu") -> np.ndarray:
    """Score every text as hypothesis against every text as its only reference.

    Entry [i, j] is sacreBLEU's sentence score of text i against text j, by
    ``BLEU(effective_order=True)`` (13a tokens, exponential smoothing) or by ``CHRF()``
    (characters without white space, beta 2).

    Args:
        texts: U texts, detokenised; empty texts are allowed.
        metric: "bleu" or "chrf".

    Returns:
        Utilities in 0..100, float64 [U, U]; not symmetric.

    Raises:
        FastdissError: the metric is unknown.

    Source: Papineni et al. 2002 (BLEU); Chen and Cherry 2014, method 3 (smoothing); Popović
    2015 (chrF); Post 2018 (sacreBLEU).
    """
    if metric == "bleu":
        return _bleu(*_match_ngrams([_split_13a(text) for text in texts], BLEU_ORDER))
    if metric == "chrf":
        return _chrf(*_match_ngrams(["".join(text.split()) for text in texts], CHRF_ORDER))
    raise FastdissError(f"unknown MBR metric {metric!r}: choose one of {', '.join(METRICS)}")


def _split_13a(text: str) -> list[str]:
    """Tokenise as sacreBLEU's 13a does, word by word: candidates share most of their words."""
    text = text.rstrip()
    if "-\n" in text or "<skipped>" in text:  # only here does 13a look beyond a single word
        return _tokenizer_13a(text).split()
    return list(chain.from_iterable(map(_split_word, text.split())))


@lru_cache(maxsize=2**16)
def _split_word(word: str) -> list[str]:
    return _tokenizer_13a(word).split()


def _match_ngrams(lines: Sequence[Sequence[str]], order: int) -> tuple[np.ndarray, np.ndarray]:
    """Count clipped n-gram matches between all pairs of token sequences, for n = 1..order.

    Returns sum_g min(count_ig, count_jg) [order, U, U] and each line's n-grams [order, U]. The
    largest temporary is [U, G]; G is at most order * N.
    """
    lengths = np.array([len(line) for line in lines], dtype=np.int64)
    totals = np.maximum(lengths - np.arange(order)[:, None], 0)
    matches = np.zeros((order, len(lines), len(lines)))
    if not lengths.any():
        return matches, totals

    # Row n - 1 holds the n-th token from each position on, 0 beyond the end of the line.
    ids: defaultdict[str, int] = defaultdict(count(1).__next__)
    tokens = list(map(ids.__getitem__, chain.from_iterable(lines)))
    owner = np.repeat(np.arange(len(lines)), lengths)
    position = np.arange(owner.size) + owner * order
    padded = np.zeros(owner.size + len(lines) * order, np.min_scalar_type(len(ids)))
    padded[position] = tokens
    window = padded[position + np.arange(order)[:, None]]

    # Sorted by their longest n-grams, positions with equal n-grams of any order are neighbours.
    ranking = np.lexsort(window[::-1])
    window, owner = window.take(ranking, axis=1), owner[ranking]
    is_new = np.ones(window.shape, dtype=bool)
    np.not_equal(window[:, 1:], window[:, :-1], out=is_new[:, 1:])
    for n in range(1, order):
        is_new[n] |= is_new[n - 1]
    gram = np.cumsum(is_new).reshape(window.shape) - 1  # distinct across the orders too
    n_grams = int(gram[-1, -1]) + 1
    cells = (owner * n_grams + gram)[window > 0]
    counts = np.bincount(cells, minlength=len(lines) * n_grams).reshape(len(lines), n_grams)

    # min(a, b) = sum_{k >= 1} [a >= k][b >= k]: products of 0/1 matrices clip and sum, exactly
    # (float32 up to 2^24). A column stands for one n-gram and one k.
    counts = counts.astype(np.min_scalar_type(lengths.max()))
    most = counts.max(axis=0)
    column = np.repeat(np.arange(n_grams), most)
    ends = np.cumsum(most)
    k = np.arange(1, column.size + 1) - (ends - most)[column]
    reached = (counts.take(column, axis=1) >= k.astype(counts.dtype)).astype(np.float32)
    bounds = [0, *ends[gram[:, -1]]]
    for n in range(order):
        part = reached[:, bounds[n] : bounds[n + 1]]
        matches[n] = part @ part.T
    return matches, totals


def _bleu(matches: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Return sentence BLEU [U, U] over the orders that the hypothesis (row) has n-grams of."""
    orders = (totals > 0).sum(axis=0)
    missed = orders[:, None] - (matches > 0).sum(axis=0)
    product = np.maximum(matches, 1).prod(axis=0) * SMOOTHING[missed]
    product /= np.maximum(totals, 1.0).prod(axis=0)[:, None]
    brevity = np.exp(np.minimum(1 - totals[0] / np.maximum(totals[0], 1)[:, None], 0))
    mean = product ** (1 / np.maximum(orders, 1))[:, None]
    return 100 * brevity * mean * (matches[0] > 0)


def _chrf(matches: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Return sentence chrF [U, U], averaging over the orders that both texts have n-grams of."""
    used = np.maximum(((totals[:, :, None] > 0) & (totals[:, None, :] > 0)).sum(axis=0), 1)
    share = matches / np.maximum(totals, 1)[:, :, None]
    precision = share.sum(axis=0) / used
    recall = (matches / np.maximum(totals, 1)[:, None, :]).sum(axis=0) / used
    weighted = CHRF_BETA**2 * precision + recall
    return 100 * (1 + CHRF_BETA**2) * precision * recall / np.where(weighted > 0, weighted, 1)
