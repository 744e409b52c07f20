"""Compare 5 steps of `fastdiss` with beam search of CTranslate2, a fast engine in C++.

    pip install ctranslate2
    python recipes/bench/against_ctranslate2.py

Random weights of one size on either side (that of `make bench`), sentences of 15 tokens and
answers of 17, eos included. Every system has a process of its own and all cores; they take turns.
CTranslate2 has the better of two settings: batches by one worker on all cores or by one on each,
sentences one by one on all cores or on one.
It writes CTRANSLATE2.md beside this file.
"""
# V vocabulary, H model, F ffn

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

HERE = Path(__file__).parent
V, H, F, LAYERS, HEADS = 8000, 512, 1024, 6, 4
SOURCE, ANSWER = 15, 17  # tokens, eos included
BATCH = {"in batches": 192, "one by one": 48}  # sentences
BEAM = 5
SYSTEMS: dict[str, dict[str, Any]] = {
    "fastdiss, 5 steps, float32": {"system": "fastdiss", "dtype": "float32"},
    "fastdiss, 5 steps, bfloat16": {"system": "fastdiss", "dtype": "bfloat16"},
    "transformer, beam 5, float32": {"system": "transformer", "dtype": "float32"},
    "CTranslate2, beam 5, float32": {"system": "ctranslate2", "dtype": "float32"},
    "CTranslate2, beam 5, int8": {"system": "ctranslate2", "dtype": "int8"},
}


def export(folder: Path) -> None:
    """Write a Transformer of random weights as CTranslate2 reads it."""
    from ctranslate2.specs.transformer_spec import TransformerSpec

    draw = np.random.default_rng(1)

    def random(*shape: int) -> np.ndarray:
        return draw.normal(0, shape[-1] ** -0.5, shape).astype(np.float32)

    def norm(spec: Any) -> None:
        spec.gamma, spec.beta = np.ones(H, np.float32), np.zeros(H, np.float32)

    def linear(spec: Any, outputs: int, inputs: int) -> None:
        spec.weight, spec.bias = random(outputs, inputs), np.zeros(outputs, np.float32)

    def attention(spec: Any, widths: tuple[int, ...]) -> None:
        norm(spec.layer_norm)
        for part, width in zip(spec.linear, widths, strict=True):
            linear(part, width, H)

    model = TransformerSpec.from_config((LAYERS, LAYERS), HEADS, pre_norm=True)
    table = random(V, H)
    for side in (model.encoder, model.decoder):
        embeddings = side.embeddings
        embeddings = embeddings[0] if isinstance(embeddings, list) else embeddings
        embeddings.weight, side.scale_embeddings = table, True
        side.position_encodings.encodings = random(512, H)
        norm(side.layer_norm)
        for layer in side.layer:
            attention(layer.self_attention, (3 * H, H))
            if side is model.decoder:
                attention(layer.attention, (H, 2 * H, H))
            norm(layer.ffn.layer_norm)
            linear(layer.ffn.linear_0, F, H)
            linear(layer.ffn.linear_1, H, F)
    model.decoder.projection.weight = table
    words = ["<blank>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(V - 4))]
    model.register_source_vocabulary(words)
    model.register_target_vocabulary(words)
    model.validate()
    model.optimize()
    folder.mkdir()
    model.save(str(folder))


def ctranslate2_speed(folder: Path, dtype: str, batched: bool, count: int) -> float:
    """Return sentences per second of CTranslate2; see `speed`."""
    import ctranslate2

    draw, cores = np.random.default_rng(1), os.cpu_count() or 1
    words = [
        [f"w{i}" for i in row] + ["</s>"] for row in draw.integers(0, V - 4, (count, SOURCE - 1))
    ]
    ways = {(1, cores), (cores if batched else 1, 1)}
    best = 0.0
    for workers, threads in ways:
        translator = ctranslate2.Translator(
            str(folder), compute_type=dtype, inter_threads=workers, intra_threads=threads
        )
        lengths = {"min_decoding_length": ANSWER - 1, "max_decoding_length": ANSWER - 1}
        size = count // (2 * workers) if batched else 1
        calls = [words] if batched else [[sentence] for sentence in words]
        for last in (False, True):  # the first time everything is warmed up
            start = time.perf_counter()
            for some in calls:
                found = translator.translate_batch(
                    some, beam_size=BEAM, max_batch_size=size, **lengths
                )
            if last:
                best = max(best, count / (time.perf_counter() - start))
        assert all(len(answer.hypotheses[0]) == ANSWER - 1 for answer in found)
    return best


def speed(folder: Path, system: str, dtype: str, batched: bool, count: int) -> float:
    """Return sentences per second of a system.

    Args:
        folder: the model of CTranslate2.
        system, dtype: as in `SYSTEMS`.
        batched: or one by one.
        count: of sentences.
    """
    if system == "ctranslate2":
        return ctranslate2_speed(folder, dtype, batched, count)
    import torch
    from bench import LONGER, decoding_speed, make, sentences

    from fastdiss_cli.decoding.generation import default_max_tokens
    from fastdiss_cli.device import keep_freed_memory
    from fastdiss_cli.models.frozen import freeze

    keep_freed_memory()
    device, torch_dtype = torch.device("cpu"), getattr(torch, dtype)
    model = make(system, device)
    freeze(model, torch_dtype)
    rows = sentences(count, np.full(count, SOURCE))
    beam = {"beam": BEAM, "max_len_a": 1.0, "max_len_b": LONGER - 1}  # and eos
    options = {"steps": 5} if system == "fastdiss" else beam
    size = default_max_tokens(device) if batched else 1
    for _ in range(2):  # the first time everything is warmed up
        found = decoding_speed(model, rows, size, torch_dtype, **options)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    import ctranslate2
    import torch

    from fastdiss_cli.device import machine

    spawn = multiprocessing.get_context("spawn")
    figures: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        export(folder)
        for turn in range(rounds):
            for label, how in SYSTEMS.items():
                for way, count in BATCH.items():
                    with ProcessPoolExecutor(1, spawn) as pool:
                        given = (folder, *how.values(), way == "in batches", count)
                        found = pool.submit(speed, *given).result()
                    figures.setdefault((label, way), []).append(found)
                    print(f"round {turn + 1}  {label}, {way}: {found:.1f}", flush=True)
    lines = [
        "# 5 steps against CTranslate2",
        "",
        f"Written by `python recipes/bench/against_ctranslate2.py` on "
        f"{machine(torch.device('cpu'))}, CTranslate2 {ctranslate2.__version__}: d {H}, ffn {F}, "
        f"{LAYERS}+{LAYERS} layers, a vocabulary of {V:,}; random weights, sentences of {SOURCE} "
        f"tokens and answers of {ANSWER}. Sentences per second, medians over {rounds} rounds "
        "(smallest to largest).",
        "",
        "| | in batches | one by one |",
        "| --- | ---: | ---: |",
    ]
    for label in SYSTEMS:
        cells = []
        for way in BATCH:
            values = figures[label, way]
            cells.append(f"{median(values):.1f} ({min(values):.1f} to {max(values):.1f})")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    (HERE / "CTRANSLATE2.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
