"""Counter-based randomness: every draw is a function of what it is for, never of what ran before.

Training re-seeds torch before each micro-step from (seed, purpose, update, rank, micro-step), so
a resumed run needs no generator state. Decoding computes its noise from (seed, sentence,
candidate, step, position), so a hypothesis depends neither on its batch nor on its neighbours.
"""
# K draws, N rows (candidates), T target length, D latent

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

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
        # the product wraps in int64, which leaves both 32-bit halves of its bits intact; c1 and c3
        # keep bits beyond their 32 until they are part of c0 and c2
        low, high = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0 = ((high >> 32) ^ c1 ^ k0) & _MASK
        c2 = ((low >> 32) ^ c3 ^ k1) & _MASK
        c1, c3 = high, low
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1 & _MASK, c2, c3 & _MASK


def counter_normal(
    seed: int, sentences: Tensor, candidates: Tensor, steps: Sequence[int], length: int, dim: int
) -> Tensor:
    """Draw standard normal noise for candidates that is independent of batch and padding.

    Args:
        seed: the seed of the whole run.
        sentences: int64 [N], the sentence that each row belongs to.
        candidates: int64 [N], the number of the noise draw within its sentence.
        steps: the numbers of K draws within one candidate, 0 for the start of sampling.
        length, dim: T and D; the value at a position does not depend on T.

    Returns:
        float32 [K, N, T, D] on the device of ``sentences``.
    """
    device = sentences.device
    words = [counter_seed(seed, "decode", step) for step in steps]
    halves = [[word & _MASK for word in words], [(word >> 32) & _MASK for word in words]]
    k0, k1 = torch.tensor(halves, device=device)[..., None, None, None]
    quads = (dim + 3) // 4
    cell = torch.arange(length, device=device)[:, None] * quads + torch.arange(quads, device=device)
    counter = (
        cell,
        (sentences & _MASK)[:, None, None],
        ((sentences >> 32) & _MASK)[:, None, None],
        candidates[:, None, None],
    )
    # Box-Muller on the centres of 2^24 bins of (0, 1); in the upper half float32 rounds them
    uniform = [((word >> 8).float() + 0.5) / 2**24 for word in philox((k0, k1), counter)]
    r, s = (torch.sqrt(-2.0 * torch.log(u)) for u in uniform[:2])
    a, b = ((2.0 * math.pi) * u for u in uniform[2:])
    normal = [r * torch.cos(a), s * torch.cos(b), r * torch.sin(a), s * torch.sin(b)]
    return torch.stack(normal, dim=-1).flatten(-2)[..., :dim]
