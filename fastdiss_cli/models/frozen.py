"""Prepare a trained model for decoding: lay out its weights once for the machine."""

from __future__ import annotations

import copy
from functools import cache

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """A linear layer for inference on a CPU, its weights reordered once in oneDNN's own layout.

    In float32 torch would call a matrix product that is slower on many CPUs, and in bfloat16 it
    would reorder the weights in every call. The operators are those that torch.compile uses.

    Args:
        weight, bias: those of the trained layer.
        dtype: the type that it computes in and returns.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype))
        self.bias = None if bias is None else bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(
            x.to(self.dtype), self.packed, self.bias, "none", [], ""
        )


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Return whether this torch and this processor support `PackedLinear`, by trying it."""
    try:
        PackedLinear(torch.zeros(16, 16), torch.zeros(16), dtype)(torch.zeros(1, 16))
    except (RuntimeError, AttributeError):  # no oneDNN, no such operator, or none for the type
        return False
    return True


def freeze(model: nn.Module, dtype: torch.dtype) -> None:
    """Prepare a model for decoding; it cannot be trained any more.

    A module may define ``freeze(dtype)`` for its own preparation. Linear layers are packed on a
    CPU that supports it; on a GPU their weights are cast to ``dtype`` once, which autocast would
    do for every batch.

    Args:
        model: in evaluation mode; changed in place.
        dtype: float32 or bfloat16, the type to compute in.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    for module in list(model.modules()):
        if hasattr(module, "freeze"):
            module.freeze(dtype)
        for name, child in module.named_children():
            if type(child) is not nn.Linear:  # a subclass may compute something else
                continue
            if on_cpu and can_pack(dtype):
                setattr(module, name, PackedLinear(child.weight, child.bias, dtype))
            elif not on_cpu and child.weight.dtype != dtype:
                # a copy: an embedding may share the weights, and must keep them
                setattr(module, name, copy.deepcopy(child).to(dtype))
