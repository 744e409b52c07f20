"""Noise schedules: how much signal and how much noise at time t.

``z_t = alpha(t) z_0 + sigma(t) noise`` with ``alpha = sqrt(abar)`` and
``sigma = F sqrt(1 - abar)``. The noise factor ``F`` is part of the schedule, so that training and
sampling cannot use different ones. To add a schedule, add its ``abar`` to `ABAR`: a decreasing
function with ``abar(0) = 1`` and ``abar(1) = 0`` exactly, because sampling starts from pure noise.
"""
# B batch, T target length, D latent

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ABAR: dict[str, Callable[[Tensor], Tensor]] = {
    "sqrt": lambda t: 1 - torch.sqrt(t),  # Li et al. 2022, Diffusion-LM, without its offset
    "linear": lambda t: 1 - t,
    "cosine": lambda t: torch.sin(0.5 * math.pi * (1 - t)) ** 2,  # Nichol & Dhariwal 2021, s = 0
}


@dataclass(frozen=True)
class NoiseSchedule:
    """Map times in [0, 1] to signal and noise levels.

    Args:
        name: a key of `ABAR`.
        factor: F, the standard deviation of the noise at t = 1.
    """

    name: str
    factor: float

    def alpha(self, t: Tensor) -> Tensor:
        """Return the signal level, in [0, 1], of the shape of t."""
        return torch.sqrt(ABAR[self.name](t))

    def sigma(self, t: Tensor) -> Tensor:
        """Return the standard deviation of the noise, in [0, F], of the shape of t."""
        return self.factor * torch.sqrt(1 - ABAR[self.name](t))

    def scale(self, t: Tensor) -> Tensor:
        """Return the standard deviation of a coordinate of z_t where z_0 has unit variance."""
        return torch.sqrt(self.alpha(t) ** 2 + self.sigma(t) ** 2)

    def add_noise(self, z_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return z_t, float [B, T, D], for times [B] or, per token, [B, T]."""
        return _column(self.alpha(t), z_0) * z_0 + _column(self.sigma(t), z_0) * noise

    def add_more_noise(self, z_t: Tensor, t: Tensor, later: Tensor, noise: Tensor) -> Tensor:
        """Noise z_t further to a later time: the Markov coupling of the ancestral sampler.

        ``z_t' = a z_t + sqrt(sigma'^2 - a^2 sigma^2) noise`` with ``a = alpha'/alpha``, so that
        z_t' is distributed as if z_0 had been noised to t' directly.

        Args:
            z_t: float [B, T, D] at time ``t``.
            t, later: times [B] or [B, T]; ``later >= t``. At ``t = 1`` there is no signal to carry
                over, and z_t itself is returned.
            noise: standard normal, float [B, T, D], independent of the noise in z_t.
        """
        a, variance = self.transition(t, later)
        return _column(a, z_t) * z_t + _column(torch.sqrt(variance), z_t) * noise

    def transition(self, t: Tensor, later: Tensor) -> tuple[Tensor, Tensor]:
        """Return a = alpha'/alpha and the variance sigma'^2 - a^2 sigma^2 between two times."""
        alpha = self.alpha(t)
        a = torch.where(alpha > 0, self.alpha(later) / alpha.clamp_min(1e-30), 1.0)
        variance = self.sigma(later) ** 2 - a**2 * self.sigma(t) ** 2
        return a, variance.clamp_min(0)


def _column(level: Tensor, like: Tensor) -> Tensor:
    """Append axes to a level of shape [B] or [B, T] until it broadcasts against [B, T, D]."""
    return level.reshape(level.shape + (1,) * (like.dim() - level.dim()))


TIME_GRIDS = ("uniform", "quadratic", "log-snr")


def time_grid(steps: int, kind: str = "uniform", schedule: NoiseSchedule | None = None) -> Tensor:
    """Return the N + 1 times 1 = tau_0 > ... > tau_N = 0 of an N-step run, float [N + 1].

    Args:
        steps: N, at least 1.
        kind: ``uniform`` in t; ``quadratic``: uniform in sqrt(t), more steps at low noise;
            ``log-snr``: the times between the ends uniform in log(alpha/sigma).
        schedule: needed for ``log-snr``.
    """
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    if kind == "quadratic":
        u = u**2
    elif kind == "log-snr":
        assert schedule is not None
        # the logarithm is infinite at both ends: cut there, and inverted by interpolation
        t = torch.linspace(1e-3, 1 - 1e-3, 10_000, dtype=torch.float64)
        log_snr = torch.log(schedule.alpha(t) / schedule.sigma(t))
        wanted = torch.lerp(log_snr[0], log_snr[-1], u)
        right = torch.searchsorted(-log_snr, -wanted).clamp(1, len(t) - 1)
        share = (wanted - log_snr[right - 1]) / (log_snr[right] - log_snr[right - 1])
        u = torch.lerp(t[right - 1], t[right], share)
        u[0], u[-1] = 1, 0
    return u.float()
