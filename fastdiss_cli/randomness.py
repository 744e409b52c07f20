"""Counter-based randomness: every draw is a function of its purpose, never of earlier draws.

Training re-seeds torch before each micro-step from (seed, purpose, update, rank, micro-step), so
a resumed run needs no generator state. Decoding computes its noise from (seed, source tokens,
candidate, step, position), so a hypothesis depends neither on its batch, nor on its neighbours,
nor on its position in the corpus.
"""
# K draws, N rows (candidates), T target length, D latent

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


def draw_keys(seed: int, draws: int) -> Tensor:
    """Return the Philox keys of the draws 0, 1, ... within one candidate, int64 [10, 2, K]."""
    words = torch.tensor([counter_seed(seed, "decode", draw) for draw in range(draws)])
    return round_keys(torch.stack([words & _MASK, (words >> 32) & _MASK]))


def round_keys(key: Tensor) -> Tensor:
    """Return the round keys of Philox's 10 rounds, int64 [10, 2, ...], for a key [2, ...]."""
    steps = torch.tensor([0x9E3779B9, 0xBB67AE85]) * torch.arange(10)[:, None]
    return (key + steps.reshape(10, 2, *[1] * (key.dim() - 1))) & _MASK


def philox(keys: Tensor, counter: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Apply the Philox-4x32 block function with 10 rounds.

    Args:
        keys: int64 [10, 2, ...], see `round_keys`; broadcastable to the counter.
        counter: four int64 tensors holding 32-bit words, broadcastable to one shape.

    Returns:
        Four int64 tensors of independent uniform 32-bit words.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    c0, c1, c2, c3 = counter
    for k0, k1 in keys:
        # the products wrap in int64, which keeps all 64 bits; c1 and c3 are masked only where
        # they enter c0 and c2, or at the end
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0 = ((product1 >> 32) ^ c1 ^ k0) & _MASK
        c2 = ((product0 >> 32) ^ c3 ^ k1) & _MASK
        c1, c3 = product1, product0
    return c0, c1 & _MASK, c2, c3 & _MASK


def counter_normal(
    keys: Tensor, sentences: Tensor, candidates: Tensor, length: int, dim: int
) -> Tensor:
    """Draw standard normal noise for candidates that is independent of batch and padding.

    Args:
        keys: int64 [10, 2, K], the keys of the draws; see `draw_keys`.
        sentences: int64 [N], the seed of each row's sentence.
        candidates: int64 [N], the number of each row's noise within its sentence.
        length, dim: T and D; the value at a position does not depend on T.

    Returns:
        float32 [K, N, T, D] on the device of the arguments.
    """
    device = sentences.device
    quads = (dim + 3) // 4
    cell = torch.arange(length, device=device)[:, None] * quads + torch.arange(quads, device=device)
    counter = (
        cell,
        (sentences & _MASK)[:, None, None],
        ((sentences >> 32) & _MASK)[:, None, None],
        candidates[:, None, None],
    )
    words = philox(keys[..., None, None, None], counter)
    # Box-Muller on the centres of 2^24 bins of (0, 1); in the upper half float32 rounds them
    uniform = [((word >> 8).float() + 0.5) / 2**24 for word in words]
    r, s = (torch.sqrt(-2.0 * torch.log(u)) for u in uniform[:2])
    a, b = ((2.0 * math.pi) * u for u in uniform[2:])
    normal = [r * torch.cos(a), s * torch.cos(b), r * torch.sin(a), s * torch.sin(b)]
    return torch.stack(normal, dim=-1).flatten(-2)[..., :dim]
