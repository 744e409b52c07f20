"""Why more steps help or do not: what `generate --diagnose` measures, as tables and as JSON.

By sampling step: how far the estimate is from the one that the network would give if it were
conditioned on a fresh estimate of the same step instead of the stale one of the previous step. By
time: the loss on the references, conditioned on nothing, on a fresh estimate, or on a stale one
made one step of the run's grid earlier, at a higher noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from statistics import fmean
from typing import Any

import torch

from fastdiss_cli import logs
from fastdiss_cli.data.batching import TokenBatcher
from fastdiss_cli.data.dataset import TokenFile
from fastdiss_cli.decoding.generation import Run, SequenceGenerator
from fastdiss_cli.device import autocast
from fastdiss_cli.diffusion.schedule import grid_position, grid_time
from fastdiss_cli.models.registry import HistoryStep, Hypothesis, Seq2SeqModel
from fastdiss_cli.randomness import seed_everything

BUCKETS = 10  # of time

Row = dict[str, Any]


def diagnoses(
    runs: Sequence[Run], generator: SequenceGenerator, split: dict[str, TokenFile]
) -> Iterator[dict[str, list[Row]]]:
    """Yield the tables of each run over a whole split.

    Args:
        runs: runs that were decoded with the option ``diagnose``.
        generator: the generator that decoded them.
        split: the two sides of the dataset's split.
    """
    model = generator.model
    pads = model.src.pad, model.tgt.pad
    batcher = TokenBatcher(split["src"], split["tgt"], *pads, generator.max_tokens, 2**31)
    # what a fresh estimate gives, or none, is the same for all runs
    losses = cache(partial(mean_losses, model, batcher, generator.dtype))
    for run in runs:
        yield {
            "by_step": by_step(run.answers),
            "by_time": by_time(model, run.options, losses),
        }


def by_step(hypotheses: Sequence[Hypothesis]) -> list[Row]:
    """Return one row per sampling step, with means over sentences.

    ``gap`` and ``norm`` are those of `HistoryStep`; ``confidence`` is the mean probability of the
    best tokens, ``changed`` the fraction of positions whose best token differs from the step
    before.
    """
    hypotheses = [h for h in hypotheses if h.history]  # an empty sentence has none
    rows = []
    for k, steps in enumerate(zip(*(h.history for h in hypotheses), strict=True)):
        row = {
            "step": k + 1,
            "t": round(steps[0].time, 4),
            "norm": fmean(step.norm for step in steps),
            "confidence": fmean(fmean(step.confidences) for step in steps),
        }
        gap = fmean(step.gap for step in steps)
        if not math.isnan(gap):  # absent without self-conditioning
            row["gap"] = gap
        if k:
            row["changed"] = fmean(_changed(h.history[k - 1], h.history[k]) for h in hypotheses)
        rows.append(row)
    return rows


def by_time(
    model: Seq2SeqModel, options: Any, losses: Callable[[float, float | None], tuple[float, float]]
) -> list[Row]:
    """Return one row per tenth of the time axis, with the mean losses per token at its midpoint.

    Args:
        model: a model with ``schedule`` and ``self_conditioned``.
        options: the step count and the time grid; times in the first step have no stale estimate.
        losses: maps a time, and that of the estimate, to `mean_losses`.
    """
    table = []
    with logs.progress("measuring losses", BUCKETS) as bar:
        for bucket in range(BUCKETS):
            t = (bucket + 0.5) / BUCKETS
            row: Row = {"t": round(t, 4)}
            conditions: dict[str, float | None] = {"none": None}
            if model.self_conditioned:
                conditions["fresh"] = t
                position = grid_position(torch.tensor(t), options.time_grid, model.schedule)
                position += 1 / options.steps
                if position <= 1:
                    earlier = grid_time(position, options.time_grid, model.schedule)
                    conditions["stale"] = float(earlier)
            for condition, at in conditions.items():
                row[f"mse_{condition}"], row[f"anchor_{condition}"] = losses(t, at)
            table.append(row)
            bar.advance()
    return table


@torch.inference_mode()
def mean_losses(
    model: Seq2SeqModel, batcher: TokenBatcher, dtype: torch.dtype, t: float, at: float | None
) -> tuple[float, float]:
    """Return the mean losses (mse, anchor) of all tokens of a split at time t.

    Args:
        model: a model with ``losses_at``.
        batcher: that of the split.
        dtype: float32, or bfloat16 for autocast.
        t, at: see ``losses_at``; whatever ``at`` is, the noise at t is the same.
    """
    mse = anchor = tokens = 0.0
    for number, batch in enumerate(map(batcher.collate, batcher.epoch(0))):
        seed_everything(1, "diagnose", int(BUCKETS * t), number)
        with autocast(model.device, dtype):
            losses = model.losses_at(batch.to(model.device), t, at)
        mse += float(losses[0]) * batch.num_tgt_tokens
        anchor += float(losses[1]) * batch.num_tgt_tokens
        tokens += batch.num_tgt_tokens
    return mse / tokens, anchor / tokens


def describe_diagnosis(steps: int, tables: dict[str, list[Row]]) -> str:
    """Return the tables of a run as text."""
    return (
        f"\n{logs.counted(steps, 'step')}, by sampling step\n{_table(tables['by_step'])}\n\n"
        "losses by time, given no estimate, a fresh one, or a stale one (one step old)\n"
        f"{_table(tables['by_time'])}\n\n"
        "gap: from the estimate of a fresh one; norm: 1 for embeddings;\n"
        "changed: share of tokens; -: no step before"
    )


def _table(rows: Sequence[Row]) -> str:
    if not rows:
        return "(no sentences)"
    columns = list(max(rows, key=len))
    width = [max(len(column), 6) for column in columns]
    lines = ["  ".join(f"{c:>{w}}" for c, w in zip(columns, width, strict=True))]
    for row in rows:
        cells = (_cell(row.get(column), w) for column, w in zip(columns, width, strict=True))
        lines.append("  ".join(cells))
    return "\n".join(lines)


def _cell(value: float | int | None, width: int) -> str:
    if value is None:
        return f"{'-':>{width}}"
    return f"{value:>{width}}" if isinstance(value, int) else f"{value:>{width}.4f}"


def _changed(before: HistoryStep, after: HistoryStep) -> float:
    longest = max(len(before.tokens), len(after.tokens))
    same = sum(a == b for a, b in zip(before.tokens, after.tokens, strict=False))
    return 1 - same / longest if longest else 0.0
