"""Measure decoding, selection, training and growth, all in one run, and write RESULTS.md.

Weights are random, because time does not depend on them, but all answers have two positions more
than their sources, eos included: the length head of the diffusion models is set to that, and beam
search, which would go on, has its limit there.
Every figure is a median over rounds in which all systems take turns.
"""
# V vocabulary, H model

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from fastdiss_cli.config import TrainConfig
from fastdiss_cli.data.batching import Batch, pad
from fastdiss_cli.decoding.generation import Run, SequenceGenerator, default_max_tokens
from fastdiss_cli.decoding.mbr import expected_utilities
from fastdiss_cli.decoding.selection import by_mbr, by_score
from fastdiss_cli.device import dtype_name, keep_freed_memory, machine, pick_device
from fastdiss_cli.models.frozen import freeze
from fastdiss_cli.models.registry import Seq2SeqModel, Vocabulary, architecture
from fastdiss_cli.training.gradient import add_gradient
from fastdiss_cli.training.optimizer import EMA, make_optimizer

HERE = Path(__file__).parent
VOCAB = Vocabulary(size=8000, bos=0, pad=1, eos=2)
SIZE = "iwslt_de_en"  # d 512, ffn 1024, 6+6 layers
LONGER = 2  # positions of an answer more than of its source
DTYPES = (torch.float32, torch.bfloat16)
DIFFUSION = {  # name -> (options, share of the sentences that it gets)
    "1 step": ({"steps": 1}, 1),
    "2 steps": ({"steps": 2}, 1),
    "5 steps": ({"steps": 5}, 1),
    "20 steps": ({"steps": 20}, 0.5),
    "5 steps, 5 x 3 candidates, MBR": ({"steps": 5, "length_beam": 5, "noise_beam": 3}, 0.1),
    "5 steps, 7 x 3 candidates, MBR": ({"steps": 5, "length_beam": 7, "noise_beam": 3}, 0.1),
}
SENTENCES = {"cpu": 192, "cuda": 4096}
WARM_UP = {"cpu": 1, "cuda": 2}  # rounds of decoding: a GPU replays what it has seen twice
# tokens of a matrix product, and how many are launched at a time
PRODUCTS = {"cpu": (1024, 1), "cuda": (8192, 20)}
BEAMS = {"transformer, greedy": 1, "transformer, beam 5": 5}
TRAINED = {
    "transformer": ("transformer", {}),
    "difformer": ("difformer", {}),
    "fastdiss": ("fastdiss", {}),
    "fastdiss with MANS": ("fastdiss", {"mans_strength": 0.25}),
    "fastdiss with MANS, shared pass": (
        "fastdiss",
        {"mans_strength": 0.25, "mans_shared_pass": True},
    ),
}

Measured = dict[str, list[float]]  # name -> one figure per round


class Words:
    """A target tokenizer without a file: every id is a word."""

    def decode(self, ids: list[int]) -> str:
        return " ".join(f"word{i}" for i in ids)


def sentences(count: int, lengths: np.ndarray | None = None) -> list[list[int]]:
    """Draw random sources of given lengths, or as long as those of Multi30k (15 tokens)."""
    draw = np.random.default_rng(1)
    if lengths is None:
        lengths = draw.normal(15, 5, count).round().clip(4, 40).astype(int)
    return [[*draw.integers(5, VOCAB.size, n - 1).tolist(), VOCAB.eos] for n in lengths]


def make(system: str, device: torch.device, **options: object) -> Seq2SeqModel:
    torch.manual_seed(1)
    arch = architecture(f"{system}_{SIZE}")
    model = arch.family(arch.config(options), VOCAB, VOCAB).to(device)
    if hasattr(model, "length_head"):
        with torch.no_grad():
            model.length_head.weight.zero_()
            limit = model.config.max_length_offset
            model.length_head.bias.copy_(-(torch.arange(-limit, limit + 1) - LONGER).abs())
    return model.eval()


