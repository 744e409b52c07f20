"""Profile five steps of sampling and one update of training, and write PROFILE.md.

    python recipes/bench/where_time_goes.py

The models are those of bench.py. Shares are of the profiled wall-clock time; what is in no operator
is Python and torch's dispatch (the profiler adds to it).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench import DTYPES, VOCAB, make, sentences
from torch.profiler import ProfilerActivity, profile

from fastdiss_cli.config import TrainConfig
from fastdiss_cli.data.batching import Batch, pad
from fastdiss_cli.decoding.generation import Run, SequenceGenerator, default_max_tokens
from fastdiss_cli.decoding.selection import by_score
from fastdiss_cli.device import dtype_name, keep_freed_memory, machine
from fastdiss_cli.models.frozen import freeze
from fastdiss_cli.training.gradient import add_gradient
from fastdiss_cli.training.optimizer import EMA, make_optimizer

CPU = torch.device("cpu")
BATCHED, SINGLE = 192, 12  # sentences
# the first kind one of whose words is in the name of an operator
KINDS = {
    "matrix products": ("linear_pointwise", "::mm", "::addmm", "::linear", "mkldnn_linear"),
    "attention, expected embeddings": (
        "bmm", "baddbmm", "softmax", "scaled_dot_product", "flash_attention",
    ),
    "optimizer and average": ("adamw", "foreach"),
    "norms": ("layer_norm",),
    "copies, casts, gathering": (
        "copy", "::to", "cat", "index", "pad", "gather", "repeat", "arange", "contiguous", "clone",
        "fill", "zero", "embedding", "select", "narrow", "slice", "nonzero", "stack", "one_hot",
    ),
    "random numbers": (
        "random", "normal", "rand", "::sin", "::cos", "bitwise", "__and__", "rshift",
    ),
}  # fmt: skip
ELEMENTWISE, PYTHON = "elementwise, reductions", "Python, dispatch"


def kind_of(name: str) -> str:
    """Return the kind of an operator of torch's profiler."""
    lowered = name.lower()
    return next((k for k, words in KINDS.items() if any(w in lowered for w in words)), ELEMENTWISE)


def shares(work: Callable[[], object]) -> dict[str, float]:
    """Return the share of each kind in the time of some work, which is done three times."""
    for _ in range(2):
        work()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        start = time.perf_counter()
        for _ in range(3):
            work()
        whole = time.perf_counter() - start
    found = dict.fromkeys((*KINDS, ELEMENTWISE), 0.0)
    for row in profiled.key_averages():
        found[kind_of(row.key)] += row.self_cpu_time_total / 1e6 / whole
    return found | {PYTHON: 1 - sum(found.values())}


def decoding(dtype: torch.dtype, size: int, count: int) -> Callable[[], object]:
    """Return five steps of `fastdiss` for so many sentences, in batches of so many tokens."""
    model, rows = make("fastdiss", CPU), sentences(count)
    freeze(model, dtype)
    generator = SequenceGenerator(model, by_score, size, dtype)
    return lambda: generator.decode(rows, [Run(model.Decoding(steps=5))])


def update(dtype: torch.dtype) -> Callable[[], object]:
    """Return an update of `fastdiss` on 1,000 tokens."""
    rows = sorted(sentences(1400), key=len)[670:737]
    batch = Batch(*pad(rows, VOCAB.pad), *pad(rows[::-1], VOCAB.pad))
    config, model = TrainConfig(), make("fastdiss", CPU).train()
    optimizer, average = make_optimizer(model, config), EMA(model, 0.999)

    def work() -> None:
        optimizer.zero_grad(set_to_none=True)
        add_gradient(model, batch, 1, 1.0, dtype)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update(model, 1)

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, metavar="FOLDER")
    out = parser.parse_args().out
    keep_freed_memory()
    columns: dict[str, dict[str, float]] = {}
    for dtype in DTYPES:
        name = dtype_name(dtype)
        columns[f"in batches, {name}"] = shares(decoding(dtype, default_max_tokens(CPU), BATCHED))
        columns[f"one by one, {name}"] = shares(decoding(dtype, 1, SINGLE))
        columns[f"update, {name}"] = shares(update(dtype))
    lines = [
        "# Where the time goes",
        "",
        f"Written by `python recipes/bench/where_time_goes.py` on {machine(CPU)}: `fastdiss` with "
        "d 512, ffn 1024, 6+6 layers, a vocabulary of 8,000; five steps for sentences of 15 "
        "tokens, and an update on 1,000 tokens. Per cent of the time, by torch's profiler.",
        "",
        f"| | {' | '.join(columns)} |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for kind in next(iter(columns.values())):
        cells = (f"{100 * column[kind]:.0f}" for column in columns.values())
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    page = out / "PROFILE.md"
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(page.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
