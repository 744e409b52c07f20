"""Decoding shared out over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastdiss_cli.decoding.generation import Run, decode
from fastdiss_cli.decoding.selection import Select
from fastdiss_cli.models.registry import Seq2SeqModel
from fastdiss_cli.training.distributed import Processes
from fastdiss_cli.training.signals import Stop


def decode_shared(
    model: Seq2SeqModel,
    sources: Sequence[Sequence[int]],
    runs: Sequence[Run],
    select: Select,
    processes: Processes,
    stop: Stop,
    first: int = 0,
    gold: Sequence[Sequence[int]] | None = None,
    done: Callable[[int], None] = lambda sentences: None,
    **how: Any,
) -> int:
    """Decode this rank's share of the sentences and collect those of the others.

    Args:
        model, sources, runs, select, first, gold, done: as in `decode`, the same on all ranks. The
            seconds of a run are those of its slowest rank.
        processes: this process among the others.
        stop: after a signal this rank ends with the batch at hand; what is left stays None.
        **how: further arguments of `decode`.

    Returns:
        The signal that any rank has received, or 0.

    Raises:
        CommonError: memory ran out on a rank.
    """
    start, end = (
        len(sources) * r // processes.world_size for r in (processes.rank, processes.rank + 1)
    )
    own = [Run(run.options) for run in runs]
    with processes.attempt("decoding") as tried:
        if start < end:
            answers = None if gold is None else gold[start:end]
            how |= {"first": first + start, "gold": answers, "done": done}
            decode(model, sources[start:end], own, select, stop=lambda: stop.signal, **how)
    signal = processes.agree(tried, stop)
    of_ranks = processes.gather([own])
    for run, parts in zip(runs, zip(*of_ranks, strict=True), strict=True):
        run.best = [hypothesis for part in parts for hypothesis in part.best]
        run.seconds += max(part.seconds for part in parts)
        run.nfe += sum(part.nfe for part in parts)
        run.sentences += sum(part.sentences for part in parts)
    done(len(sources) - (end - start))
    return signal
