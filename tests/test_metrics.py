"""The metrics that sacreBLEU does not have, and the paired tests."""

from __future__ import annotations

import random
import sys
from itertools import permutations
from statistics import fmean
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st

from fastdiss_cli.decoding.systems import reference_streams
from fastdiss_cli.errors import FastdissError
from fastdiss_cli.metrics import DIVERSITY, METRICS, paired_test, prepare, similarity
from fastdiss_cli.metrics.rates import edit_distance

EXTRAS = {"rouge1", "rouge2", "rougeL", "bertscore"}
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
        if name in EXTRAS:
            continue
        used = metric()
        used.corpus_score(["a", "b"], [["a", "c"]])
        assert "version:" in used.get_signature().format(), name


@pytest.mark.parametrize("test", ["bs", "ar"])
def test_a_better_system_differs_from_an_equal_one(test: str) -> None:
    draw = random.Random(1)
    references = [" ".join(draw.choices("abcdefgh", k=9)) for _ in range(60)]

    def worsened(share: float) -> list[str]:
        return [
            " ".join("?" if draw.random() < share else word for word in line.split())
            for line in references
        ]

    poor, other, good = worsened(0.5), worsened(0.5), worsened(0.1)
    systems, metrics = [poor, good, other], {name: METRICS[name]() for name in ("bleu", "wer")}
    bleu, wer = paired_test(systems, [references], metrics, test)
    assert bleu.name == "BLEU" and f"{test}:" in bleu.signature
    before, after, as_poor = bleu.results
    assert before.p_value is None and after.score > before.score + 30 and after.p_value < 0.01
    assert abs(as_poor.score - before.score) < 5 and as_poor.p_value > 0.05
    assert wer.results[1].score < wer.results[0].score - 30 and wer.results[1].p_value < 0.01


# extras


def test_rouge_is_rouge_score() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer")
    hypotheses = ["police killed the gunman", "The cat, sat!", "", "running dogs run"]
    references = [
        ["police kill the gunman", "the gunman police killed"],
        ["a cat sat on the mat"],
        ["nothing"],
        ["the dog runs", "dogs run"],
    ]
    theirs = scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    for key in ("rouge1", "rouge2", "rougeL"):
        best = [
            max(theirs.score(reference, hypothesis)[key].fmeasure for reference in row)
            for hypothesis, row in zip(hypotheses, references, strict=True)
        ]
        assert score(key, hypotheses, references) == pytest.approx(100 * fmean(best))
    # Lin 2004, section 3: the same words in two orders
    police = [["police killed the gunman"]]
    assert score("rougeL", ["police kill the gunman"], police) == pytest.approx(75)
    assert score("rougeL", ["the gunman kill police"], police) == pytest.approx(50)
    signature = METRICS["rouge1"]()
    signature.corpus_score(hypotheses, reference_streams(references))
    assert "nrefs:var|stem:no|rouge-score:" in signature.get_signature().format()


@pytest.mark.parametrize(
    ("name", "package"), [("rouge2", "rouge_score.rouge_scorer"), ("bertscore", "bert_score")]
)
def test_an_extra_that_is_not_there_is_one_line(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(FastdissError, match=rf"{name} needs {package}.*: pip install 'fastdiss\["):
        METRICS[name]()


class FakeBert(ModuleType):
    """bert-score without weights: F1 is 1 for equal texts, else 0.5."""

    def __init__(self, models: set[str]) -> None:
        super().__init__("bert_score")
        self.utils = SimpleNamespace(model2layers={"roberta-large": 17, "xlm": 3})
        self.models = models

    def BERTScorer(self, model_type: str, num_layers: int) -> SimpleNamespace:
        if model_type not in self.models:
            raise OSError(f"{model_type} is not a local folder\nand more")
        config = SimpleNamespace(max_position_embeddings=9)
        return SimpleNamespace(
            num_layers=num_layers,
            score=self.score,
            _tokenizer=SimpleNamespace(model_max_length=10**30),
            _model=SimpleNamespace(config=config),
        )

    def score(self, hypotheses: list[str], references: list[list[str]]) -> tuple:
        pairs = zip(hypotheses, references, strict=True)
        best = [max((1 + (h == r)) / 2 for r in row) for h, row in pairs]
        return None, None, np.array(best)


def test_bertscore_is_a_mean_over_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are too large for a test, so this covers all but the network."""
    fake = FakeBert({"models/xlm"})
    monkeypatch.setitem(sys.modules, "bert_score", fake)
    silent = SimpleNamespace(set_verbosity_error=list, disable_progress_bar=list)
    monkeypatch.setitem(sys.modules, "transformers.utils.logging", silent)
    monkeypatch.setattr(similarity, "version", lambda package: "0.3.13")
    with pytest.raises(FastdissError, match=r"cannot load roberta-large: .* local folder "):
        METRICS["bertscore"]()
    with pytest.raises(FastdissError, match=r"--bertscore-model other: .* does not know"):
        similarity.BERTScore("other")
    metric = similarity.BERTScore("models/xlm")
    assert metric._scorer._tokenizer.model_max_length == 9
    result = metric.corpus_score(["a", "b"], reference_streams([["x", "a"], ["y"]]))
    assert result.score == pytest.approx(75)
    output = metric.get_signature().format()
    assert output.startswith("nrefs:var|model:xlm|layer:3|bert-score:0.3.13|")
    prepare(metric, [["a", "b"]])
    (with_self,) = paired_test([["a", "c"], ["a", "b"]], None, {"bertscore": metric})
    assert with_self.name == "BERTScore"
    assert [result.score for result in with_self.results] == [75.0, 100.0]
    monkeypatch.setattr(metric, "_scorer", None)  # cached scores are not computed again
    assert metric.corpus_score(["a", "c"], [["a", "b"]]).score == 75


# diversity


def diversity(name: str, candidates: list[list[str]]) -> float:
    return DIVERSITY[name]().corpus_score(candidates).score


def test_distinct_counts_different_ngrams() -> None:
    answers = [["a b a b", "not looked at"], ["a b c"], [""]]
    # words: a b a b a b c; pairs: ab ba ab | ab bc
    assert diversity("distinct1", answers) == pytest.approx(100 * 3 / 7)
    assert diversity("distinct2", answers) == pytest.approx(100 * 3 / 5)
    assert diversity("sentence-distinct", answers) == pytest.approx(100 * (2 / 4 + 1 + 0) / 3)
    assert diversity("distinct2", [["one"]]) == 0
    for name in ("distinct1", "sentence-distinct", "self-bleu"):
        assert "version:" in DIVERSITY[name]().get_signature().format()


def test_self_bleu_is_the_mean_over_ordered_pairs_of_candidates() -> None:
    rows = [
        ["a dog runs on the grass", "a dog runs on grass", "the dog is running"],
        ["it rains", "it rains"],
    ]
    bleu = sacrebleu.BLEU(effective_order=True)
    means = [
        fmean(bleu.sentence_score(a, [b]).score for a, b in permutations(row, 2)) for row in rows
    ]
    assert diversity("self-bleu", rows) == pytest.approx(fmean(means))
    assert diversity("self-bleu", [["a b c d"] * 3]) == pytest.approx(100)
    assert diversity("self-bleu", [["a b", "c d"]]) == 0
    assert diversity("self-bleu", [["a b c d"] * 3, [""]]) == pytest.approx(100)
    with pytest.raises(FastdissError, match=r"self-bleu needs several .* --nbest 5"):
        diversity("self-bleu", [["a", "b"], ["c"]])
