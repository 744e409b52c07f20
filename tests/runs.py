"""Small trainings: how to start them, what they leave behind, and faults to inject.

The faults are for `conftest.Ranks`: functions of the rank, with their options bound by `partial`.
"""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import signal
from pathlib import Path

import torch

from fastdiss_cli.checkpoints import checkpoint
from fastdiss_cli.checkpoints.checkpoint import Checkpoint
from fastdiss_cli.config import TrainConfig, build
from fastdiss_cli.data.binarized import BinarizedDataset
from fastdiss_cli.decoding.generation import SequenceGenerator
from fastdiss_cli.distributed import Processes
from fastdiss_cli.models.difformer import Difformer
from fastdiss_cli.models.registry import architecture
from fastdiss_cli.training import loop, state, validation
from fastdiss_cli.training.loop import Training

NETWORK = {"model_dim": 16, "ffn_dim": 32, "heads": 2, "encoder_layers": 1, "decoder_layers": 1}
CPU = torch.device("cpu")
OPTIONS = {
    "max_tokens": 500, "max_update": 12, "warmup_updates": 4, "valid_sentences": 4,
    "log_interval": 1,
}  # fmt: skip


def start(data_bin: Path, save_dir: Path, arch: str = "fastdiss_tiny", **options: object):
    """Return a training in this process, ready to run."""
    accept, begin_with = bool(options.pop("accept_changes", False)), options.pop("begin_with", None)
    network = dict(NETWORK, **({} if arch.startswith("transformer") else {"latent_dim": 8}))
    network.update(options.pop("model", {}))
    config = build(TrainConfig, {"arch": arch, **OPTIONS, **options}, "train")
    dataset = BinarizedDataset(data_bin)
    where = (dataset, save_dir, Processes(CPU))
    chosen = architecture(arch)
    return Training(chosen, chosen.config(network), config, *where, accept, begin_with)


def command(data_bin: Path, save_dir: Path, arch: str = "fastdiss_tiny", **options: object):
    """Return the command line of a small training."""
    network = dict(NETWORK, **({} if arch.startswith("transformer") else {"latent_dim": 8}))
    settings = {f"model.{k}": v for k, v in network.items()}
    settings |= {f"train.{k}": v for k, v in {**OPTIONS, **options}.items()}
    sets = [f"--set={key}={value}" for key, value in settings.items()]
    return ["train", data_bin, "--save-dir", save_dir, "--arch", arch, "--device=cpu", *sets]


def newest(save_dir: Path) -> Checkpoint:
    return Checkpoint.load(save_dir / "checkpoint_last.safetensors")


def tensors(save_dir: Path) -> dict[str, torch.Tensor]:
    return newest(save_dir).tensors


def metrics(save_dir: Path, without: tuple[str, ...] = ("tokens_per_second", "seconds")):
    lines = (save_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in without} for line in lines]


def assert_same(one: Path, other: Path) -> None:
    """Compare the results of two trainings, byte by byte except for timings."""
    a, b = newest(one), newest(other)
    assert vars(a.progress) == vars(b.progress)
    assert a.tensors.keys() == b.tensors.keys()
    assert {n.split(".")[0] for n in a.tensors} == {"model", "ema", "optimizer", "tokenizer"}
    for name, tensor in a.tensors.items():
        assert tensor.numpy().tobytes() == b.tensors[name].numpy().tobytes(), name
    first, second = ([list(line.items()) for line in metrics(run)] for run in (one, other))
    assert first == second


def blind(rank: int) -> None:
    """Make rank 1 find no checkpoints, as if the folder were not shared."""
    if rank == 1:
        loop.LAST = state.LAST = "none.safetensors"
        loop.refuse_others = lambda folder: None


def signalled(rank: int, on: int, update: int, number: int = signal.SIGTERM) -> None:
    """Make a rank send itself a signal in the middle of an update."""
    right, sent = loop.add_gradient, []

    def wrong(model, batch, at, share, dtype):
        done = right(model, batch, at, share, dtype)
        if at == update and rank == on and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)
        return done

    loop.add_gradient = wrong


def signalled_in_validation(rank: int, on: int, what: str, numbers: tuple[int, ...]) -> None:
    """Make a rank send itself signals in the first batch of a validation's loss or BLEU."""
    seen = []

    def spoil(right):
        def wrong(*args, **kwargs):
            seen.append(1)
            assert len(seen) == 1, "a batch was begun after the signal"
            if rank == on:
                for number in numbers:
                    os.kill(os.getpid(), number)
            return right(*args, **kwargs)

        return wrong

    if what == "loss":
        validation.seed_everything = spoil(validation.seed_everything)
    else:
        SequenceGenerator.decode_together = spoil(SequenceGenerator.decode_together)
        validation.CHUNK = 1


def failing(rank: int, on: int, update: int, how: str) -> None:
    """Make the loss of a rank fail in an update."""
    right = loop.add_gradient

    def wrong(model, batch, at, share, dtype):
        losses = right(model, batch, at, share, dtype)
        if rank == on and at == update:
            if how == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            if how == "bug":
                raise ValueError("no\nsuch thing")
            losses["loss"] = losses["loss"] * math.nan  # the gradient stays as it is
        return losses

    loop.add_gradient = wrong


def full_disk(rank: int, size: int) -> None:
    """Keep files from growing beyond a size."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def read_only(rank: int, saves: tuple[int, ...]) -> None:
    """Make the saves of these numbers find a read-only file system."""
    right, count = checkpoint.save_file, []

    def save_file(*given):
        count.append(1)
        if len(count) in saves:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        right(*given)

    checkpoint.save_file = save_file


def signalled_in_batch(rank: int, on: int, number: int, signals: tuple[int, ...]) -> None:
    """Make a rank send itself signals while it decodes the n-th batch."""
    right, calls = Difformer.decode, []

    def decode(self, *given):
        calls.append(given)
        assert len(calls) <= number, "a batch was begun after the signal"
        if len(calls) == number and rank == on:
            for one in signals:
                os.kill(os.getpid(), one)
        return right(self, *given)

    Difformer.decode = decode
