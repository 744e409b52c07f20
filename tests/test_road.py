"""All commands in turn: a task that can be solved is solved.

Source: digits in words. Target: the same digits, reversed. (Sockeye has similar tests.)
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from conftest import run_cli

DIGITS = ["null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"]
SHALLOW = {"encoder_layers": 1, "decoder_layers": 1, "latent_dim": 32}


@pytest.fixture(scope="module")
def data_bin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Numbers of two to six digits; test numbers are not in train."""
    folder = tmp_path_factory.mktemp("road")
    draw = random.Random(1)
    numbers = {"".join(draw.choices("0123456789", k=draw.randint(2, 6))) for _ in range(6000)}
    held_out, train = sorted(numbers)[::50], sorted(numbers)
    splits = {"test": held_out, "valid": held_out[::2], "train": sorted({*train} - {*held_out})}
    for split, members in splits.items():
        source = [" ".join(DIGITS[int(digit)] for digit in number) for number in members]
        target = [" ".join(reversed(line.split())) for line in source]
        (folder / f"{split}.src").write_text("\n".join(source) + "\n", encoding="utf-8")
        (folder / f"{split}.trg").write_text("\n".join(target) + "\n", encoding="utf-8")
    prefs = [f"--{split}pref={folder / split}" for split in splits]
    done = run_cli(
        "preprocess", "--destdir", folder / "bin", "--model-type", "word", *prefs, "--verify"
    )
    assert done.returncode == 0, done.stderr
    return folder / "bin"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "sizes", "updates", "decoding"),
    [
        ("transformer_tiny", {}, 300, ["--beam", "2"]),
        ("difformer_tiny", SHALLOW, 400, ["--steps", "5"]),
        ("fastdiss_tiny", SHALLOW, 400, ["--steps", "5"]),
    ],
)
def test_reversal_is_learnt(
    data_bin: Path,
    tmp_path: Path,
    arch: str,
    sizes: dict[str, int],
    updates: int,
    decoding: list[str],
) -> None:
    sizes = {"model_dim": 64, "ffn_dim": 256, "heads": 4, "dropout": 0, **sizes}
    done = run_cli(
        "train", data_bin, "--arch", arch, "--save-dir", tmp_path, "--max-update", str(updates),
        "--max-tokens", "500", "--lr", "3e-3", "--warmup-updates", "100",
        "--lr-scheduler", "cosine", "--ema-decay", "0.99", "--set=train.valid_sentences=0",
        *(f"--set=model.{key}={value}" for key, value in sizes.items()),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    checkpoint = tmp_path / "checkpoint_best.safetensors"
    done = run_cli(
        "generate", data_bin, "--path", checkpoint, "--results-path", tmp_path, *decoding
    )
    assert done.returncode == 0, done.stderr
    scored = run_cli("score", "--sys", tmp_path / "generate-test.txt", "--json")
    bleu, chrf, ter = json.loads(scored.stdout)
    assert bleu["score"] > 95 and chrf["score"] > 95 and ter["score"] < 5
