"""Decoding shared out over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fastdiss_cli.decoding.generation import Run, decode
from fastdiss_cli.decoding.selection import Select
from fastdiss_cli.distributed import Processes
from fastdiss_cli.models.registry import Seq2SeqModel
from fastdiss_cli.signals import Stop


def decode_shared(
    model: Seq2SeqModel,
    sources: Sequence[Sequence[int]],
    runs: Sequence[Run],
    select: Select,
    max_tokens: int,
    processes: Processes,
    stop: Stop,
    *,
    first: int,
    dtype: torch.dtype,
    gold: Sequence[Sequence[int]] | None = None,
    done: Callable[[int], None] = lambda sentences: None,
) -> int:
    """Decode this rank's share of the batches and collect what the others have decoded.

    The batches are those of one process, and so the answers are the same to the last bit.

    Args:
        model, sources, runs, select, max_tokens, first, dtype, gold, done: as in `decode`, the
            same on all ranks. The seconds of a run are those of its slowest rank.
        processes: this process among the others.
        stop: after a signal this rank ends with the batch at hand; what is left stays None.

    Returns:
        The signal that any rank has received, or 0.

    Raises:
        CommonError: memory ran out on a rank.
    """
    own, before = [Run(run.options) for run in runs], runs[-1].sentences
    with processes.attempt("decoding") as tried:
        decode(
            model,
            sources,
            own,
            select,
            max_tokens,
            first,
            gold,
            dtype,
            done,
            stop=lambda: stop.signal,
            share=(processes.rank, processes.world_size),
        )
    signal = processes.agree(tried, stop)
    for run, parts in zip(runs, zip(*processes.gather([own]), strict=True), strict=True):
        answers = zip(*(part.best for part in parts), strict=True)
        run.best = [next(filter(None, found), None) for found in answers]
        run.seconds += max(part.seconds for part in parts)
        run.nfe += sum(part.nfe for part in parts)
        run.sentences += sum(part.sentences for part in parts)
    everywhere = runs[-1].sentences - before
    done(everywhere - own[-1].sentences)
    return signal
