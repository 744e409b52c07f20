"""Counter-based randomness: every draw is a function of what it is for, never of what ran before.

Training re-seeds torch before each micro-step from (seed, purpose, update, rank, micro-step), so
a resumed run needs no generator state. Decoding computes its noise from (seed, sentence,
candidate, step, position), so a hypothesis depends neither on its batch nor on its neighbours.
"""
# N rows (candidates), T target length, D latent

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def counter_seed(*parts: int | str) -> int:
    """Hash a tuple of counters and words to a 63-bit seed, the same on every machine."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seed_everything(*parts: int | str) -> None:
    """Seed torch's global generators (CPU and GPU: noise, times, dropout) from counters."""
    torch.manual_seed(counter_seed(*parts))


def philox(
    key: tuple[Tensor | int, Tensor | int], counter: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Apply the Philox-4x32 block function with 10 rounds.

    Args:
        key: two 32-bit words, as numbers or as int64 tensors broadcastable to the counter.
        counter: four int64 tensors holding 32-bit words, of one broadcastable shape.

    Returns:
        Four int64 tensors of independent uniform 32-bit words.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        # the product wraps in int64, which leaves both 32-bit halves of its bits intact
        low, high = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((high >> 32) & _MASK) ^ c1 ^ k0,
            high & _MASK,
            ((low >> 32) & _MASK) ^ c3 ^ k1,
            low & _MASK,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def counter_normal(
    seed: int, sentences: Tensor, candidates: Tensor, step: int, length: int, dim: int
) -> Tensor:
    """Draw standard normal noise for candidates that is independent of batch and padding.

    Args:
        seed: the seed of the whole run.
        sentences: int64 [N], the sentence that each row belongs to.
        candidates: int64 [N], the number of the noise draw within its sentence.
        step: the number of the draw within one candidate, 0 for the start of sampling.
        length, dim: T and D; the value at a position does not depend on T.

    Returns:
        float32 [N, T, D] on the device of ``sentences``.
    """
    device = sentences.device
    word = counter_seed(seed, "decode", step)
    key = word & _MASK, (word >> 32) & _MASK
    quads = (dim + 3) // 4
    cell = torch.arange(length, device=device)[:, None] * quads + torch.arange(quads, device=device)
    counter = (
        cell,
        (sentences & _MASK)[:, None, None],
        ((sentences >> 32) & _MASK)[:, None, None],
        candidates[:, None, None],
    )
    words = torch.stack(torch.broadcast_tensors(*philox(key, counter)), dim=-1)
    # Box-Muller on the centres of 2^24 bins of (0, 1); in the upper half float32 rounds them
    uniform = ((words >> 8).float() + 0.5) / 2**24
    radius = torch.sqrt(-2.0 * torch.log(uniform[..., :2]))
    angle = (2.0 * math.pi) * uniform[..., 2:]
    normal = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return normal.flatten(-2)[..., :dim]
