"""The positions of the tokens in a padded batch."""
# N rows, T length, P tokens (without padding) of a batch

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Layout:
    """The positions of the tokens in a right-padded batch.

    Every layer but attention works on the concatenated tokens, so that padding costs nothing there;
    attention works on the batch.

    Attributes:
        pad_mask: bool [N, T], true on padding.
        index: int64 [P], the positions of the P tokens in the flattened batch; None: all positions.
        dense: compute padding like tokens, and mask it in attention only; its outputs are not used.
        lengths: int64 [N], the number of tokens in each row.
        attn_mask: bool [N, 1, 1, T], true where to attend; None: everywhere.
    """

    pad_mask: Tensor
    index: Tensor | None
    dense: bool = False

    def __post_init__(self) -> None:
        real = ~self.pad_mask
        self.lengths = real.sum(1)
        padded = self.dense or self.index is not None
        self.attn_mask = real[:, None, None] if padded else None

    @classmethod
    def of(cls, pad_mask: Tensor) -> Layout:
        """Return the layout of a mask. On a GPU this synchronises, to count the tokens."""
        index = (~pad_mask).flatten().nonzero().squeeze(1)
        return cls(pad_mask, None if len(index) == pad_mask.numel() else index)

    @property
    def num_tokens(self) -> int:
        """The number of positions that are computed, P: of a dense layout, padding too."""
        return self.pad_mask.numel() if self.index is None else len(self.index)

    def flat(self, x: Tensor) -> Tensor:
        """Return the tokens [P, ...] of a batch [N, T, ...]."""
        x = x.flatten(0, 1)
        return x if self.index is None else x.index_select(0, self.index)

    def padded(self, x: Tensor) -> Tensor:
        """Return the batch [N, T, ...] of tokens [P, ...], with zeros as padding."""
        if self.index is not None:
            batch = x.new_zeros(self.pad_mask.numel(), *x.shape[1:])
            x = batch.index_copy(0, self.index, x)
        return x.unflatten(0, self.pad_mask.shape)

    def to(self, device: torch.device) -> Layout:
        index = None if self.index is None else self.index.to(device, non_blocking=True)
        return Layout(self.pad_mask.to(device, non_blocking=True), index, self.dense)

    def select(self, rows: Tensor) -> Layout:
        """Return the layout of some rows; int64 indices into N."""
        mask = self.pad_mask[rows]
        return Layout(mask, None, dense=True) if self.dense else Layout.of(mask)
