"""Minimum-Bayes-risk selection among the candidate translations of a sentence.

The utilities are sacreBLEU's sentence scores (version 2, default settings), computed for all
pairs of candidates of all sentences of a batch at once.
"""
# B sentences, C candidates per sentence, U distinct texts among them

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import chain, count

import numpy as np
from sacrebleu import BLEU

from fastdiss_cli.errors import FastdissError

UTILITIES = ("bleu", "chrf")
BLEU_ORDER = 4
# The k-th order without any match counts as 2^-k matches: m such orders give a factor of
# 2^-(1 + ... + m).
SMOOTHING = np.exp2([-m * (m + 1) / 2 for m in range(BLEU_ORDER + 1)])
CHRF_ORDER = 6
CHRF_BETA = 2
TOGETHER = 16  # sentences whose n-grams are counted at once: more need memory and save no time
CHARACTERS_KEPT = 2**19  # the size of the cache of words

_tokenizer_13a = BLEU(effective_order=True).tokenizer


def expected_utilities(
    sentences: Sequence[Sequence[str]],
    metric: str = "bleu",
    weights: Sequence[Sequence[float]] | None = None,
) -> list[np.ndarray]:
    """Average the utility of each candidate of a sentence over the other candidates, or over all.

    A repeated text counts as often as it occurs, and equal texts get equal values, bit for bit. A
    single candidate is scored against itself. Sentences share calls, but do not affect each other.

    Args:
        sentences: the C candidates of each, detokenized; empty texts are allowed.
        metric: "bleu" or "chrf".
        weights: C positive weights for each sentence, for a mean over all C candidates; None: the
            mean over the C - 1 others.

    Returns:
        Mean utilities in 0..100 for each sentence, float64 [C]; the largest marks the candidate
        to choose.

    Raises:
        FastdissError: the metric is unknown.

    Source: Kumar and Byrne 2004 (minimum Bayes risk).
    """
    found = []
    for start in range(0, len(sentences), TOGETHER):
        distinct = [_distinct(candidates) for candidates in sentences[start : start + TOGETHER]]
        pairs = pairwise_utilities([texts for texts, _ in distinct], metric)
        for number, (utilities, (texts, index)) in enumerate(
            zip(pairs, distinct, strict=True), start
        ):
            if weights is not None:
                votes = np.bincount(index, weights[number])
                utilities = utilities * votes / votes.sum()
            elif len(index) > 1:
                others = np.bincount(index) - np.eye(len(texts))
                utilities = utilities * others / (len(index) - 1)
            found.append(utilities.sum(axis=1)[index])
    return found


