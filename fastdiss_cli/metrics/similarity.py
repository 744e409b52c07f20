"""ROUGE and BERTScore, computed by the packages that define them: means over sentences."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastdiss_cli.errors import FastdissError
from fastdiss_cli.extras import load_extra
from fastdiss_cli.metrics.ratio import RatioMetric

BERTSCORE_MODEL = "roberta-large"  # bert-score's own choice for English


class ROUGE(RatioMetric):
    """F1 of n-grams or of the longest common subsequence with the nearest reference.

    Without stemming. rouge-score's tokens are runs of a-z and 0-9 in lower case: text in other
    alphabets has no tokens.

    Args:
        kind: ``1``, ``2`` (n-grams) or ``L`` (longest common subsequence of a sentence).

    Raises:
        FastdissError: the package rouge-score is not installed.

    Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries".
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.name, self._key = f"ROUGE-{kind}", f"rouge{kind}"
        scorer = load_extra("rouge_score.rouge_scorer", "rouge", self._key)
        self._scorer = scorer.RougeScorer([self._key])

    def signature_fields(self) -> dict[str, str]:
        return {"stem": "no", "rouge-score": version("rouge-score")}

    def measure(self, hypothesis: str, references: list[str]) -> tuple[float, int]:
        return self._scorer.score_multi(references, hypothesis)[self._key].fmeasure, 1


ROUGES = {f"rouge{kind}": partial(ROUGE, kind) for kind in "12L"}


class BERTScore(RatioMetric):
    """F1 of contextual embeddings with the nearest reference, neither weighted nor rescaled.

    Args:
        model: a name that bert-score knows, or a folder of that name that holds the model.

    Raises:
        FastdissError: the package bert-score is not installed or does not know the model, or the
            model cannot be loaded.

    Source: Zhang et al. 2020, "BERTScore: Evaluating Text Generation with BERT".
    """

    name = "BERTScore"

    def __init__(self, model: str = BERTSCORE_MODEL) -> None:
        super().__init__()
        self._model = Path(model).name
        self._scorer = _load_model(model)
        self._cache: dict[Hashable, list[tuple[float, float]]] = {}

    def signature_fields(self) -> dict[str, str]:
        layer = str(self._scorer.num_layers)
        return {"model": self._model, "layer": layer, "bert-score": version("bert-score")}

    def measure(self, hypothesis: str, references: list[str]) -> tuple[float, float]:
        return self.measure_all([hypothesis], [references])[0]

    def measure_all(
        self, hypotheses: Sequence[str], references: list[list[str]]
    ) -> list[tuple[float, float]]:
        key = (*hypotheses, *map(tuple, references))  # a paired test computes them again
        if key not in self._cache:
            f1 = self._scorer.score(list(hypotheses), references)[2]
            self._cache[key] = [(value, 1) for value in f1.tolist()]
        return self._cache[key]


def _load_model(model: str) -> Any:
    package = load_extra("bert_score", "bertscore", "bertscore")
    layers = package.utils.model2layers
    # a folder may be named MODEL or OWNER/MODEL
    names = [model, Path(model).name, "/".join(Path(model).parts[-2:])]
    layer = next((layers[name] for name in names if name in layers), None)
    if layer is None:
        raise FastdissError(
            f"--bertscore-model {model}: bert-score does not know this model; it knows "
            "roberta-large, bert-base-multilingual-cased, microsoft/deberta-xlarge-mnli and others"
        )
    quiet = load_extra("transformers.utils.logging", "bertscore", "bertscore")
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    try:
        scorer = package.BERTScorer(model_type=model, num_layers=layer)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise FastdissError(
            f"bertscore: cannot load {model}: {reason} (offline, put the model "
            f"in a folder and pass --bertscore-model FOLDER/{Path(model).name})"
        ) from None
    # bert-score truncates to the tokenizer's limit; some have none and report 10^30
    limit = scorer._model.config.max_position_embeddings
    scorer._tokenizer.model_max_length = min(scorer._tokenizer.model_max_length, limit)
    return scorer
