"""The training side of self-conditioning: standard, perturbed (SCP), and model-aware noise (MANS).

Each of the two functions at the end chooses, for one training pass, the noise times of the tokens
and the estimate that the network is conditioned on (``self_cond``). Loss and network are the same.
"""
# B batch, T target length, D latent

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fastdiss_cli.diffusion import Denoise, ToSelfCond
from fastdiss_cli.diffusion.schedule import NoiseSchedule, grid_position, grid_time
from fastdiss_cli.diffusion.solvers import Ancestral

SCP_OFFSETS = ("step-matched", "uniform", "fixed", "none")
SCP_COUPLINGS = ("markov", "shared", "independent")
MANS_CONFIDENCES = ("distance", "probability")
MANS_TIMES = ("sentence", "token")


@dataclass
class Condition:
    """What a training pass is conditioned on."""

    t: Tensor  # noise times, float [B, 1] or, per token, [B, T]
    network_t: Tensor  # the times that the network is given, of either shape
    self_cond: Tensor  # the estimate of z_0 that the network is given, float [B, T, D]
    # what replaces the noised z_0, and where: float [B, T, D] and bool [B, 1, 1]
    unrolled: tuple[Tensor, Tensor] | None = None

    def z_t(self, schedule: NoiseSchedule, z_0: Tensor, noise: Tensor) -> Tensor:
        """Return the network's input, float [B, T, D], from clean embeddings and their noise."""
        z_t = schedule.add_noise(z_0, self.t, noise)
        if self.unrolled is not None:
            sampled, chosen = self.unrolled
            z_t = torch.where(chosen, sampled, z_t)
        return z_t if self.network_t is self.t else schedule.as_at(self.network_t, z_t, self.t)


@dataclass(frozen=True)
class SCP:
    """Self-conditioning perturbation: the first pass runs at a higher noise t' > t.

    Attributes:
        offset: ``step-matched``: the time of the step before in a K-step run, with K drawn from
            ``step_counts`` (on the grid that is uniform in t: t + 1/K); ``uniform``: t' uniform
            on (t, 1]; ``fixed``: t + gap; ``none``: t' = t, the standard self-conditioning.
        coupling: how z_t' depends on z_t. ``markov``: noised further from it; ``shared``: the
            same noise at a higher level; ``independent``: fresh noise.
        rate: the share of batches that have a first pass at all; the others are given zeros.
        gap: the offset where it is ``fixed``.
        step_counts: the K of ``step-matched``.
        grid: the time grid of ``step-matched``.
        unroll: among the sentences that are given an estimate, the share whose z_t is not a noised
            z_0 but the result of one ancestral sampling step from z_t' and that estimate. At low
            noise z_t says more than any estimate, and in sampling it carries the model's own
            mistakes: this way the network learns to correct them instead of copying them. After
            Savinov et al. 2022, Step-unrolled denoising autoencoders; not in the FastDiSS paper.
    """

    offset: str
    coupling: str
    rate: float
    gap: float
    step_counts: tuple[int, ...]
    grid: str
    unroll: float

    def stale_time(self, t: Tensor, schedule: NoiseSchedule) -> Tensor:
        """Draw the time of the estimate that sampling would have at time t; float [B, 1] both.

        A result above 1 means that t belongs to the first step of sampling, whose self_cond is
        zeros.
        """
        if self.offset == "uniform":
            return t + (1 - t) * torch.rand_like(t)
        if self.offset == "fixed":
            return t + self.gap
        if self.offset == "none":
            return t
        counts = _on_device(self.step_counts, t.device)
        u = grid_position(t, self.grid, schedule)
        u = u + 1 / counts[torch.randint(len(counts), t.shape, device=t.device)]
        return torch.where(u > 1, u, grid_time(u.clamp(max=1), self.grid, schedule))

    def token_stale_times(self, token_t: Tensor, t: Tensor, stale_t: Tensor) -> Tensor:
        """Return t'_i [B, T], where MANS moved tokens from t [B, 1] to t_i, [B, T] or [B, 1].

        A token keeps the gap of its sentence (``uniform``: its share of what is left up to 1).
        """
        gap = stale_t - t
        if self.offset == "uniform":
            gap = gap * ((1 - token_t) / (1 - t))
        return (token_t + gap).clamp(max=1)

    def stale_z(
        self, schedule: NoiseSchedule, z_0: Tensor, noise: Tensor, t: Tensor, stale_t: Tensor
    ) -> Tensor:
        """Return z_t', float [B, T, D], where z_0 and ``noise`` make z_t at time t."""
        if self.coupling == "shared":
            return schedule.add_noise(z_0, stale_t, noise)
        fresh = torch.randn_like(z_0)
        if self.coupling == "independent":
            return schedule.add_noise(z_0, stale_t, fresh)
        return schedule.add_more_noise(schedule.add_noise(z_0, t, noise), t, stale_t, fresh)


