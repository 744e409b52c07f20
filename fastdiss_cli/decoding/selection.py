"""Choose one hypothesis among a sentence's candidates."""
# B sentences, C candidates

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from fastdiss_cli.data.batching import pad
from fastdiss_cli.data.tokenizer import Tokenizer, check_same
from fastdiss_cli.decoding.mbr import UTILITIES, expected_utilities
from fastdiss_cli.device import autocast
from fastdiss_cli.errors import FastdissError, OptionError
from fastdiss_cli.models.registry import Hypothesis, Seq2SeqModel

if TYPE_CHECKING:
    from fastdiss_cli.checkpoints.loading import Loaded

METHODS = ("score", "mbr", "rerank")
MBR_WEIGHTS = ("length", "equal")
MBR_METRIC = UTILITIES[0]  # the defaults
MBR_WEIGHT = MBR_WEIGHTS[0]

# (sources [B], candidates [B][C]) -> the chosen one of each sentence
Select = Callable[[Sequence[Sequence[int]], list[list[Hypothesis]]], list[Hypothesis]]


def check_selection(
    method: str | None, metric: str | None, weights: str | None, reranked: bool
) -> None:
    """Check the options of selection, without loading anything.

    Args:
        method: one of `METHODS`; None: the default of the model, or ``rerank`` if there is a
            reranker.
        metric: the metric of MBR, one of `mbr.UTILITIES`; None: `MBR_METRIC`.
        weights: the weights of MBR, one of `MBR_WEIGHTS`; None: `MBR_WEIGHT`.
        reranked: whether there is a reranker.

    Raises:
        OptionError: an option is unknown, there are options of MBR without it, or a reranker is
            missing or unused.
    """
    if method not in (None, *METHODS):
        raise OptionError("select", f"{method}: choose from {', '.join(METHODS)}")
    if metric not in (None, *UTILITIES):
        raise OptionError("mbr_metric", f"{metric}: choose from {', '.join(UTILITIES)}")
    if weights not in (None, *MBR_WEIGHTS):
        raise OptionError("mbr_weights", f"{weights}: choose from {', '.join(MBR_WEIGHTS)}")
    if method is not None and (method == "rerank") != reranked:
        needs = "needs a transformer: --rerank-path CHECKPOINT (in Python, reranker=)"
        wanted = needs if method == "rerank" else "takes no reranker"
        raise OptionError("select", f"{method} {wanted}")
    for name, value in (("mbr_metric", metric), ("mbr_weights", weights)):
        if value is not None and method not in (None, "mbr"):
            raise OptionError(name, f"applies to mbr, not to {method}")


def check_reranker(model: Loaded, reranker: Loaded) -> None:
    """Refuse a reranker that has other tokenizers or the opposite direction.

    Raises:
        FastdissError: it does not fit.
    """
    theirs = reranker.src, reranker.tgt
    check_same((model.src, model.tgt), theirs, "the reranker", "train both on one dataset")
    source, target = model.languages
    if source != target and reranker.languages == (target, source):  # if tokenizers are joined
        raise FastdissError(
            f"the reranker translates from {target} to {source}, "
            f"the model from {source} to {target}"
        )


def selector(
    model: Loaded,
    method: str | None,
    metric: str | None,
    weights: str | None,
    reranker: Loaded | None,
) -> tuple[str, Select]:
    """Return how to choose among a model's candidates: the name of the method and its function.

    Arguments and errors are those of `check_selection` and `check_reranker`.
    """
    if method is None:
        method = "rerank" if reranker else model.model.default_select
    check_selection(method, metric, weights, reranker is not None)
    if reranker is not None:
        check_reranker(model, reranker)
        return method, by_reranking(reranker.model, reranker.dtype)
    if method == "mbr":
        return method, by_mbr(model.tgt, metric or MBR_METRIC, weights or MBR_WEIGHT)
    return method, by_score


def by_score(
    sources: Sequence[Sequence[int]], candidates: list[list[Hypothesis]]
) -> list[Hypothesis]:
    """Choose the candidate that the model itself scores highest, which is the first."""
    return [row[0] for row in candidates]


def by_mbr(tokenizer: Tokenizer, metric: str, weights: str) -> Select:
    """Choose the candidate with the highest expected utility.

    Ties, up to rounding, go to the candidate with the best score, which is the first.

    Args:
        tokenizer: of the target side.
        metric: a sentence metric of `mbr.UTILITIES`.
        weights: ``length``: the expectation is over all candidates, each as likely as its length
            (`Hypothesis.weight`); ``equal``: it is the plain mean over the other candidates.

    Source: Kumar & Byrne 2004, "Minimum Bayes-risk decoding for statistical machine translation".
    """

    def select(
        sources: Sequence[Sequence[int]], candidates: list[list[Hypothesis]]
    ) -> list[Hypothesis]:
        if all(len(row) == 1 for row in candidates):
            return by_score(sources, candidates)
        texts = [[tokenizer.decode(h.tokens) for h in row] for row in candidates]
        likely = [[h.weight for h in row] for row in candidates] if weights == "length" else None
        utilities = expected_utilities(texts, metric, likely)
        best = [int(np.argmax(np.round(values, 9))) for values in utilities]
        return [row[i] for row, i in zip(candidates, best, strict=True)]

    return select


def by_reranking(reranker: Seq2SeqModel, dtype: torch.dtype = torch.float32) -> Select:
    """Choose the candidate with the highest mean log-probability of a token, eos included.

    It is that of an autoregressive model.

    Args:
        reranker: a model that has ``log_likelihood``, with the same tokenizers.
        dtype: the type that it computes in, which may differ from that of the other model.

    Raises:
        FastdissError: the reranker cannot score given answers.
    """
    if not hasattr(reranker, "log_likelihood"):
        raise FastdissError("the reranker must be a `transformer` checkpoint: only it can rerank")
    device = reranker.device

    def select(
        sources: Sequence[Sequence[int]], candidates: list[list[Hypothesis]]
    ) -> list[Hypothesis]:
        C = max(len(row) for row in candidates)
        full = [row + row[:1] * (C - len(row)) for row in candidates]
        src_tokens, layout = (x.to(device) for x in pad(sources, reranker.src.pad))
        answers = [h.tokens for row in full for h in row]
        with autocast(device, dtype):
            scores = reranker.log_likelihood(reranker.encode(src_tokens, layout), answers)
        best = scores.view(len(candidates), C).argmax(dim=1).tolist()
        return [row[i] for row, i in zip(full, best, strict=True)]

    return select


def with_runners_up(select: Select, count: int) -> Select:
    """Attach the best-scored other candidates to the chosen one, as its `runners_up`.

    Args:
        select: chooses the best candidate.
        count: the maximum number of others.
    """

    def select_all(
        sources: Sequence[Sequence[int]], candidates: list[list[Hypothesis]]
    ) -> list[Hypothesis]:
        chosen = select(sources, candidates)
        for best, row in zip(chosen, candidates, strict=True):
            best.runners_up = [h for h in row if h is not best][:count]
        return chosen

    return select_all
