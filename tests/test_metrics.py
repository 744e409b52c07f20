"""The metrics that sacreBLEU does not have, and the paired tests."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdiss_cli.decoding.output import reference_streams
from fastdiss_cli.metrics import METRICS, edit_distance, paired_test

WORDS = st.lists(st.sampled_from("abc"), max_size=5)


def score(name: str, hypotheses: list[str], references: list[list[str]]) -> float:
    return METRICS[name]().corpus_score(hypotheses, reference_streams(references)).score


def slow_edit_distance(a: list[str], b: list[str]) -> int:
    if not a or not b:
        return len(a) + len(b)
    replaced = slow_edit_distance(a[1:], b[1:]) + (a[0] != b[0])
    return min(replaced, slow_edit_distance(a[1:], b) + 1, slow_edit_distance(a, b[1:]) + 1)


@given(WORDS, WORDS)
def test_edit_distance_is_its_definition(a: list[str], b: list[str]) -> None:
    assert edit_distance(a, b) == slow_edit_distance(a, b)


def test_word_error_rate_counts_edits_to_the_nearest_reference() -> None:
    # 1 edit to the second reference of 4 words, 0 of 2, and 3 insertions against 1 word
    hypotheses = ["a b c x", "d e", "f f f f"]
    references = [["q r", "a b c d"], ["d e"], ["f"]]
    assert score("wer", hypotheses, references) == pytest.approx(100 * (1 + 0 + 3) / (4 + 2 + 1))


def test_sentence_error_rate_counts_sentences_that_equal_no_reference() -> None:
    assert score("ser", ["a b", "c", " d  e "], [["x", "a b"], ["d"], ["d e"]]) == pytest.approx(
        100 / 3
    )


def test_repetition_counts_equal_neighbours() -> None:
    # 2 of 3 pairs, 0 of 0, 0 of 2: not adjacent
    assert score("repetition", ["a a a b", "c", "d e d"], [["x"]] * 3) == pytest.approx(40)


def test_metrics_have_signatures() -> None:
    for name, metric in METRICS.items():
        used = metric()
        used.corpus_score(["a", "b"], [["a", "c"]])
        assert "version:" in used.get_signature().format(), name


@pytest.mark.parametrize("test", ["bs", "ar"])
def test_a_better_system_is_told_from_an_equal_one(test: str) -> None:
    draw = random.Random(1)
    references = [" ".join(draw.choices("abcdefgh", k=9)) for _ in range(60)]

    def worsened(share: float) -> list[str]:
        return [
            " ".join("?" if draw.random() < share else word for word in line.split())
            for line in references
        ]

    poor, other, good = worsened(0.5), worsened(0.5), worsened(0.1)
    (_, before, after, p, signature), wer = paired_test(
        poor, good, [references], ["bleu", "wer"], test
    )
    assert after > before + 30 and p < 0.01 and f"{test}:" in signature
    assert wer[2] < wer[1] - 30 and wer[3] < 0.01
    assert paired_test(poor, other, [references], ["bleu"], test)[0][3] > 0.05
