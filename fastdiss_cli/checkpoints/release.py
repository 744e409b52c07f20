"""Releases: the weights of one checkpoint, or the mean of several, with a model card.

A release is a checkpoint without moving average and optimizer state. It loads wherever a checkpoint
does, except to resume training. Its card is in the file's metadata.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from fastdiss_cli import __version__, logs
from fastdiss_cli.checkpoints.checkpoint import Checkpoint, digest, update_of
from fastdiss_cli.checkpoints.folder import LAST, best_of, number_of, numbered
from fastdiss_cli.config import build_saved, option_changes
from fastdiss_cli.errors import FastdissError, OptionError
from fastdiss_cli.models.registry import architecture

_FACTS = (
    "architecture", "license", "source", "target", "parameters", "vocabulary", "model", "training",
    "toolkit",
)  # fmt: skip


def chosen_checkpoints(given: Sequence[Path], last: int) -> list[Path]:
    """Return the checkpoint files that the given files and folders stand for.

    Args:
        given: files, or folders, which stand for their ``checkpoint_best``.
        last: if not 0, a folder stands for its ``last`` newest numbered checkpoints, up to its
            ``checkpoint_last``.

    Raises:
        FastdissError: a folder has too few.
    """
    paths: list[Path] = []
    for path in given:
        if not path.is_dir():
            paths.append(path)
        elif last:
            found = _of_this_training(path)[-last:]
            if len(found) < last:
                raise FastdissError(
                    f"{path} has {logs.counted(len(found), 'numbered checkpoint')}, not {last}: "
                    f"train with --keep-last {last} (one a validation), or name the files"
                )
            paths += found
        else:
            paths.append(best_of(path))
    return paths


def _of_this_training(folder: Path) -> list[Path]:
    """Return the numbered checkpoints, without those later than checkpoint_last."""
    found, update = numbered(folder), update_of(folder / LAST)
    later = [path for path in found if update is not None and number_of(path) > update]
    if later:
        logs.warn(
            f"leaving out {', '.join(map(str, later))}: later than {LAST}, as of a training that "
            "was set back"
        )
    return [path for path in found if path not in later]


def release(paths: Sequence[Path], license: str | None, text: str | None) -> Checkpoint:
    """Return the uniform mean of the weights that `generate` would load, with a model card.

    Args:
        paths: checkpoints of one architecture with the same options and tokenizers; the facts of
            the card are those of the one with the most updates.
        license, text: those of the card; None: keep those of that checkpoint, if it is a release.

    Raises:
        FastdissError: a file cannot be read, or does not fit the first one.
    """
    first = newest = Checkpoint.load(paths[0])  # newest: the one with the most updates
    sums: dict[str, Tensor] = {}
    used: dict[str, Path] = {}  # by the hash of its weights
    updates, seeds = [], set()
    for path in paths:
        other = first if path == paths[0] else Checkpoint.load(path)
        _check_same(first, other, paths[0], path)
        weights = other.averaged()
        twin = used.setdefault(digest("", weights), path)
        if twin is not path:  # as checkpoint_best, a copy of a numbered one
            logs.warn(f"{path} has the same weights as {twin}, and counts once")
            continue
        if other.card and "averaged_updates" in other.card["training"]:
            logs.warn(f"{path} is itself a mean, and counts like a single checkpoint")
        for name, value in weights.items():
            sums[name] = sums.get(name, 0) + value.double()
        updates.append(other.progress.update)
        seeds.add(other.train_config.get("seed"))
        newest = max(newest, other, key=lambda checkpoint: checkpoint.progress.update)
    if len(seeds) > 1:  # legitimate if all started from the weights of one training
        logs.warn(
            f"averaging trainings with the seeds {', '.join(map(str, sorted(seeds, key=str)))}: "
            "unless they started from the same weights, their mean is useless"
        )
    types = {name: value.dtype for name, value in first.averaged().items()}
    tensors: dict[str, Tensor] = {
        f"model.{name}": (total / len(used)).to(types[name]) for name, total in sums.items()
    }
    tensors |= {f"tokenizer.{side}": newest.tensors[f"tokenizer.{side}"] for side in ("src", "tgt")}
    card = model_card(newest)
    if len(used) > 1:
        card["training"]["averaged_updates"] = sorted(updates)
        card["training"].pop("best_validation", None)  # of a single checkpoint, not of the mean
    card |= {"toolkit": f"fastdiss {__version__}", "license": license or card["license"]}
    card["text"] = card["text"] if text is None else text
    progress = dataclasses.replace(newest.progress, batch=0, window={})
    return dataclasses.replace(newest, progress=progress, tensors=tensors, card=card)


def model_card(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the card of a release, or the card that any other checkpoint would have."""
    if checkpoint.card is not None:
        return checkpoint.card
    progress, dataset = checkpoint.progress, checkpoint.dataset
    training: dict[str, Any] = {
        "dataset_sha256": checkpoint.dataset_hash,
        "sentences": dataset.get("sentences", {}).get("train", "unknown"),
        "updates": progress.update,
        "epochs": progress.epoch,
    }
    if progress.best_figure:
        measure, value = progress.best_figure
        best = {measure: round(value, 3), "update": progress.best_update}
        counted = checkpoint.train_config.get("valid_sentences")  # missing in older checkpoints
        if progress.best_is_bleu and counted:
            best["sentences"] = min(counted, dataset.get("sentences", {}).get("valid", counted))
        training["best_validation"] = best
    sides = {side: dataset.get(side, "unknown") for side in ("source", "target")}
    return {
        "architecture": checkpoint.arch,
        "license": "unknown",
        **sides,
        "parameters": sum(weight.numel() for weight in checkpoint.group("model").values()),
        "vocabulary": {
            "source": checkpoint.tokenizer("src").vocab_size,
            "target": checkpoint.tokenizer("tgt").vocab_size,
        },
        "model": checkpoint.model_config,
        "training": training,
        "text": "",
    }


