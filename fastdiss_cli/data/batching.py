"""Group sentences into batches of similar cost, reproducibly."""
# B batch, S source length, T target length

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastdiss_cli.data.dataset import TokenFile
from fastdiss_cli.data.layout import Layout
from fastdiss_cli.errors import FastdissError
from fastdiss_cli.randomness import counter_seed


@dataclass
class Batch:
    """Right-padded sentence pairs, with the layouts of their padding.

    Attributes:
        src_tokens, tgt_tokens: int64 [B, S] and [B, T], both sides ending in eos.
    """

    src_tokens: Tensor
    src_layout: Layout
    tgt_tokens: Tensor
    tgt_layout: Layout

    @property
    def num_tgt_tokens(self) -> int:
        return self.tgt_layout.num_tokens

    def to(self, device: torch.device) -> Batch:
        return Batch(
            self.src_tokens.to(device, non_blocking=True),
            self.src_layout.to(device),
            self.tgt_tokens.to(device, non_blocking=True),
            self.tgt_layout.to(device),
        )


def pad(rows: Sequence[Sequence[int] | np.ndarray], value: int) -> tuple[Tensor, Layout]:
    """Stack ragged rows: int64 [B, longest], padded with ``value``, and the layout."""
    return _stack(np.concatenate(rows), np.array([len(row) for row in rows]), value)


def _stack(flat: np.ndarray, lengths: np.ndarray, value: int) -> tuple[Tensor, Layout]:
    """Stack concatenated rows; see `pad`."""
    mask = np.arange(lengths.max(initial=0)) >= lengths[:, None]
    tokens = np.full(mask.shape, value, np.int64)
    tokens[~mask] = flat
    return torch.from_numpy(tokens), Layout.of(torch.from_numpy(mask))


def batches_by_tokens(order: np.ndarray, lengths: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Cut a sequence of sentences into batches whose padded size stays within a budget.

    Args:
        order: int64 [N], sentence numbers; neighbours should have similar lengths.
        lengths: int [*], the length of each sentence by its number.
        max_tokens: the largest (sentences x longest) of a batch; a longer sentence is a batch of
            its own.
    """
    batches, start, longest = [], 0, 0
    for end, length in enumerate(lengths[order].tolist()):
        grown = max(longest, length)
        if end > start and (end - start + 1) * grown > max_tokens:
            batches.append(order[start:end])
            start, grown = end, length
        longest = grown
    if start < len(order):
        batches.append(order[start:])
    return batches


class TokenBatcher:
    """The batches of a split: sentences of similar length together, in a random order.

    The batches of an epoch are a function of (seed, epoch). Every sentence is in exactly one
    batch of one rank, and every rank gets the same number of batches.

    Args:
        src, tgt: the two sides of the split.
        src_pad, tgt_pad: their padding ids.
        max_tokens: the largest padded size of a batch, on either side; exceeded only by a single
            longer sentence, or if there are too few sentences to give every rank a batch.
        max_positions: longer sentences are left out; `left_out` counts them.
        seed, rank, world_size: as in training.
    """

    def __init__(
        self,
        src: TokenFile,
        tgt: TokenFile,
        src_pad: int,
        tgt_pad: int,
        max_tokens: int,
        max_positions: int,
        seed: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.src, self.tgt = src, tgt
        self.src_pad, self.tgt_pad = src_pad, tgt_pad
        self.max_tokens, self.seed = max_tokens, seed
        self.rank, self.world_size = rank, world_size
        self.lengths = np.maximum(src.sizes, tgt.sizes)
        fits = self.lengths <= max_positions
        self.sentences = np.flatnonzero(fits)
        self.left_out = len(fits) - len(self.sentences)
        if len(self.sentences) < world_size:
            there, remedy = f"{len(fits)} sentences", "start fewer processes"
            if self.left_out:
                there = f"{len(self.sentences)} of {there} have at most {max_positions} tokens"
                remedy = f"raise train.max_positions, or {remedy}"
            raise FastdissError(
                f"{src.stem}: {there}, too few for {world_size} process(es): {remedy}"
            )

    @property
    def sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """The lengths of all sources and targets that are not left out, int32 [N] each."""
        return self.src.sizes[self.sentences], self.tgt.sizes[self.sentences]

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """Return this rank's batches of an epoch, each an array of sentence numbers."""
        return [batches[self.rank] for batches in self.rounds(epoch)]

    def rounds(self, epoch: int) -> list[list[np.ndarray]]:
        """Return the batches of all ranks: a list of rounds, each with one batch per rank."""
        draw = np.random.Generator(np.random.Philox(counter_seed(self.seed, "batches", epoch)))
        shuffled = draw.permutation(self.sentences)
        batches = batches_by_tokens(self._by_length(shuffled), self.lengths, self.max_tokens)
        spare = len(batches) % self.world_size
        if spare and len(batches) - spare + self.world_size > len(self.sentences):
            for _ in range(spare):  # too few sentences to halve: merge the shortest batches
                batches.append(np.concatenate([batches.pop(0), batches.pop(0)]))
        while len(batches) % self.world_size:  # halve the fullest until the ranks come out even
            fullest = max(range(len(batches)), key=lambda i: len(batches[i]))
            batch = batches.pop(fullest)
            batches += [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
        order = draw.permutation(len(batches)).reshape(-1, self.world_size)
        return [[batches[i] for i in numbers] for numbers in order]

    def _by_length(self, sentences: np.ndarray) -> np.ndarray:
        """Sort sentences so that neighbours have similar lengths on both sides.

        The first key is the length of the longer side, which the budget counts; the second is the
        difference of the sides, alternately ascending and descending, which avoids large jumps.
        """
        lengths = self.lengths[sentences]
        differences = self.src.sizes[sentences] - self.tgt.sizes[sentences]
        alternating = np.where(lengths % 2, -differences, differences)
        return sentences[np.lexsort((alternating, lengths))]

    def num_tgt_tokens(self, sentences: np.ndarray) -> int:
        """Return the number of target tokens of the given sentences."""
        return int(self.tgt.sizes[sentences].sum())

    def padded_size(self, sentences: np.ndarray) -> int:
        """Return the number of positions, on both sides, of the given sentences as a batch."""
        widths = self.src.sizes[sentences].max() + self.tgt.sizes[sentences].max()
        return len(sentences) * int(widths)

    def collate(self, sentences: np.ndarray) -> Batch:
        """Read and pad the given sentences."""
        src, tgt = self.src, self.tgt
        src_tokens, src_layout = _stack(src.gather(sentences), src.sizes[sentences], self.src_pad)
        tgt_tokens, tgt_layout = _stack(tgt.gather(sentences), tgt.sizes[sentences], self.tgt_pad)
        return Batch(src_tokens, src_layout, tgt_tokens, tgt_layout)
