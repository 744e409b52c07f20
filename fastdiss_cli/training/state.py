"""The checkpoint files of a run, and what may not change before it is resumed."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastdiss_cli import logs
from fastdiss_cli.config import TrainConfig
from fastdiss_cli.training.checkpoint import (
    BEST,
    LAST,
    Checkpoint,
    Progress,
    copy_checkpoint,
    prune_numbered,
)


def warn_of_little_space(folder: Path, checkpoint: int) -> None:
    """Warn, before hours of training, where checkpoints of so many bytes will not fit.

    There are two at a time at least: one is written while the one before it is there.
    """
    free = shutil.disk_usage(folder).free
    if free < 2 * checkpoint:
        logs.warn(
            f"--save-dir {folder}: {free / 1e6:,.0f} MB are free, where two checkpoints of "
            f"{checkpoint / 1e6:,.0f} MB must fit"
        )


def save_newest(checkpoint: Checkpoint, folder: Path) -> None:
    """Write ``checkpoint_last`` and, where it is that, ``checkpoint_best``."""
    checkpoint.save(folder / LAST)
    if checkpoint.progress.is_best:
        copy_checkpoint(folder / LAST, folder / BEST)


def number_newest(progress: Progress, folder: Path, keep: int) -> None:
    """Keep ``checkpoint_last`` under a numbered name, too, and that many of these."""
    if keep:
        name = f"checkpoint_{progress.epoch}_{progress.update}.safetensors"
        copy_checkpoint(folder / LAST, folder / name)
        prune_numbered(folder, keep)


def changes(
    before: Checkpoint,
    arch: str,
    model: dict[str, Any],
    config: TrainConfig,
    dataset_hash: str,
    world_size: int,
) -> list[str]:
    """Name what differs between a checkpoint and a run and would change the result."""
    may_differ = {
        "max_update", "max_epoch", "patience", "keep_last", "log_interval",
        "save_interval_updates", "max_skipped", "compile", "shard",
    }  # fmt: skip
    if config.lr_scheduler == "cosine":
        may_differ.discard("max_update")
    now = {
        "arch": arch,
        "dataset": dataset_hash[:16],
        "processes": world_size,
        **{f"model.{k}": v for k, v in model.items()},
        **{f"train.{k}": v for k, v in asdict(config).items() if k not in may_differ},
    }
    then = {
        "arch": before.arch,
        "dataset": before.dataset_hash[:16],
        "processes": before.world_size,
        **{f"model.{k}": v for k, v in before.model_config.items()},
        **{f"train.{k}": v for k, v in before.train_config.items()},
    }
    return [
        f"{key} was {then.get(key)} and is now {value}"
        for key, value in now.items()
        if json.dumps(then.get(key)) != json.dumps(value)
    ]
