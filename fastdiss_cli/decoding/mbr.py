"""Minimum-Bayes-risk selection among the candidate translations of a sentence.

The utilities are sacreBLEU's sentence scores (version 2, default settings), computed for all
pairs of candidates of all sentences of a batch at once.
"""
# B sentences, C candidates of one, U different texts among them

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
TOGETHER = 16  # sentences whose n-grams are counted at once: more need memory and save no time

_tokenizer_13a = BLEU(effective_order=True).tokenizer


def expected_utilities(
    sentences: Sequence[Sequence[str]], metric: str = "bleu"
) -> list[np.ndarray]:
    """Average the utility of each candidate of a sentence over the C - 1 other candidates.

    A repeated text counts once for each time that it occurs, and equal texts get equal values,
    to the last bit. A single candidate is scored against itself. The values of a sentence do not
    depend on the other sentences, which share the calls.

    Args:
        sentences: the C candidates of each, detokenised; empty texts are allowed.
        metric: "bleu" or "chrf".

    Returns:
        Mean utilities in 0..100 for each sentence, float64 [C]; the largest marks the candidate
        to choose.

    Raises:
        FastdissError: the metric is unknown.

    Source: Kumar and Byrne 2004 (minimum Bayes risk), all samples with one weight.
    """
    found = []
    for start in range(0, len(sentences), TOGETHER):
        different = [_different(candidates) for candidates in sentences[start : start + TOGETHER]]
        pairs = pairwise_utilities([texts for texts, _ in different], metric)
        for utilities, (texts, index) in zip(pairs, different, strict=True):
            if len(index) > 1:
                others = np.bincount(index) - np.eye(len(texts))
                utilities = utilities * others / (len(index) - 1)
            found.append(utilities.sum(axis=1)[index])
    return found


