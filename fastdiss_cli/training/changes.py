"""What may not change before a training is resumed, and what a change makes void."""

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

# what may differ: it changes how long or how a training runs, not what an update computes
HARMLESS = (
    "max_update", "max_epoch", "patience", "keep_last", "log_interval", "save_interval_updates",
    "max_skipped", "tensorboard", "compile", "shard",
)  # fmt: skip


def changes(
    before: Checkpoint,
    arch: Architecture,
    model_config: Any,
    config: TrainConfig,
    dataset_hash: str,
    world_size: int,
) -> dict[str, tuple[Any, Any]]:
    """Return what was and what is now, by name, as far as it differs and changes the result.

    An option that the checkpoint does not know yet has what was done before there was one; those
    that need another that is off do not differ.
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
        may_differ.discard("train.max_update")
    if old_model:
        may_differ |= {f"model.{name}" for name in idle(old_model) | idle(model_config)}
    return {
        key: (then.get(key), value)
        for key, value in now.items()
        if key not in may_differ and json.dumps(then.get(key)) != json.dumps(value)
    }


def forget_changed(progress: Progress, differing: dict[str, tuple[Any, Any]]) -> None:
    """Forget what belongs to a validation or to batches that are others now.

    Args:
        progress: of the checkpoint; it is changed.
        differing: as `changes` returns it.
    """
    names = differing.keys()
    batches = {"dataset", "processes", "train.max_tokens", "train.max_positions", "train.seed"}
    scores = {"dataset", "train.valid_sentences", "train.valid_steps"}
    if not progress.best_is_bleu:  # a loss is another with other noise or another weight of a part
        scores |= batches | {name for name in names if name.startswith("model.")}
    if names & scores:
        progress.best, progress.bad_validations = None, 0
    if names & batches and progress.batch:
        progress.epoch, progress.batch = progress.epoch + 1, 0
        logs.info(f"the batches are others than before: epoch {progress.epoch} begins")


def describe_changes(differing: dict[str, tuple[Any, Any]]) -> str:
    """Say what differs, or the first few of it."""
    if "arch" in differing:  # then all options may differ, which says nothing
        differing = {"arch": differing["arch"]}
    said = [f"{name} was {was} and is now {now}" for name, (was, now) in differing.items()]
    named = "; ".join(said[:4])
    if len(said) > 4:
        named += f"; and {len(said) - 4} more (a forgotten --config?)"
    return named


def refuse_changes(path: Path, differing: dict[str, tuple[Any, Any]]) -> None:
    """Refuse to resume.

    Raises:
        FastdissError: what differs.
    """
    named = describe_changes(differing)
    if "train.max_update" in list(differing)[:4]:
        named += " (where the cosine ends, so that all learning rates differ)"
    raise FastdissError(
        f"{path} was trained with different settings: {named}. Train into another --save-dir, or "
        "resume anyway with --accept-changes"
    )
