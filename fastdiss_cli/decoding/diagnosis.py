"""Why more steps help or do not: what `generate --diagnose` measures, as tables and as JSON.

By sampling step: how far the estimate is from the one that the network would give if it were
conditioned on a fresh estimate of the same step instead of the stale one of the previous step. By
time: the loss on the references, conditioned on nothing, on a fresh estimate, or on a stale one
made one step of the run's grid earlier, at a higher noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch

from fastdiss_cli.data.batching import TokenBatcher
from fastdiss_cli.data.dataset import TokenFile
from fastdiss_cli.decoding.generation import Run, SequenceGenerator
from fastdiss_cli.device import autocast
from fastdiss_cli.diffusion.schedule import grid_position, grid_time
from fastdiss_cli.logs import counted
from fastdiss_cli.models.registry import HistoryStep, Hypothesis, Seq2SeqModel
from fastdiss_cli.randomness import seed_everything

BUCKETS = 10  # of time

Row = dict[str, Any]


def diagnosis_of(
    run: Run, generator: SequenceGenerator, split: dict[str, TokenFile]
) -> dict[str, list[Row]]:
    """Return the tables of one run over a whole split.

    Args:
        run: a run that was decoded with the option ``diagnose``.
        generator: the generator that decoded it.
        split: the two sides of the dataset's split.
    """
    model = generator.model
    pads = model.src.pad, model.tgt.pad
    batcher = TokenBatcher(split["src"], split["tgt"], *pads, generator.max_tokens, 2**31)
    return {
        "by_step": by_step(run.answers),
        "by_time": by_time(model, batcher, run.options, generator.dtype),
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


@torch.inference_mode()
def by_time(
    model: Seq2SeqModel,
    batcher: TokenBatcher,
    options: Any,
    dtype: torch.dtype,
) -> list[Row]:
    """Return one row per tenth of the time axis, with the mean losses per token at its midpoint.

    Args:
        model: a model with ``losses_at``, ``schedule`` and ``self_conditioned``.
        batcher: that of the split; the means are over all of its tokens.
        options: the step count and the time grid; times in the first step have no stale estimate.
        dtype: float32, or bfloat16 for autocast.
    """
    device = model.device
    batches = batcher.epoch(0)
    table = []
    for bucket in range(BUCKETS):
        t = (bucket + 0.5) / BUCKETS
        row: Row = {"t": round(t, 4)}
        conditions: dict[str, float | None] = {"nothing": None}
        if model.self_conditioned:
            conditions["fresh"] = t
            position = grid_position(torch.tensor(t), options.time_grid, model.schedule)
            position += 1 / options.steps
            if position <= 1:
                conditions["stale"] = float(grid_time(position, options.time_grid, model.schedule))
        for condition, at in conditions.items():
            mse = anchor = tokens = 0.0
            for number, batch in enumerate(map(batcher.collate, batches)):
                seed_everything(1, "diagnose", bucket, number)  # the same noise for all
                with autocast(device, dtype):
                    losses = model.losses_at(batch.to(device), t, at)
                mse += float(losses[0]) * batch.num_tgt_tokens
                anchor += float(losses[1]) * batch.num_tgt_tokens
                tokens += batch.num_tgt_tokens
            row[f"mse_{condition}"] = mse / tokens
            row[f"anchor_{condition}"] = anchor / tokens
        table.append(row)
    return table


def describe_diagnosis(steps: int, tables: dict[str, list[Row]]) -> str:
    """Return the tables of a run as text."""
    return (
        f"\n{counted(steps, 'step')}, by sampling step\n{_table(tables['by_step'])}\n\n"
        "losses by time, given nothing, a fresh estimate, or a stale one (of the step before)\n"
        f"{_table(tables['by_time'])}"
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