def now(device: torch.device) -> float:
    """Wait until a device has finished its work; return the time, in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def take_turns(rounds: int, systems: dict[str, Callable[[], float]], warm_up: int = 1) -> Measured:
    """Call every system once a round; the first rounds, to warm up, do not count."""
    figures: Measured = {name: [] for name in systems}
    for turn in range(-warm_up, rounds):
        for name, measure in systems.items():
            figure = measure()
            if turn >= 0:
                figures[name].append(figure)
                print(f"round {turn + 1}  {name}: {figure:,.2f}", file=sys.stderr)
    return figures


def decoding_speed(
    model: Seq2SeqModel, sources: list[list[int]], batch: int, dtype: torch.dtype, **options: int
) -> float:
    """Return sentences per second, with batches of ``batch`` padded tokens, or one by one (1)."""
    run = Run(model.Decoding(**options))
    select = by_mbr(Words(), "bleu", "length") if run.options.candidates > 1 else by_score  # type: ignore[arg-type]
    select = by_score if "beam" in options else select
    generator = SequenceGenerator(model, select, batch, dtype)
    start = time.perf_counter()
    generator.decode(sources, [run])
    return len(sources) / (time.perf_counter() - start)


def decoding(
    rounds: int, count: int, batch: int, device: torch.device, dtype: torch.dtype
) -> Measured:
    """Measure sentences per second of every way of decoding."""
    diffusion, autoregressive = make("fastdiss", device), make("transformer", device)
    freeze(diffusion, dtype)
    freeze(autoregressive, dtype)
    systems: dict[str, Callable[[], float]] = {}
    for name, (options, share) in DIFFUSION.items():
        some = sentences(max(int(count * share), 2))
        systems[name] = lambda some=some, options=options: decoding_speed(
            diffusion, some, batch, dtype, **options
        )
    for name, beam in BEAMS.items():
        some = sentences(count)
        options = {"beam": beam, "max_len_a": 1.0, "max_len_b": LONGER - 1}  # and eos
        systems[name] = lambda some=some, options=options: decoding_speed(
            autoregressive, some, batch, dtype, **options
        )
    return take_turns(rounds, systems, WARM_UP[device.type])


def training(rounds: int, tokens: int, device: torch.device, dtype: torch.dtype) -> Measured:
    """Measure target tokens per second of whole updates, optimizer and average included."""
    # of similar length, as `TokenBatcher` puts them together: those in the middle of all
    count = max(tokens // 15, 2)
    rows = sorted(sentences(20 * count), key=len)[10 * count : 11 * count]
    batch = Batch(*pad(rows, VOCAB.pad), *pad(rows[::-1], VOCAB.pad)).to(device)
    config = TrainConfig()
    systems = {}
    for name, (system, options) in TRAINED.items():
        model = make(system, device, **options).train()
        optimizer, average = make_optimizer(model, config), EMA(model, 0.999)

        def update(name=name, model=model, optimizer=optimizer, average=average) -> float:
            start = now(device)
            for rate in (0.0, 1.0):  # the pass of standard self-conditioning is in half of them
                if name == "difformer":
                    model.config = dataclasses.replace(model.config, self_cond_rate=rate)
                optimizer.zero_grad(set_to_none=True)
                add_gradient(model, batch, 1, 1.0, dtype)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                average.update(model, 1)
            return 2 * batch.num_tgt_tokens / (now(device) - start)

        systems[name] = update
    return take_turns(rounds, systems)


def matrix_products(rounds: int, device: torch.device, dtype: torch.dtype) -> Measured:
    """Measure GFLOP/s of products at the model's shapes: by torch's layer, and by a frozen one."""
    tokens, repeats = PRODUCTS[device.type]
    x = torch.randn(tokens, 512, dtype=dtype, device=device)
    linear = torch.nn.Linear(512, 1024).to(device, dtype)
    holder = torch.nn.Sequential(linear)
    freeze(holder, dtype)

    def rate(layer: torch.nn.Module) -> float:
        best = float("inf")
        with torch.inference_mode():
            for _ in range(30):
                start = now(device)
                for _ in range(repeats):
                    layer(x)
                best = min(best, (now(device) - start) / repeats)
        return 2 * tokens * 512 * 1024 / best / 1e9

    ways = {"nn.Linear": lambda: rate(linear), "frozen": lambda: rate(holder[0])}
    return take_turns(rounds, ways)


def flops_per_token(model: Seq2SeqModel) -> float:
    """Count the multiply-adds (times 2) of one denoiser step for one target token.

    Linear layers, and the two products with the vocabulary of the expected embedding.
    """
    c = model.config
    layer = 6 * c.model_dim**2 + 2 * c.model_dim * c.ffn_dim
    expected = 2 * VOCAB.size * c.latent_dim
    return 2 * (c.decoder_layers * layer + 3 * c.latent_dim * c.model_dim + expected)


def growth(
    rounds: int, batch: int, device: torch.device, count: int = 64, tokens: int = 2048
) -> dict[str, Measured]:
    """Measure how time grows with steps and with length; seconds."""
    model = make("fastdiss", device)
    freeze(model, torch.float32)

    def seconds(rows: list[list[int]], **options: int) -> float:
        return len(rows) / decoding_speed(model, rows, batch, torch.float32, **options)

    rows = sentences(count)
    lengths = {
        n: sentences(tokens // n, np.full(tokens // n, n)) for n in (8, 16, 32, 64, 128, 256)
    }
    return {
        "steps": take_turns(
            rounds, {str(n): lambda n=n: seconds(rows, steps=n) for n in (1, 5, 10, 20, 40)}
        ),
        f"length, for {tokens:,} tokens": take_turns(
            rounds, {str(n): lambda r=r: seconds(r, steps=5) for n, r in lengths.items()}
        ),
    }


def selection(rounds: int, count: int) -> Measured:
    """Measure MBR over 21 candidates, vectorised and by sacreBLEU; µs per sentence."""
    from sacrebleu import BLEU

    draw = np.random.default_rng(1)
    answers = []
    for _ in range(count):
        first = draw.integers(0, 500, 15)
        rows = [
            np.where(draw.random(15) < 0.3, draw.integers(0, 500, 15), first) for _ in range(21)
        ]
        answers.append([" ".join(f"w{i}" for i in row) for row in rows])
    metric = BLEU(effective_order=True)

    def vectorised() -> float:
        start = time.perf_counter()
        expected_utilities(answers)
        return 1e6 * (time.perf_counter() - start) / count

    def by_pair() -> float:
        start = time.perf_counter()
        for a in answers[0]:
            for b in answers[0]:
                metric.sentence_score(a, [b])
        return 1e6 * (time.perf_counter() - start)

    return take_turns(rounds, {"vectorised": vectorised, "sacreBLEU, pair by pair": by_pair})


def row(values: list[float]) -> str:
    return f"{statistics.median(values):,.1f} ({min(values):,.1f} to {max(values):,.1f})"


def ratio(values: list[float], others: list[float]) -> str:
    """Return the median over rounds of a ratio within a round."""
    return f"{statistics.median(a / b for a, b in zip(values, others, strict=True)):.2f}"


def report(figures: dict) -> str:
    """Write the tables."""
    lines = [
        "# Speed",
        "",
        f"Written by `make bench` on {figures['machine']}. d 512, ffn 1024, 6+6 layers, a "
        "vocabulary of 8,000, random sentences of 15 tokens on average. Medians over rounds "
        "(smallest to largest); ratios are medians of ratios within a round.",
    ]
    for dtype in figures["decoding"]:
        rate = figures["matrix products"][dtype]
        lines += [
            "",
            f"## Decoding, {dtype}",
            "",
            f"Sentences per second. Matrix product at the model's shapes: {row(rate['nn.Linear'])} "
            f"GFLOP/s by torch's linear layer, {row(rate['frozen'])} by the layer that decodes.",
            "",
            "| | batches | against beam 5 | one by one | against beam 5 |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        many, single = (figures["decoding"][dtype][way] for way in ("batches", "one by one"))
        for name in many:
            cells = [name]
            for by in (many, single):
                beam = by["transformer, beam 5"]
                cells += [row(by[name]), ratio(by[name], beam)] if name in by else ["", ""]
            lines.append(f"| {' | '.join(cells)} |")
        tokens = figures["tokens per sentence"]
        pairs = zip(many["20 steps"], many["5 steps"], rate["frozen"], strict=True)
        shares = [
            figures["flops per token"] * tokens * 15 / (1 / a - 1 / b) / 1e9 / c
            for a, b, c in pairs
        ]
        lines += [
            "",
            "A denoiser step of a large batch, by the difference of 20 and 5 steps, runs at "
            f"{100 * statistics.median(shares):.0f} % of that layer's rate.",
        ]
    lines += ["", "## Training", "", "Target tokens per second, whole updates.", ""]
    kinds = list(figures["training"])
    lines.append("| | " + " | ".join(f"{kind} | cost against difformer" for kind in kinds) + " |")
    lines.append("| --- |" + " ---: |" * (2 * len(kinds)))
    for name in figures["training"][kinds[0]]:
        cells = [name]
        for kind in kinds:
            speeds = figures["training"][kind]
            cells += [row(speeds[name]), ratio(speeds["difformer"], speeds[name])]
        lines.append(f"| {' | '.join(cells)} |")
    for name, by in figures["growth"].items():
        lines += ["", f"## Seconds by {name}, float32", "", f"| {' | '.join(by)} |"]
        lines += ["|" + " ---: |" * len(by), f"| {' | '.join(map(row, by.values()))} |"]
    chosen = figures["selection"]
    lines += [
        "",
        "## Selection",
        "",
        "MBR with sentence BLEU over 21 candidates, microseconds per sentence: "
        f"{row(chosen['vectorised'])} vectorised, {row(chosen['sacreBLEU, pair by pair'])} by "
        f"sacreBLEU pair by pair: "
        f"{ratio(chosen['sacreBLEU, pair by pair'], chosen['vectorised'])} times as long.",
        "",
        f"Peak memory of the whole run: {figures['peak memory, MiB']:,.0f} MiB.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sentences", type=int, help="a file's worth; one by one fewer")
    parser.add_argument("--max-tokens", type=int, help="of a batch, here and in training")
    parser.add_argument("--out", type=Path, default=HERE)
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    rounds, batch = arguments.rounds, arguments.max_tokens or default_max_tokens(device)
    count = arguments.sentences or SENTENCES[device.type]
    keep_freed_memory()
    figures: dict = {
        "machine": machine(device),
        "tokens per sentence": float(np.mean([len(s) + LONGER for s in sentences(count // 2)])),
        "flops per token": flops_per_token(make("fastdiss", device)),
        "matrix products": {},
        "decoding": {},
        "training": {},
    }
    for dtype in DTYPES:
        name = dtype_name(dtype)
        figures["matrix products"][name] = matrix_products(rounds, device, dtype)
        figures["decoding"][name] = {
            "batches": decoding(rounds, count, batch, device, dtype),
            "one by one": decoding(rounds, max(count // 128, 16), 1, device, dtype),
        }
        figures["training"][name] = training(rounds, batch, device, dtype)
    figures["growth"] = growth(rounds, batch, device)
    figures["selection"] = selection(rounds, 400)
    figures["peak memory, MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    (arguments.out / "RESULTS.md").write_text(report(figures))
    print((arguments.out / "RESULTS.md").read_text())


if __name__ == "__main__":
    main()