def card_as_text(card: dict[str, Any]) -> str:
    """Return a card as Markdown with YAML front matter, the format that model hubs read."""
    facts = {key: card[key] for key in _FACTS if key in card}
    front = yaml.safe_dump(facts, sort_keys=False, allow_unicode=True, default_flow_style=None)
    return f"---\n{front}---\n{card['text']}"


def _check_same(first: Checkpoint, other: Checkpoint, path: Path, other_path: Path) -> None:
    """Refuse to average checkpoints of different models."""
    if differs := _difference(first, other):
        raise FastdissError(f"{path} and {other_path} cannot be averaged: {differs}")


def _difference(first: Checkpoint, other: Checkpoint) -> str:
    """Return by what two checkpoints are of different models; "" if by nothing."""
    if first.arch != other.arch:
        return f"the architectures differ ({first.arch} and {other.arch})"
    if names := _differing_options(first, other):
        return f"model.{names[0]} differs"
    both = first, other
    for side in ("src", "tgt"):
        one, two = (checkpoint.tokenizer(side).hash[:16] for checkpoint in both)
        if one != two:
            return f"the {side} tokenizers differ ({one} and {two})"
    one, two = ([c.dataset.get(side, "") for side in ("source", "target")] for c in both)
    if one != two and all((*one, *two)):
        return f"the directions differ ({'-'.join(one)} and {'-'.join(two)})"
    shapes = [{name: w.shape for name, w in c.averaged().items()} for c in both]
    return "" if shapes[0] == shapes[1] else "the weights differ in names or shapes"


def _differing_options(first: Checkpoint, other: Checkpoint) -> list[str]:
    """Return the names of the model's options that differ between checkpoints of one architecture.

    Options that are newer than a checkpoint have their value of then.
    """
    one, two = first.model_config, other.model_config
    try:
        config = architecture(first.arch).family.Config
        return sorted(option_changes(one, build_saved(config, two, "model"), "model"))
    except OptionError:  # of a user module or another version: the architecture, or an option
        return sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))