@cache
def _on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Return numbers as a tensor, int64; cached, because the copy waits for the device."""
    return torch.tensor(numbers, device=device)


@dataclass(frozen=True)
class MANS:
    """Model-aware noise scaling: tokens that the model gets right are given more noise.

    ``t_i = t + strength r_i (1 - t)``, where the ease r_i in [0, 1] is linear between two anchors.

    Attributes:
        strength: lambda, in [0, 1]; 0 switches MANS off.
        confidence: ``distance``: the squared difference between z0_hat and the gold embedding, mean
            over coordinates (about 1 for an uninformed estimate, 0 for a perfect one);
            ``probability``: that of the gold token.
        anchors: (easy, hard): the values where r is 1 and where it is 0.
        start_update: the first update that uses it.
        shared_pass: take the confidence from SCP's pass instead of a pass of its own. It saves a
            pass, but then the noise gives away which of the estimates in ``self_cond`` are right;
            in sampling nothing does. z_t' is then noised further from z_t at t, not at t_i.
        time: whether the network is given the time t of the ``sentence`` or t_i of each ``token``.
            The times t_i reveal which tokens it gets right. In sampling all of them are equal,
            which a network trained with t_i takes to mean that every token is wrong. With
            ``sentence`` z_t also has the variance of t, or its norm would reveal t_i.
    """

    strength: float
    confidence: str
    anchors: tuple[float, float]
    start_update: int
    shared_pass: bool
    time: str

    def active(self, update: int) -> bool:
        return self.strength > 0 and update >= self.start_update

    def ease(self, measured: Tensor) -> Tensor:
        """Map what ``confidence`` names to r in [0, 1], of the same shape."""
        easy, hard = self.anchors
        return ((hard - measured) / (hard - easy)).clamp(0, 1)

    def token_times(self, t: Tensor, ease: Tensor) -> Tensor:
        """Return t_i, float [B, T], from t [B, 1] and r [B, T]."""
        return t + self.strength * ease * (1 - t)


def draw_times(batch: int, device: torch.device) -> Tensor:
    """Draw one time per sentence, uniform on [0, 1) and stratified over the batch; float [B, 1].

    As the low-discrepancy sampler of Kingma et al. 2021, Variational diffusion models, I.1, but
    with an offset for each sentence.
    """
    offset = torch.rand(batch, 1, device=device)
    times = (torch.randperm(batch, device=device)[:, None] + offset) / batch
    return times.clamp(max=1 - 2**-24)  # the sum may round up to 1, where nothing is left to add


def standard_self_conditioning(
    denoise: Denoise, to_self_cond: ToSelfCond, z_t: Tensor, t: Tensor, rate: float
) -> Condition:
    """Condition a share ``rate`` of batches on the network's own first estimate at the same z_t.

    Source: Chen et al. 2023, Analog bits, section 2.2.
    """
    self_cond = torch.zeros_like(z_t)
    if float(torch.rand(())) < rate:
        self_cond = to_self_cond(denoise(z_t, t, self_cond))
    return Condition(t, t, self_cond)


def perturbed_self_conditioning(
    denoise: Denoise,
    to_self_cond: ToSelfCond,
    measure: Callable[[Tensor], Tensor],
    schedule: NoiseSchedule,
    scp: SCP,
    mans: MANS,
    z_0: Tensor,
    noise: Tensor,
    t: Tensor,
    update: int,
) -> Condition:
    """Draw what FastDiSS trains on: t, then MANS gives t_i, then SCP estimates at t' > t_i.

    Args:
        denoise: the network, for the passes without gradient.
        to_self_cond: maps z0_hat to the ``self_cond`` made of it.
        measure: maps z0_hat [B, T, D] to what `MANS.confidence` names, [B, T].
        schedule, scp, mans: the process and the two repairs.
        z_0, noise: clean embeddings and standard normal, float [B, T, D].
        t: float [B, 1].
        update: number of the current update.

    Source: FastDiSS, arXiv 2604.05551, of which only a summary was read: see docs/method.md.
    """
    zeros = torch.zeros_like(z_0)
    stale_t = scp.stale_time(t, schedule)
    without_estimate = float(torch.rand(())) >= scp.rate
    scaled = mans.active(update)
    shared = scaled and mans.shared_pass and not without_estimate
    token_t = t
    if scaled and not shared:
        estimate = denoise(schedule.add_noise(z_0, t, noise), t, zeros)
        token_t = mans.token_times(t, mans.ease(measure(estimate)))
    by_token = mans.time == "token"
    if without_estimate:
        return Condition(token_t, token_t if by_token else t, zeros)

    token_stale_t = scp.token_stale_times(token_t, t, stale_t)
    z_stale = scp.stale_z(schedule, z_0, noise, token_t, token_stale_t)
    network_stale_t = token_stale_t if by_token else stale_t.clamp(max=1)
    hides = scaled and not by_token
    z_given = schedule.as_at(network_stale_t, z_stale, token_stale_t) if hides else z_stale
    estimate = denoise(z_given, network_stale_t, zeros)
    if shared:
        moved = mans.token_times(t, mans.ease(measure(estimate)))
        token_t = torch.minimum(moved, token_stale_t)
    in_first_step = (stale_t > 1)[..., None]
    self_cond = to_self_cond(estimate)
    unrolled = None
    if scp.unroll > 0 and scp.offset != "none":  # t' = t would be no step
        chosen = torch.rand_like(in_first_step, dtype=z_0.dtype) < scp.unroll
        times = token_stale_t[..., None], token_t[..., None]
        sampled = Ancestral(schedule)(z_stale, self_cond, *times, lambda: torch.randn_like(z_0))
        unrolled = sampled, chosen & ~in_first_step
    network_t = token_t if by_token else t
    self_cond = self_cond.masked_fill(in_first_step, 0)
    return Condition(token_t, network_t, self_cond, unrolled)
