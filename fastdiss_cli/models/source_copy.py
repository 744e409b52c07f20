"""The soft copy: the encoded source, spread along the diagonal as a first sketch of the target."""
# B sentences, N rows (B x candidates), S source length, T target length, P tokens of a batch,
# H model

from __future__ import annotations

import torch
from torch import Tensor

from fastdiss_cli.data.layout import Layout
from fastdiss_cli.models.layers import Memory

_TOGETHER = 1024  # target positions at a time, so that memory grows with S and not with S^2


def source_copy(memory: Memory, layout: Layout, width: float) -> Tensor:
    """Average, for every target position, the encoded source around its place on the diagonal.

    The weight of source position j for target position i is the softmax over j of
    ``-|(j + 1/2) - (i + 1/2) S/T| / width``. Without it, all that a network knows of a target
    position at pure noise is its number, from which it has to find its place in the source.

    Args:
        memory: of B sentences.
        layout: of N rows, N a multiple of B; those of a sentence are neighbours.
        width: in source positions, above 0.

    Returns:
        float [P, H].

    Source: soft copy, Wei et al. 2019, Imitation learning for non-autoregressive neural machine
    translation (arXiv 1906.02041); here the diagonal ends at the end of both sentences.
    """
    B, S, _ = memory.hidden.shape
    N, T = layout.pad_mask.shape
    device = memory.hidden.device
    ratio = memory.layout.lengths.repeat_interleave(N // B) / layout.lengths
    places = (torch.arange(T, device=device) + 0.5) * ratio[:, None]
    copied = []
    for place in places.split(_TOGETHER, dim=1):
        distance = (torch.arange(S, device=device) + 0.5 - place[..., None]).abs()
        weights = (-distance / width).view(B, -1, S)
        if memory.layout.attn_mask is not None:
            weights = weights.masked_fill(memory.layout.pad_mask[:, None], float("-inf"))
        some = weights.softmax(-1).to(memory.hidden.dtype) @ memory.hidden
        copied.append(some.view(*place.shape, -1))
    return layout.flat(torch.cat(copied, dim=1))
