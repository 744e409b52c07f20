"""MBR utilities: equal to sacreBLEU's sentence scores, and correctly averaged."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu import BLEU, CHRF

from fastdiss_cli.decoding import mbr
from fastdiss_cli.decoding.mbr import TOGETHER, expected_utilities, pairwise_utilities
from fastdiss_cli.decoding.selection import by_mbr
from fastdiss_cli.errors import FastdissError
from fastdiss_cli.models.registry import Hypothesis

SCORERS = {"bleu": BLEU(effective_order=True), "chrf": CHRF()}

# Few distinct words, so that n-grams repeat within and between the candidates.
WORDS = ["a", "b", "the", "The", "3.5", "1,000", "-", "5-7", "e.g.", "...", "(so)", "&quot;", "ß"]
PIECES = [*WORDS, *".,é\n\t\u2003\0", "e\u0301", "日本", "<skipped>", "x-\ny"]
sentences = st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join)
jumbles = st.lists(st.sampled_from([*PIECES, " "]), max_size=12).map("".join)
anything = st.text(max_size=15)
candidate_lists = st.lists(st.one_of(sentences, jumbles, anything), min_size=1, max_size=6)


def pairwise(candidates: list[str], metric: str) -> np.ndarray:
    score = SCORERS[metric].sentence_score
    return np.array([[score(hyp, [ref]).score for ref in candidates] for hyp in candidates])


def pairwise_utility(texts: list[str], metric: str = "bleu") -> np.ndarray:
    (found,) = pairwise_utilities([texts], metric)
    return found


def expected_utility(candidates: list[str], metric: str = "bleu") -> np.ndarray:
    (found,) = expected_utilities([candidates], metric)
    return found


def check(candidates: list[str], metric: str) -> None:
    found = pairwise_utility(candidates, metric)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, pairwise(candidates, metric), rtol=0, atol=1e-9)


@pytest.mark.parametrize("metric", SCORERS)
@settings(max_examples=150, derandomize=True, deadline=None)
@given(candidates=candidate_lists)
def test_matrix_equals_sacrebleu(metric: str, candidates: list[str]) -> None:
    check(candidates, metric)


@pytest.mark.parametrize("metric", SCORERS)
@pytest.mark.parametrize(
    "candidates",
    [
        [""],
        ["", "   \n", "word", "word."],
        ["word", "word", "", "two words", "now three words", "there are four words"],
        ["the the the the the the the", "the cat is on the mat", "the the cat the the cat"],
        ["a" * 700, "a" * 299 + "b", "ab " * 300],  # counts beyond one byte
        ["Größe: 3,5 m²!", "Grösse: 3.5 m2.", "大きさは三・五平方メートル。", "\ud800 x"],
        ["x-\ny a", "xy a", "x- y a", "x-<skipped>\ny", "1<skipped>.5 b", "1.5 b"],
        [chr(0x4E00 + i) + chr(0x4E01 + i) for i in range(400)][::20],
        [" ".join(str(i * k % 307) for i in range(310)) for k in (1, 2, 3)],  # > 255 words
    ],
    ids=lambda c: repr(c[0][:8]),
)
def test_matrix_equals_sacrebleu_on_awkward_texts(candidates: list[str], metric: str) -> None:
    check(candidates, metric)


def test_closed_form_bleu() -> None:
    # 1 of 3 words match, no bigram (1/2 of a match among 2), no trigram (1/4 among 1).
    short = 100 * (1 / 3 * 1 / 4 * 1 / 4) ** (1 / 3)
    # 1 of 4 words; orders without a match: 1/2 of 3, 1/4 of 2, 1/8 of 1.
    long = 100 * (1 / 4 * 1 / 6 * 1 / 8 * 1 / 8) ** (1 / 4)
    expected = [[100, short * math.exp(1 - 4 / 3)], [long, 100]]
    np.testing.assert_allclose(pairwise_utility(["a b c", "a x y z"]), expected, rtol=1e-12)


def test_closed_form_chrf() -> None:
    # Orders 1 and 2 count: precision (2/2 + 1/1) / 2, recall (2/3 + 1/2) / 2.
    precision, recall = 1, 7 / 12
    expected = 100 * 5 * precision * recall / (4 * precision + recall)
    assert pairwise_utility(["ab", "a b c"], "chrf")[0, 1] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("metric", SCORERS)
def test_expected_utility_averages_over_the_others(metric: str) -> None:
    candidates = ["a b c d", "a b c", "a b c d", "b c d e f", "a b c d", "", ""]
    matrix = pairwise(candidates, metric)
    np.fill_diagonal(matrix, 0)
    found = expected_utility(candidates, metric)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, matrix.sum(axis=1) / 6, rtol=0, atol=1e-9)
    assert found[0] == found[2] == found[4]


@pytest.mark.parametrize("metric", SCORERS)
def test_weights_make_it_a_mean_over_all(metric: str) -> None:
    rows = [["a b c d", "a b c", "a b c d", ""], *[["b c d e f"]] * TOGETHER, ["x y", "x z"]]
    weights = [[0.1, 0.5, 0.3, 0.2], *[[0.7]] * TOGETHER, [2.0, 1.0]]
    found = expected_utilities(rows, metric, weights)
    for texts, own, values in zip(rows, weights, found, strict=True):
        expected = pairwise(texts, metric) @ own / sum(own)
        np.testing.assert_allclose(values, expected, rtol=0, atol=1e-9)
    assert found[0][0] == found[0][2] and found[-1][0] > found[-1][1]


def test_ties_go_to_the_better_score() -> None:
    """Rounding makes the sums of these two groups of three differ in the last digits."""
    one, other = [3, 2, 1, 2, 2, 1, 2], [2, 0, 2, 1, 1, 2, 3]
    row = [[0, 2, 2, 3, 2, 2, 3], one, one, other, other, other, one]
    texts = [" ".join("abcd"[i] for i in ids) for ids in row]
    (utilities,) = expected_utilities([texts])
    assert int(np.argmax(utilities)) == 3 and utilities[3] - utilities[1] < 1e-9

    class Letters:
        def decode(self, ids: list[int]) -> str:
            return " ".join("abcd"[i] for i in ids)

    candidates = [Hypothesis(ids, -i, [], 1) for i, ids in enumerate(row)]
    for weights in ("equal", "length"):
        assert by_mbr(Letters(), "bleu", weights)([[0]], [candidates]) == [candidates[1]]


def test_duplicates_outvote_a_single_candidate() -> None:
    found = expected_utility(["p q r s", "a b c d", "a b c d"])
    np.testing.assert_allclose(found, [0, 50, 50], rtol=0, atol=1e-9)


@pytest.mark.parametrize(("text", "utility"), [("one two", 100.0), ("", 0.0)])
def test_single_candidate_is_scored_against_itself(text: str, utility: float) -> None:
    assert expected_utility([text]) == pytest.approx([utility])


@pytest.mark.parametrize("metric", SCORERS)
@settings(max_examples=60, derandomize=True, deadline=None)
@given(batch=st.lists(candidate_lists, max_size=5))
def test_sentences_do_not_know_of_each_other(metric: str, batch: list[list[str]]) -> None:
    """Alone or in a mixed batch of lengths and numbers of candidates: equal bit for bit."""
    found = expected_utilities(batch, metric)
    assert len(found) == len(batch)
    for values, candidates in zip(found, batch, strict=True):
        assert values.tolist() == expected_utility(candidates, metric).tolist()


def test_more_sentences_than_are_counted_at_once() -> None:
    batch = [[f"a b {i}", f"a b {i % 7} c", "x"] for i in range(2 * TOGETHER + 1)]
    batch[3:5] = [["a a a a a", "a a"], ["a a a", "a a a a a a", "a"]]  # nothing else between
    for values, candidates in zip(expected_utilities(batch), batch, strict=True):
        assert values.tolist() == expected_utility(candidates).tolist()


def test_words_are_forgotten_when_they_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """An endless stream of text does not fill the memory, and no value changes."""
    monkeypatch.setattr(mbr, "CHARACTERS_KEPT", 9)
    for number in range(4):
        check([f"x{number} y{number}, z", f"x{number} y z{number}", f"x y{number}."], "bleu")
        assert len(mbr._words) <= 7
    for number in range(4):  # never word by word
        check([f"a<skipped>{number}", f"b<skipped>{number} c"], "bleu")
        assert len(mbr._words.tokens) <= 3
    check(["long" * 99, "word" * 99], "bleu")  # few, but large
    check(["a", "b"], "bleu")
    assert len(mbr._words) == 2


def test_no_candidates() -> None:
    assert expected_utilities([]) == []
    assert pairwise_utility([]).shape == (0, 0)
    assert expected_utility([], "chrf").shape == (0,)


@pytest.mark.parametrize("function", [pairwise_utility, expected_utility])
def test_unknown_metric(function) -> None:
    with pytest.raises(FastdissError, match=r"'ter'.*bleu, chrf"):
        function(["a", "b"], "ter")
