"""Load a checkpoint for decoding: the model, prepared for its device, and its tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdiss_cli.checkpoints.checkpoint import Checkpoint
from fastdiss_cli.checkpoints.folder import best_of
from fastdiss_cli.config import build_saved
from fastdiss_cli.data.tokenizer import Tokenizer
from fastdiss_cli.errors import FastdissError, OptionError
from fastdiss_cli.models.frozen import freeze
from fastdiss_cli.models.registry import Architecture, Seq2SeqModel, Vocabulary, architecture


class Loaded(NamedTuple):
    """A checkpoint, ready to decode.

    Attributes:
        languages: source and target; "" if unknown.
        dtype: float32 or bfloat16, the type that the model decodes in.
    """

    model: Seq2SeqModel
    src: Tokenizer
    tgt: Tokenizer
    arch: Architecture
    languages: tuple[str, str]
    dtype: torch.dtype


def load_model(
    path: Path,
    device: torch.device,
    user_module: Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> Loaded:
    """Load a checkpoint's model (averaged weights, for inference only) and its tokenizers.

    Args:
        path: the checkpoint; a folder stands for its ``checkpoint_best``.
        device: the device to decode on.
        user_module: a Python file that registers architectures.
        dtype: float32 or bfloat16, the type to decode in.

    Raises:
        FastdissError: see `Checkpoint.load`; or its architecture is not registered.
    """
    path = best_of(path)
    checkpoint = Checkpoint.load(path)
    try:
        arch = architecture(checkpoint.arch, user_module)
    except OptionError as error:
        raise FastdissError(f"{path}: its architecture {error.reason}") from None
    src, tgt = checkpoint.tokenizer("src"), checkpoint.tokenizer("tgt")
    try:
        config = build_saved(arch.family.Config, checkpoint.model_config, "model")
    except OptionError as error:
        own = "must be one of" in error.reason and user_module is None
        hint = "; if that is your own, give --user-module" if own else ""
        raise FastdissError(f"{path}: {error}{hint}") from None
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn, then replaced
        model = arch.model(config, vocabulary(src), vocabulary(tgt))
    load_weights(model, checkpoint.averaged(), path)
    model = model.to(device, torch.float32).eval()
    freeze(model, dtype)
    source, target = (checkpoint.dataset.get(side, "") for side in ("source", "target"))
    return Loaded(model, src, tgt, arch, (source, target), dtype)


def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """Return the facts about a tokenizer that a model needs."""
    ids = (tokenizer.bos, tokenizer.pad, tokenizer.eos)
    return Vocabulary(tokenizer.vocab_size, *ids, hash=tokenizer.hash)


@torch.no_grad()
def load_weights(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Copy named weights into a model.

    Raises:
        FastdissError: names or shapes differ.
    """
    own = dict(model.named_parameters())
    different = {n for n in own.keys() | weights.keys() if _shape(own, n) != _shape(weights, n)}
    if different:
        name = min(different)
        raise FastdissError(
            f"{path}: the weights do not fit the model: {name} {_shape(weights, name)} in the file "
            f"and {_shape(own, name)} in the model"
        )
    for name, p in own.items():
        p.copy_(weights[name])


def _shape(tensors: dict[str, Any], name: str) -> str:
    return f"has shape {list(tensors[name].shape)}" if name in tensors else "is missing"
