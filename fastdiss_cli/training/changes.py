"""Which settings must not change when a training is resumed, and what a change invalidates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastdiss_cli import logs
from fastdiss_cli.checkpoints.checkpoint import Checkpoint, Progress
from fastdiss_cli.config import TrainConfig, option_changes
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
    """Return (old, new) by name for all settings that differ and affect the result."""
    may_differ = {*HARMLESS, "arch"}  # which is compared first
    if config.lr_scheduler == "cosine":
        may_differ -= {"max_update", "max_epoch"}
    pairs = {
        "arch": (before.arch, arch.name),
        "dataset": (before.dataset_hash[:16], dataset_hash[:16]),
        "processes": (before.world_size, world_size),
    }
    differing = {name: (then, now) for name, (then, now) in pairs.items() if then != now}
    differing |= model_changes(before, arch, model_config)
    options = option_changes(before.train_config, config, "train")
    return differing | {f"train.{k}": pair for k, pair in options.items() if k not in may_differ}


def model_changes(
    before: Checkpoint, arch: Architecture, config: Any
) -> dict[str, tuple[Any, Any]]:
    """Return (old, new) by name for the options of the model that differ.

    Of another architecture's, only those that both have.
    """
    saved = before.model_config
    if before.arch == arch.name:
        options = option_changes(saved, config, "model")
    else:
        common = saved.keys() & vars(config).keys()
        options = option_changes({name: saved[name] for name in common}, config, "model")
        options = {name: pair for name, pair in options.items() if name in common}
    return {f"model.{name}": pair for name, pair in options.items()}


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
        scores |= batches | {"arch"} | {name for name in names if name.startswith("model.")}
    if names & scores:
        progress.best, progress.bad_validations = None, 0
    if names & batches and progress.batch:
        progress.epoch, progress.batch = progress.epoch + 1, 0
        logs.info(f"the batches have changed: starting epoch {progress.epoch}")


def describe_changes(differing: dict[str, tuple[Any, Any]]) -> str:
    """Describe the differences, or the first few of them."""
    parts = [f"{name} was {was} and is now {now}" for name, (was, now) in differing.items()]
    description = "; ".join(parts[:4])
    if len(parts) > 4:
        forgotten = "" if "arch" in differing else " (a forgotten --config?)"
        description += f"; and {len(parts) - 4} more{forgotten}"
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
