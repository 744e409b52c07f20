"""Batched beam search with a key/value cache; finished sentences leave the batch."""
# B sentences still active, K beam, N rows (B x K), V vocabulary

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiss_cli.config import require
from fastdiss_cli.models.layers import Cache, Memory
from fastdiss_cli.models.registry import Hypothesis

# (newest tokens [N, 1], position, memory) -> scores [N, V], before the softmax
Step = Callable[[Tensor, int, Memory], Tensor]


@dataclass(frozen=True)
class BeamDecoding:
    """Options of beam search; a beam of 1 is greedy search."""

    beam: int = 5
    lenpen: float = 1.0  # hypotheses are compared by log-probability / length ** lenpen
    max_len_a: float = 0.0  # a hypothesis has at most max_len_a * S + max_len_b tokens,
    max_len_b: int = 200
    min_len: int = 1  # and at least so many, even if that is more

    def __post_init__(self) -> None:
        require(self, "beam", 1 <= self.beam <= 1000, "from 1 to 1000")
        require(self, "lenpen", -10 <= self.lenpen <= 10, "from -10 to 10")
        require(self, "max_len_a", 0 <= self.max_len_a <= 1000, "from 0 to 1000")
        require(self, "max_len_b", 1 <= self.max_len_b <= 1_000_000, "from 1 to 1000000")
        require(self, "min_len", 0 <= self.min_len <= 1_000_000, "from 0 to 1000000")
        most = self.max_len_b if self.max_len_a == 0 else math.inf
        require(self, "min_len", self.min_len <= most, f"at most max_len_b = {self.max_len_b}")

    @property
    def candidates(self) -> int:
        return self.beam


def beam_search(
    step: Step, caches: list[Cache], memory: Memory, eos: int, options: BeamDecoding
) -> list[list[Hypothesis]]:
    """Search for the most likely answers.

    As in fairseq: decoding starts from eos, a hypothesis ends when eos is among the K best
    continuations, a sentence is done when K hypotheses have ended, a hypothesis has at least
    ``min_len`` tokens, and eos is forced at the length limit (eos itself not counted in either).

    Args:
        step: the decoder; it adds to the caches.
        caches: those of the decoder's layers.
        memory: of all sentences.
        eos: the id that ends a hypothesis.
        options: the beam and the limits.

    Returns:
        For each sentence up to K hypotheses, best score first; the score is the summed
        log-probability over the length (eos included) to the power of ``lenpen``.
    """
    device = memory.hidden.device
    B, K = len(memory.hidden), options.beam
    lengths = memory.layout.lengths.tolist()
    limits = [
        max(options.min_len, int(options.max_len_a * length + options.max_len_b))
        for length in lengths
    ]
    answers: list[list[Hypothesis]] = [[] for _ in range(B)]
    sentences = list(range(B))  # the active ones
    tokens = torch.full((B, K, 1), eos, device=device)
    running = torch.full((B, K, 1), float("-inf"), device=device)  # cumulative log-probability
    running[:, 0] = 0  # at the start all beams are one

    position = 0
    while sentences:
        B = len(sentences)
        logits = step(tokens[:, :, -1].reshape(B * K, 1), position, memory)
        norm = logits.logsumexp(-1, keepdim=True)
        at_limit = [limits[sentence] <= position for sentence in sentences]
        _restrict_eos(logits, eos, at_limit, too_short=position < options.min_len)
        # the 2K best of a sentence are among the 2K best of each of its beams
        log_probs, ids = logits.topk(min(2 * K, logits.shape[1]))
        totals = running[:, :, -1:] + (log_probs - norm).view(B, K, -1)
        width = totals.shape[2]
        totals, flat = totals.flatten(1).topk(min(2 * K, K * width))
        parents, best = flat // width, ids.view(B, -1).gather(1, flat)
        ends = best == eos
        # the only synchronisation with a GPU at a position where nothing ends, below the limits
        b, rank = (ends[:, :K] & totals[:, :K].isfinite()).nonzero().unbind(1)
        if len(b):
            parent, total = parents[b, rank], totals[b, rank]
            token_scores = torch.cat([running[b, parent], total[:, None]], dim=1).diff()
            columns = (b, tokens[b, parent, 1:], total, token_scores)
            for place, answer, score, parts in zip(*(x.tolist() for x in columns), strict=True):
                ended = answers[sentences[place]]
                if len(ended) < K:
                    score /= (position + 1) ** options.lenpen
                    ended.append(Hypothesis(answer, score, parts, nfe=0))

        # the K best unfinished ones: false sorts before true, and the sort is stable
        go_on = torch.sort(ends.int(), dim=1, stable=True).indices[:, :K]
        parents, best, totals = (x.gather(1, go_on) for x in (parents, best, totals))
        kept = []
        for place, (sentence, is_last) in enumerate(zip(sentences, at_limit, strict=True)):
            if is_last or len(answers[sentence]) == K:
                for answer in answers[sentence]:
                    answer.nfe = position + 1  # the cost of the search, however short the answer
            else:
                kept.append(place)
        if len(kept) < B:
            rows = torch.tensor(kept, dtype=torch.long, device=device)
            memory = memory.select(rows)
            parents, best, totals = parents[rows], best[rows], totals[rows]
        else:
            rows = torch.arange(B, device=device)
        tokens = torch.cat([tokens[rows[:, None], parents], best[..., None]], dim=2)
        running = torch.cat([running[rows[:, None], parents], totals[..., None]], dim=2)
        if K > 1 or len(kept) < B:  # in greedy search each row continues itself
            order = (rows[:, None] * K + parents).flatten()
            for cache in caches:
                cache.select(order)
        sentences = [sentences[place] for place in kept]
        position += 1
    return [sorted(ended, key=lambda h: -h.score) for ended in answers]


def _restrict_eos(logits: Tensor, eos: int, at_limit: list[bool], too_short: bool) -> None:
    """Forbid all tokens but eos in sentences at their limit, and eos in others that are too short.

    Args:
        logits: float [N, V], changed in place.
        eos: the id that ends a hypothesis.
        at_limit: of B sentences, N a multiple of B.
        too_short: whether a hypothesis that ended here would have too few tokens.
    """
    if any(at_limit):
        N, V = logits.shape
        device = logits.device
        forced = torch.tensor(at_limit, device=device).repeat_interleave(N // len(at_limit))
        if too_short:
            logits[:, eos].masked_fill_(~forced, float("-inf"))
        others = torch.arange(V, device=device) != eos
        logits.masked_fill_(forced[:, None] & others, float("-inf"))
    elif too_short:
        logits[:, eos] = float("-inf")
