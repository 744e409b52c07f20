"""Which settings must not change when a training is resumed, and what a change invalidates."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastdiss_cli import logs
from fastdiss_cli.checkpoints.checkpoint import Checkpoint, Progress
from fastdiss_cli.config import TrainConfig, build_saved, idle
from fastdiss_cli.errors import FastdissError
from fastdiss_cli.models.registry import Architecture

# these may differ: they change how long or how a training runs, not what an update computes
HARMLESS = (
    "max_update", "max_epoch", "patience", "keep_last", "log_interval", "save_interval_updates",
    "validate_interval_updates", "max_skipped", "tensorboard", "compile", "shard",
)  # fmt: skip


def changes(
    before: Checkpoint,
    arch: Architecture,
    model_config: Any,
    config: TrainConfig,
    dataset_hash: str,
    world_size: int,
) -> dict[str, tuple[Any, Any]]:
    """Return (old, new) by name for all settings that differ and affect the result.

    An option that is newer than the checkpoint has its ``before`` value (see `option`); options
    without effect, because another one is off, are ignored.
    """

    def options(of_arch: str, model: Any, train: Any, dataset: str, processes: int) -> dict:
        return {
            "arch": of_arch,
            "dataset": dataset[:16],
            "processes": processes,
            **{f"model.{k}": v for k, v in (asdict(model) if model else {}).items()},
            **{f"train.{k}": v for k, v in asdict(train).items()},
        }

    same_arch = before.arch == arch.name
    old_model = build_saved(arch.family.Config, before.model_config, "model") if same_arch else None
    old_train = build_saved(TrainConfig, before.train_config, "train")
    then = options(before.arch, old_model, old_train, before.dataset_hash, before.world_size)
    now = options(arch.name, model_config, config, dataset_hash, world_size)
    may_differ = {f"train.{name}" for name in HARMLESS}
    if config.lr_scheduler == "cosine":
        may_differ -= {"train.max_update", "train.max_epoch"}
    if old_model:
        may_differ |= {f"model.{name}" for name in idle(old_model) | idle(model_config)}
    return {
        key: (then.get(key), value)
        for key, value in now.items()
        if key not in may_differ and json.dumps(then.get(key)) != json.dumps(value)
    }


def forget_changed(progress: Progress, differing: dict[str, tuple[Any, Any]]) -> None:
    """Reset the progress that a change of validation or of batches invalidates.

    Args:
        progress: that of the checkpoint; changed in place.
        differing: as returned by `changes`.
    """
    names = differing.keys()
    batches = {"dataset", "processes", "train.max_tokens", "train.max_positions", "train.seed"}
    scores = {"dataset", "train.valid_sentences", "train.valid_steps"}
    if not progress.best_is_bleu:  # the loss also depends on its noise and on the model's options
        scores |= batches | {name for name in names if name.startswith("model.")}
    if names & scores:
        progress.best, progress.bad_validations = None, 0
    if names & batches and progress.batch:
        progress.epoch, progress.batch = progress.epoch + 1, 0
        logs.info(f"the batches have changed: starting epoch {progress.epoch}")


def describe_changes(differing: dict[str, tuple[Any, Any]]) -> str:
    """Describe the differences, or the first few of them."""
    if "arch" in differing:  # then all options may differ, which is uninformative
        differing = {"arch": differing["arch"]}
    parts = [f"{name} was {was} and is now {now}" for name, (was, now) in differing.items()]
    description = "; ".join(parts[:4])
    if len(parts) > 4:
        description += f"; and {len(parts) - 4} more (a forgotten --config?)"
    return description


def refuse_changes(path: Path, differing: dict[str, tuple[Any, Any]], fits: bool) -> None:
    """Refuse to resume.

    Args:
        path: the checkpoint.
        differing: as returned by `changes`.
        fits: whether its weights have the shapes of the model, so that it could be resumed.

    Raises:
        FastdissError: always, with the differences.
    """
    description = describe_changes(differing)
    if {"train.max_update", "train.max_epoch"} & set(list(differing)[:4]):
        description += " (where the cosine ends, so that all learning rates differ)"
    raise FastdissError(
        f"{path} was trained with different settings: {description}. Train into another --save-dir"
        + (", or resume anyway with --accept-changes" if fits else "")
    )
