"""Checkpoints: self-contained safetensors files.

Tensors: ``model.*`` (weights), ``ema.*`` (their average), ``optimizer.*`` (its state by weight) and
``tokenizer.src``, ``tokenizer.tgt`` (SentencePiece models, or fairseq's dictionaries, as bytes).
Metadata: format version, configuration, counters, the dataset's hash, and a sha256 over everything
else in the file.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastdiss_cli.checkpoints.folder import elsewhere, replacing
from fastdiss_cli.data.files import sync
from fastdiss_cli.data.tokenizer import Tokenizer
from fastdiss_cli.data.tokenizer_file import make_tokenizer
from fastdiss_cli.errors import FastdissError

FORMAT_VERSION = "3"
_RENAMED = {"mans_told": "mans_time"}  # model options, from their names in older checkpoints


@dataclass
class Progress:
    """The progress of a training run: all that resuming needs besides the tensors."""

    update: int = 0
    epoch: int = 1
    batch: int = 0  # batches of this epoch that are done
    best: float | None = None  # validation score: BLEU, or the negative loss
    best_loss: float | None = None  # of the best validation, to break ties in BLEU
    best_is_bleu: bool = True
    best_update: int = 0
    bad_validations: int = 0  # in a row
    skipped: int = 0  # updates with a non-finite loss or gradient, in total
    skipped_in_a_row: int = 0
    validation_due: bool = False  # stopped before the validation of this update was finished
    window: dict[str, Any] = field(default_factory=dict)  # the unfinished window of the log

    @property
    def is_best(self) -> bool:
        """Whether the current weights have the best validation score so far."""
        return self.best is not None and self.best_update == self.update

    @property
    def best_figure(self) -> tuple[str, float] | None:
        """The best validation as it is shown: ``bleu`` or ``loss``, and its value."""
        if self.best is None:
            return None
        return ("bleu", self.best) if self.best_is_bleu else ("loss", -self.best)


@dataclass
class Checkpoint:
    """A checkpoint in memory.

    Attributes:
        dataset: facts about the training data: names of both sides, sentences by split.
        card: the model card of a release, which has no optimizer state; None for other checkpoints.
    """

    arch: str
    model_config: dict[str, Any]
    train_config: dict[str, Any]
    progress: Progress
    dataset_hash: str
    world_size: int
    tensors: dict[str, Tensor] = field(repr=False)
    dataset: dict[str, Any] = field(default_factory=dict)
    card: dict[str, Any] | None = None

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors with a prefix, by the rest of their names."""
        start = f"{prefix}."
        return {n.removeprefix(start): t for n, t in self.tensors.items() if n.startswith(start)}

    def averaged(self) -> dict[str, Tensor]:
        """Return the weights to decode with, by name: the moving average if there is one."""
        return {**self.group("model"), **self.group("ema")}

    def tokenizer(self, side: str) -> Tokenizer:
        """Return the tokenizer of a side.

        Raises:
            FastdissError: the checkpoint does not have it.
        """
        model = self.tensors.get(f"tokenizer.{side}", torch.zeros(0))
        return make_tokenizer(model.numpy().tobytes(), f"the checkpoint's tokenizer.{side}")

    def save(self, path: Path) -> None:
        """Write a temporary file, sync and rename it, so that ``path`` is never half written.

        Raises:
            FastdissError: the disk is full or the folder cannot be written; an older file at
                ``path`` is left intact.
        """
        facts = {
            "arch": self.arch,
            "model": self.model_config,
            "train": self.train_config,
            "progress": asdict(self.progress),
            "dataset_hash": self.dataset_hash,
            "world_size": self.world_size,
            "dataset": self.dataset,
            "card": self.card,
        }
        tensors = {name: t.detach().cpu().contiguous() for name, t in sorted(self.tensors.items())}
        text = json.dumps(facts, sort_keys=True)
        about = {"format": FORMAT_VERSION, "facts": text, "sha256": digest(text, tensors)}
        # one entry: safetensors writes several in random order
        metadata = {"fastdiss": json.dumps(about)}
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata)
            # safetensors may create files that only their owner can read
            temporary.chmod(temporary.parent.stat().st_mode & 0o666)
            sync(temporary)

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read and verify a file.

        Raises:
            FastdissError: no such file, not a checkpoint, damaged, or of another format version.
        """
        if not path.is_file():
            hint = elsewhere(path.parent) or "; `fastdiss train` writes them"
            if ":" in str(path):  # as fairseq names an ensemble
                hint = "; give one: there are no ensembles (but `average`, and --rerank-path)"
            raise FastdissError(f"{path}: no such checkpoint{hint}")
        if path.suffix == ".pt":
            raise FastdissError(
                f"{path}: .pt files, as of fairseq, are pickle and are never read; "
                "train a checkpoint with `fastdiss train`"
            )
        try:
            with safe_open(path, framework="pt") as file:
                about = _about(file.metadata() or {})
                version = about.get("format")
                if version == FORMAT_VERSION:
                    tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
                    found = digest(about.get("facts", ""), tensors)
        # RuntimeError, TypeError: number types that torch knows but cannot handle
        except (OSError, SafetensorError, ValueError, RuntimeError, TypeError) as error:
            if not _begins_as_safetensors(path):
                raise FastdissError(
                    f"{path} is not a checkpoint: give a .safetensors file of `fastdiss train`"
                ) from None
            reason = str(error).removeprefix("Error while deserializing header: ")
            raise FastdissError(
                f"{path} is damaged ({reason}): use another one from its folder"
            ) from None
        if version is None:
            raise FastdissError(f"{path} is a safetensors file, but not a fastdiss checkpoint")
        if version != FORMAT_VERSION:
            raise FastdissError(
                f"{path} has checkpoint format {version!r}; this fastdiss reads {FORMAT_VERSION!r}"
            )
        if found != about.get("sha256"):
            raise FastdissError(f"{path} is damaged: its bytes differ from its sha256")
        try:
            facts = json.loads(about["facts"])
            return cls(
                arch=str(facts["arch"]),
                model_config={_RENAMED.get(k, k): v for k, v in dict(facts["model"]).items()},
                train_config=dict(facts["train"]),
                progress=Progress(**facts["progress"]),
                dataset_hash=str(facts["dataset_hash"]),
                world_size=int(facts["world_size"]),
                tensors=tensors,
                dataset=dict(facts.get("dataset", {})),
                card=facts.get("card"),
            )
        except (KeyError, ValueError, TypeError, RecursionError) as error:
            raise FastdissError(
                f"{path} is damaged: its facts are incomplete ({type(error).__name__}: {error})"
            ) from None


def _begins_as_safetensors(path: Path) -> bool:
    """Return whether a file begins like safetensors (a header's length, then JSON) or is empty."""
    try:
        with open(path, "rb") as file:
            head = file.read(9)
            return not head or head[8:] == b"{"
    except OSError:
        return True


def update_of(path: Path) -> int | None:
    """Return the update of a checkpoint, reading only its header; None if there is none."""
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads(_about(file.metadata() or {})["facts"])["progress"]["update"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None


def _about(metadata: dict[str, str]) -> dict[str, str]:
    """Return format, facts and sha256; in format 2 they were separate entries of the metadata."""
    entry = metadata.get("fastdiss")
    if entry is None:
        return {}
    if entry == "2":
        return {**metadata, "format": FORMAT_VERSION}
    try:
        about = json.loads(entry)
    except (ValueError, RecursionError):
        about = None
    if not isinstance(about, dict) or not all(isinstance(v, str) for v in about.values()):
        if len(entry) > 16:  # more than the name of a version
            raise ValueError("its facts are not JSON")
        return {"format": entry}
    return about


def digest(text: str, tensors: dict[str, Tensor]) -> str:
    """Return the sha256 of a text and of tensors with their names."""
    sha256 = hashlib.sha256(text.encode())
    for name, tensor in tensors.items():
        sha256.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        if tensor.numel():
            sha256.update(np.ascontiguousarray(tensor.cpu().flatten().view(torch.uint8).numpy()))
    return sha256.hexdigest()
