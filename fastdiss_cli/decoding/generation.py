"""Decode a list of sentences: batches by length, one encoder pass for all ways of decoding."""
# B batch, S source length

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fastdiss_cli.data.batching import batches_by_tokens, pad
from fastdiss_cli.decoding.selection import Select
from fastdiss_cli.device import autocast, out_of_memory
from fastdiss_cli.errors import FastdissError
from fastdiss_cli.models.registry import Hypothesis, Seq2SeqModel


def default_max_tokens(device: torch.device) -> int:
    """Return a padded batch size that is fast: on a CPU one whose layers stay in its cache."""
    return 2000 if device.type == "cpu" else 8000


@dataclass
class Run:
    """One way of decoding (such as one step count), its answers and what they cost.

    Attributes:
        options: the model's `Decoding`.
        best: the chosen hypothesis of each sentence, in the order given; None where it is not
            decoded, by this rank or because a signal came.
        seconds: time spent, encoder included.
        nfe: decoder evaluations, summed over sentences.
    """

    options: Any
    best: list[Hypothesis | None] = field(default_factory=list)
    seconds: float = 0.0
    nfe: int = 0
    sentences: int = 0


@torch.inference_mode()
def decode(
    model: Seq2SeqModel,
    sources: Sequence[Sequence[int]],
    runs: Sequence[Run],
    select: Select,
    max_tokens: int,
    first: int = 0,
    gold: Sequence[Sequence[int]] | None = None,
    dtype: torch.dtype = torch.float32,
    done: Callable[[int], None] = lambda sentences: None,
    stop: Callable[[], int] = lambda: 0,
    share: tuple[int, int] = (0, 1),
) -> None:
    """Decode sentences in every given way; the answers are left in ``runs``.

    Args:
        model: in evaluation mode.
        sources: token ids, eos included; the answer to an empty sentence is empty.
        runs: `Run.best` is replaced, the costs are added up.
        select: chooses among the candidates.
        max_tokens: the largest padded size of a batch, all candidates counted.
        first: the number of the first sentence in the corpus.
        gold: the right answers, for options that diagnose with them.
        dtype: bfloat16 decodes under autocast.
        done: called with the number of sentences of each finished batch.
        stop: asked after each batch; if true, the sentences left over stay None in `Run.best`.
        share: (r, n): of every n batches only the r-th; the other sentences stay None.

    Raises:
        FastdissError: memory ran out.
    """
    lengths = np.array([len(tokens) for tokens in sources])
    order = np.argsort(-lengths, kind="stable")
    order, empty = order[lengths[order] > 1], np.flatnonzero(lengths <= 1)[share[0] :: share[1]]
    widest = max(run.options.candidates for run in runs)
    for run in runs:
        run.best = [None] * len(sources)
        for i in empty:  # eos alone: there is nothing to translate
            run.best[i] = Hypothesis([], 0.0, [], nfe=0)
            run.sentences += 1
    done(len(empty))
    batches = batches_by_tokens(order, lengths, max(max_tokens // widest, 1))
    for rows in batches[share[0] :: share[1]]:
        try:
            _decode_batch(model, rows, sources, runs, select, first, gold, dtype)
        except Exception as error:
            if not out_of_memory(error):
                raise
            longest = int(lengths[rows].max())
            raise FastdissError(
                f"out of memory decoding a batch of {len(rows)} sentences of at most {longest} "
                f"source tokens, {widest} candidates each: lower --max-tokens (now {max_tokens})"
            ) from None
        done(len(rows))
        if stop():
            break


def _decode_batch(
    model: Seq2SeqModel,
    rows: np.ndarray,
    sources: Sequence[Sequence[int]],
    runs: Sequence[Run],
    select: Select,
    first: int,
    gold: Sequence[Sequence[int]] | None,
    dtype: torch.dtype,
) -> None:
    device = next(model.parameters()).device
    batch = [sources[i] for i in rows]
    answers = None if gold is None else [gold[i] for i in rows]
    sentences = torch.from_numpy(rows + first).to(device)
    start = time.perf_counter()
    with autocast(device, dtype):
        memory = model.encode(*(x.to(device) for x in pad(batch, model.src.pad)))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        encoding = time.perf_counter() - start
        for run in runs:
            start = time.perf_counter()
            candidates = model.decode(memory, sentences, run.options, answers)
            chosen = select(batch, candidates)
            run.seconds += encoding + time.perf_counter() - start
            run.nfe += sum(h.nfe for h in chosen)
            run.sentences += len(chosen)
            for i, hypothesis in zip(rows, chosen, strict=True):
                run.best[i] = hypothesis