def _different(candidates: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Return the U different texts and each candidate's place among them [C]."""
    places: dict[str, int] = {}
    index = [places.setdefault(text, len(places)) for text in candidates]
    return list(places), np.array(index, dtype=np.int64)


def pairwise_utilities(
    sentences: Sequence[Sequence[str]], metric: str = "bleu"
) -> list[np.ndarray]:
    """Score every text of a sentence as hypothesis against every one as its only reference.

    Entry [i, j] is sacreBLEU's sentence score of text i against text j, by
    ``BLEU(effective_order=True)`` (13a tokens, exponential smoothing) or by ``CHRF()``
    (characters without white space, beta 2).

    Args:
        sentences: the U texts of each, detokenised; empty texts are allowed.
        metric: "bleu" or "chrf".

    Returns:
        Utilities in 0..100 for each sentence, float64 [U, U]; not symmetric.

    Raises:
        FastdissError: the metric is unknown.

    Source: Papineni et al. 2002 (BLEU); Chen and Cherry 2014, method 3 (smoothing); Popović
    2015 (chrF); Post 2018 (sacreBLEU).
    """
    if metric not in METRICS:
        raise FastdissError(f"unknown MBR metric {metric!r}: choose one of {', '.join(METRICS)}")
    if metric == "bleu":
        lines = [[_split_13a(text) for text in texts] for texts in sentences]
        utilities = _bleu(*_match_ngrams(lines, BLEU_ORDER))
    else:
        lines = [["".join(text.split()) for text in texts] for texts in sentences]
        utilities = _chrf(*_match_ngrams(lines, CHRF_ORDER))
    return [utilities[b, : len(texts), : len(texts)] for b, texts in enumerate(sentences)]


def _split_13a(text: str) -> list[str]:
    """Tokenise as sacreBLEU's 13a does, word by word: candidates share most of their words."""
    text = text.rstrip()
    if "-\n" in text or "<skipped>" in text:  # only here does 13a look beyond a single word
        return _tokenizer_13a(text).split()
    return list(chain.from_iterable(map(_split_word, text.split())))


@lru_cache(maxsize=2**16)
def _split_word(word: str) -> list[str]:
    return _tokenizer_13a(word).split()


def _match_ngrams(
    sentences: Sequence[Sequence[Sequence[str]]], order: int
) -> tuple[np.ndarray, np.ndarray]:
    """Count clipped n-gram matches between all pairs of lines of a sentence, for n = 1..order.

    Returns sum_g min(count_ig, count_jg), float32 [order, B, U, U], and each line's n-grams, int64
    [order, B, U]; U is that of the sentence with the most lines, others have zeros there.
    """
    B, U = len(sentences), max(map(len, sentences), default=0)
    lengths = np.zeros((B, U), dtype=np.int64)
    for b, lines in enumerate(sentences):
        lengths[b, : len(lines)] = [len(line) for line in lines]
    totals = np.maximum(lengths - np.arange(order)[:, None, None], 0)
    if not lengths.any():
        return np.zeros((order, B, U, U), dtype=np.float32), totals

    # Row n - 1 holds the n-th token from each position on, 0 beyond the end of the line. Equal
    # tokens of different sentences are different ids, in the order of the sentences.
    fresh, tokens = count(1), []
    for lines in sentences:
        ids: defaultdict[str, int] = defaultdict(fresh.__next__)
        tokens += map(ids.__getitem__, chain.from_iterable(lines))
    owner = np.repeat(np.arange(B * U), lengths.ravel())  # b * U + the line's number
    position = np.arange(owner.size) + owner * order
    padded = np.zeros(owner.size + B * U * order, np.min_scalar_type(next(fresh)))
    padded[position] = tokens
    window = padded[position + np.arange(order)[:, None]]

    # Sorted by their longest n-grams, positions with equal n-grams of any order are neighbours.
    ranking = np.lexsort(window[::-1])
    window, owner = window.take(ranking, axis=1), owner[ranking]
    is_new = np.ones(window.shape, dtype=bool)
    np.not_equal(window[:, 1:], window[:, :-1], out=is_new[:, 1:])
    for n in range(1, order):
        is_new[n] |= is_new[n - 1]
    gram = np.cumsum(is_new).reshape(window.shape) - 1  # distinct across orders and sentences
    occurs = window > 0

    # min(a, b) = sum_{k >= 1} [a >= k][b >= k]: products of 0/1 matrices clip and sum, exactly
    # (float32 up to 2^24). A column stands for the k-th occurrence of one n-gram in a line. The
    # cells are nearly sorted, which numpy's stable sort makes use of.
    cells = np.sort((gram * (B * U) + owner)[occurs], kind="stable")
    first = np.flatnonzero(np.concatenate([[True], cells[1:] != cells[:-1]]))
    k = np.arange(cells.size) - np.repeat(first, np.diff(first, append=cells.size))
    gram, owner = np.divmod(cells, B * U)
    starts = np.flatnonzero(np.concatenate([[True], gram[1:] != gram[:-1]]))
    most = np.maximum.reduceat(k, starts) + 1
    columns = np.repeat(np.cumsum(most) - most, np.diff(starts, append=cells.size)) + k

    # A block of columns for each order and sentence
    block = np.repeat(np.arange(order), occurs.sum(axis=1)) * B + owner // U
    begin = np.flatnonzero(np.concatenate([[True], block[1:] != block[:-1]]))
    within = columns - np.repeat(columns[begin], np.diff(begin, append=cells.size))
    reached = np.zeros((order * B, U, int(within.max()) + 1), dtype=np.float32)
    reached[block, owner % U, within] = 1
    return (reached @ reached.transpose(0, 2, 1)).reshape(order, B, U, U), totals


def _bleu(matches: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Return sentence BLEU [B, U, U] over the orders that the hypothesis (row) has n-grams of."""
    orders = (totals > 0).sum(axis=0)
    missed = orders[:, :, None] - (matches > 0).sum(axis=0)
    product = np.maximum(matches, 1, dtype=np.float64).prod(axis=0)
    product *= SMOOTHING[missed]
    product /= np.maximum(totals, 1.0).prod(axis=0)[:, :, None]
    length = totals[0]
    brevity = np.exp(np.minimum(1 - length[:, None, :] / np.maximum(length, 1)[:, :, None], 0))
    mean = product ** (1 / np.maximum(orders, 1))[:, :, None]
    return 100 * brevity * mean * (matches[0] > 0)


def _chrf(matches: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Return sentence chrF [B, U, U], averaging over the orders that both texts have n-grams of."""
    hypothesis, reference = totals[:, :, :, None], totals[:, :, None, :]
    used = np.maximum(((hypothesis > 0) & (reference > 0)).sum(axis=0), 1)
    precision = (matches / np.maximum(hypothesis, 1)).sum(axis=0) / used
    recall = (matches / np.maximum(reference, 1)).sum(axis=0) / used
    weighted = CHRF_BETA**2 * precision + recall
    return 100 * (1 + CHRF_BETA**2) * precision * recall / np.where(weighted > 0, weighted, 1)
