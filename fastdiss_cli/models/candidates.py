"""The candidates of a batch while they are sampled: their noise, history and early exit."""
# B sentences, N rows (B x candidates), T target length, D latent

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastdiss_cli.diffusion.sampler import Sampled
from fastdiss_cli.models.denoiser import Denoiser
from fastdiss_cli.models.registry import HistoryStep
from fastdiss_cli.randomness import counter_normal

if TYPE_CHECKING:
    from fastdiss_cli.models.diffusion_decoding import DiffusionDecoding

EXIT_PROBABILITY = 0.5  # an early exit needs more for every token: see docs/method.md
# random numbers that are drawn in one call: on a CPU as many as fit in a core's cache
_CPU_NUMBERS, _GPU_NUMBERS = 2**17, 2**22


@dataclass
class Candidates(Sampled):
    """The candidates that are being sampled, grouped by sentence.

    Attributes:
        denoiser: the network, with the memory of B sentences and the layout of N candidates; both
            shrink when sentences are dropped.
        options: how they are sampled.
        seeds, numbers: int64 [N], the seed of its sentence and its number within the sentence, from
            which its noise is drawn.
        noise_keys: int64 [10, 2, K], of the draws of noise of a run: see `randomness.draw_keys`.
        gold: see `Sampled`.
        history: that of each candidate, filled if the options ask for it.
        best, before: int64 [N, T] and bool [N]: the best tokens of this step and of the step
            before, and whether the network is sure of all of them, for an early exit.
        drawn: draws that are made but not used yet, float [N, T, D], by their number.
    """

    denoiser: Denoiser
    options: DiffusionDecoding
    seeds: Tensor
    numbers: Tensor
    noise_keys: Tensor
    gold: Tensor | None = None
    history: list[list[HistoryStep]] = field(default_factory=list)
    best: tuple[Tensor, Tensor] | None = None
    before: tuple[Tensor, Tensor] | None = None
    drawn: dict[int, Tensor] = field(default_factory=dict)

    def noise(self, draw: int) -> Tensor:
        """Return the k-th standard normal draw of every candidate; each is used once.

        For few candidates several draws are made in one call, because a call costs 150 operations
        even for a few numbers.
        """
        if draw not in self.drawn:
            length = self.denoiser.layout.pad_mask.shape[1]
            dim = self.denoiser.model.config.latent_dim
            numbers = _CPU_NUMBERS if self.noise_keys.device.type == "cpu" else _GPU_NUMBERS
            count = max(numbers // (len(self.seeds) * length * dim), 1)
            keys = self.noise_keys[..., draw : draw + count]
            noise = counter_normal(keys, self.seeds, self.numbers, length, dim)
            self.drawn = dict(enumerate(noise, draw))
        return self.drawn.pop(draw)

    def denoise(self, z: Tensor, t: Tensor, self_cond: Tensor) -> Tensor:
        return self.denoiser(z, t, self_cond)

    def to_self_cond(self, z0_hat: Tensor) -> Tensor:
        """Return what `Denoiser.to_self_cond` does; note the best tokens for an early exit."""
        if not self.options.early_exit:
            return self.denoiser.to_self_cond(z0_hat)
        model, layout = self.denoiser.model, self.denoiser.layout
        estimate, probabilities, tokens = map(
            layout.padded,
            model.embedding.project_and_read(layout.flat(z0_hat), model.config.self_cond_form),
        )
        sure = (probabilities > EXIT_PROBABILITY) | layout.pad_mask
        self.best = tokens, sure.all(1)
        return estimate

    def clamp(self, z0_hat: Tensor, self_cond: Tensor) -> Tensor:
        form = self.options.clamp
        if form == self.denoiser.model.config.self_cond_form:
            return self_cond  # not computed twice
        return self.denoiser.project(z0_hat, form)

    def watch(self, rows: Tensor, t: Tensor, z: Tensor, z0_hat: Tensor) -> None:
        """Add a step to the history of each row; means are over non-padding positions."""
        if not (self.options.history or self.options.diagnose):
            return
        denoiser, model = self.denoiser, self.denoiser.model
        scores, tokens = model.read(z0_hat, denoiser.layout)
        own = ~denoiser.layout.pad_mask
        lengths = own.sum(1)

        def mean(squares: Tensor) -> list[float]:
            return ((squares.mean(-1) * own).sum(1) / lengths).tolist()

        norms, gaps = mean(z0_hat.square()), [math.nan] * len(rows)
        if self.options.diagnose and model.self_conditioned:
            estimate = denoiser.to_self_cond(denoiser(z, t, torch.zeros_like(z)))
            gaps = mean((z0_hat - denoiser(z, t, estimate)).square())
        for row, length, ids, values, norm, gap in zip(
            rows.tolist(), lengths.tolist(), tokens.tolist(), scores.exp().tolist(), norms, gaps,
            strict=True,
        ):  # fmt: skip
            answer = model.trim(ids[:length], values)
            self.history[row].append(HistoryStep(float(t), *answer, norm, gap))

    def drop(self) -> Tensor | None:
        """Drop the sentences whose candidates are sure of the same tokens for a second step."""
        if not self.options.early_exit:
            return None
        assert self.best is not None
        (tokens, sure), before = self.best, self.before
        self.before = self.best
        if before is None:
            return None
        settled = (tokens == before[0]).all(1) & before[1] & sure
        go_on = ~settled.reshape(len(self.denoiser.memory.hidden), -1).all(1)
        if go_on.all():
            return None
        rows = go_on.repeat_interleave(len(tokens) // len(go_on)).nonzero().squeeze(1)
        self.denoiser.select(go_on.nonzero().squeeze(1), rows)
        self.seeds, self.numbers = self.seeds[rows], self.numbers[rows]
        self.before = tokens[rows], sure[rows]
        self.drawn = {draw: noise[rows] for draw, noise in self.drawn.items()}
        return rows