def _distinct(candidates: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Return the U distinct texts and each candidate's index among them [C]."""
    places: dict[str, int] = {}
    index = [places.setdefault(text, len(places)) for text in candidates]
    return list(places), np.array(index, dtype=np.int64)


def pairwise_utilities(
    sentences: Sequence[Sequence[str]], metric: str = "bleu"
) -> list[np.ndarray]:
    """Score every text of a sentence as hypothesis against every text as the only reference.

    Entry [i, j] is sacreBLEU's sentence score of text i against text j, by
    ``BLEU(effective_order=True)`` (13a tokens, exponential smoothing) or by ``CHRF()``
    (characters without white space, beta 2).

    Args:
        sentences: the U texts of each, detokenized; empty texts are allowed.
        metric: "bleu" or "chrf".

    Returns:
        Utilities in 0..100 for each sentence, float64 [U, U]; not symmetric.

    Raises:
        FastdissError: the metric is unknown.

    Source: Papineni et al. 2002 (BLEU); Chen and Cherry 2014, method 3 (smoothing); Popović
    2015 (chrF); Post 2018 (sacreBLEU).
    """
    if metric not in UTILITIES:
        raise FastdissError(f"unknown MBR metric {metric!r}: choose one of {', '.join(UTILITIES)}")
    if metric == "bleu":
        words = _word_cache()
        lines = [[_ids_13a(text, words) for text in texts] for texts in sentences]
        utilities = _bleu(*_match_ngrams(lines, BLEU_ORDER))
    else:
        lines = [[list(map(ord, "".join(text.split()))) for text in texts] for texts in sentences]
        utilities = _chrf(*_match_ngrams(lines, CHRF_ORDER))
    return [utilities[b, : len(texts), : len(texts)] for b, texts in enumerate(sentences)]


class _Words(dict[str, list[int]]):
    """A cache from words to the numbers of their 13a tokens: candidates share most words."""

    def __init__(self) -> None:
        self.tokens: defaultdict[str, int] = defaultdict(count().__next__)
        self.characters = 0  # tokenized so far

    def __missing__(self, word: str) -> list[int]:
        ids = self[word] = self.number(word)
        return ids

    def number(self, text: str) -> list[int]:
        """Tokenize a text and return the numbers of its tokens."""
        self.characters += len(text)
        return [self.tokens[token] for token in _tokenizer_13a(text).split()]


_words = _Words()


def _word_cache() -> _Words:
    """Return the cache of earlier calls, or a new one if it has grown too large."""
    global _words
    if _words.characters > CHARACTERS_KEPT:
        _words = _Words()
    return _words


def _ids_13a(text: str, words: _Words) -> list[int]:
    """Tokenize as sacreBLEU's 13a does, and return the numbers of the tokens."""
    text = text.rstrip()
    if "-\n" in text or "<skipped>" in text:  # 13a looks beyond single words only here
        return words.number(text)
    return list(chain.from_iterable(map(words.__getitem__, text.split())))


def _match_ngrams(
    sentences: Sequence[Sequence[Sequence[int]]], order: int
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

    # Row n - 1 holds the n-th token from each position on, 0 beyond the end of the line.
    flat = chain.from_iterable(chain.from_iterable(sentences))
    tokens = np.fromiter(flat, np.int64, lengths.sum()) + 1
    owner = np.repeat(np.arange(B * U), lengths.ravel())  # b * U + the line's number
    position = np.arange(owner.size) + owner * order
    padded = np.zeros(owner.size + B * U * order, np.min_scalar_type(tokens.max()))
    padded[position] = tokens
    window = padded[position + np.arange(order)[:, None]]

    # Sorted by sentence and by their longest n-grams, positions with equal n-grams of any order
    # are neighbours.
    sentence = np.repeat(np.arange(B, dtype=np.min_scalar_type(B)), lengths.sum(axis=1))
    ranking = np.lexsort((*window[::-1], sentence))
    window, owner = window.take(ranking, axis=1), owner[ranking]
    is_new = np.ones(window.shape, dtype=bool)
    np.not_equal(window[:, 1:], window[:, :-1], out=is_new[:, 1:])
    for n in range(1, order):
        is_new[n] |= is_new[n - 1]
    # distinct across orders; neighbouring sentences may share one, as their owners differ
    gram = np.cumsum(is_new).reshape(window.shape) - 1

    # min(a, b) = sum_{k >= 1} [a >= k][b >= k]: products of 0/1 matrices clip and sum, exactly
    # (float32 up to 2^24). A column stands for the k-th occurrence of one n-gram in a line. The
    # cells are nearly sorted, which numpy's stable sort exploits.
    cells = np.sort((gram * (B * U) + owner)[window > 0], kind="stable")
    gram, owner = np.divmod(cells, B * U)
    place = np.arange(cells.size)
    k = place - np.maximum.accumulate(np.where(_is_new(cells), place, 0))
    is_new = _is_new(gram)
    most = np.maximum.reduceat(k, np.flatnonzero(is_new)) + 1
    columns = (np.cumsum(most) - most)[np.cumsum(is_new) - 1] + k

    # A block of columns for each order and sentence
    sizes = totals.sum(axis=2).ravel()
    block = np.repeat(np.arange(order * B), sizes)
    begin = np.minimum(np.cumsum(sizes) - sizes, cells.size - 1)
    within = columns - columns[begin][block]
    width = int(within.max()) + 1
    reached = np.zeros((order * B, U, width), dtype=np.float32)
    reached.ravel()[(block * U + owner % U) * width + within] = 1
    return (reached @ reached.transpose(0, 2, 1)).reshape(order, B, U, U), totals


def _is_new(values: np.ndarray) -> np.ndarray:
    """Return whether each of some sorted values differs from the one before it."""
    return np.concatenate([[True], values[1:] != values[:-1]])


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
