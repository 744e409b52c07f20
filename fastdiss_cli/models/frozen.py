"""Make a trained model ready for decoding: its weights are laid out once for the machine."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """A linear layer for inference on a CPU, its weights reordered once in oneDNN's own layout.

    In float32 torch would call a matrix product that is slower on many CPUs, and in bfloat16 it
    would reorder the weights in every call. The operators are those of torch's compiler.

    Args:
        linear: the trained layer.
        dtype: in which it computes, and what it returns.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        weight = linear.weight.detach().to(dtype)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(
            x.to(self.dtype), self.packed, self.bias, "none", [], ""
        )


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Try whether this torch and this processor have what `PackedLinear` needs."""
    try:
        probe = nn.utils.skip_init(nn.Linear, 16, 16)  # draws nothing from the generators
        PackedLinear(probe, dtype)(torch.zeros(1, 16))
    except (RuntimeError, AttributeError):  # no oneDNN, no such operator, or none for the type
        return False
    return True


def freeze(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace the layers of a model on a CPU by faster ones that cannot be trained any more.

    A module may define ``freeze(dtype)`` for its own preparation. Linear layers on
    another device, or that cannot be packed here, stay as they are.

    Args:
        model: in evaluation mode; changed in place.
        dtype: float32 or bfloat16, in which it is to compute.
    """
    packs = next(model.parameters()).device.type == "cpu" and can_pack(dtype)
    for module in list(model.modules()):
        if hasattr(module, "freeze"):
            module.freeze(dtype)
        for name, child in module.named_children():
            if packs and isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child, dtype))
