"""Noise schedules: how much signal and how much noise at time t.

``z_t = alpha(t) z_0 + sigma(t) noise`` with ``alpha = sqrt(abar)`` and
``sigma = F sqrt(1 - abar)``. The noise factor ``F`` is part of the schedule, which training and
sampling share. To add a schedule, add its ``abar`` to `ABAR`: a decreasing function of t alone with
``abar(0) = 1`` and ``abar(1) = 0`` exactly, because sampling starts from pure noise.
"""
# B batch, T target length, D latent

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache, wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from fastdiss_cli.errors import FastdissError

L = TypeVar("L", bound=Callable[..., Any])

ABAR: dict[str, Callable[[Tensor], Tensor]] = {
    "sqrt": lambda t: 1 - torch.sqrt(t),  # Li et al. 2022, Diffusion-LM, without its offset
    "linear": lambda t: 1 - t,
    "cosine": lambda t: torch.sin(0.5 * math.pi * (1 - t)) ** 2,  # Nichol & Dhariwal 2021, s = 0
}


def _remembered(levels: L) -> L:
    """Remember the levels at single times on the CPU, which sampling asks for in every batch."""

    @lru_cache(maxsize=4096)
    @torch.inference_mode(False)  # or they could never be used with a gradient
    @torch.no_grad()
    def at(schedule: NoiseSchedule, abar: object, dtype: torch.dtype, *times: float) -> Any:
        return levels(schedule, *(torch.tensor(t, dtype=dtype, device="cpu") for t in times))

    @wraps(levels)
    def remembered(schedule: NoiseSchedule, *times: Tensor) -> Any:
        if any(t.dim() or t.device.type != "cpu" for t in times):
            return levels(schedule, *times)
        found = at(schedule, ABAR[schedule.name], times[0].dtype, *(t.item() for t in times))
        # copies, for callers that compute in place
        return found.clone() if isinstance(found, Tensor) else tuple(x.clone() for x in found)

    return cast(L, remembered)


@dataclass(frozen=True)
class NoiseSchedule:
    """Map times in [0, 1] to signal and noise levels.

    Args:
        name: a key of `ABAR`.
        factor: F, the standard deviation of the noise at t = 1.
    """

    name: str
    factor: float

    def __post_init__(self) -> None:
        abar = ABAR[self.name](torch.linspace(0, 1, 101, dtype=torch.float64))
        start, end = float(abar[0]), float(abar[-1])
        flat = torch.nonzero(~(abar.diff() < 0)).flatten().tolist()
        if not (abs(start - 1) < 1e-6 and abs(end) < 1e-6) or flat:
            found = f"does not fall after t = {flat[0] / 100:g}" if flat else ""
            raise FastdissError(
                f"noise schedule {self.name!r}: abar must fall from 1 at t = 0 to 0 at t = 1; here "
                f"it {found or f'goes from {start:g} to {end:g}'}"
            )

    # in float64: near t = 0, 1 - abar is too small for float32

    @_remembered
    def alpha(self, t: Tensor) -> Tensor:
        """Return the signal level, in [0, 1], of the shape of t."""
        return torch.sqrt(ABAR[self.name](t.double())).to(t.dtype)

    @_remembered
    def sigma(self, t: Tensor) -> Tensor:
        """Return the standard deviation of the noise, in [0, F], of the shape of t."""
        return (self.factor * torch.sqrt(1 - ABAR[self.name](t.double()))).to(t.dtype)

    @_remembered
    def scale(self, t: Tensor) -> Tensor:
        """Return the standard deviation of a coordinate of z_t where z_0 has unit variance."""
        return torch.sqrt(self.alpha(t) ** 2 + self.sigma(t) ** 2)

    def unit(self, z_t: Tensor, t: Tensor) -> Tensor:
        """Return z_t, float [B, T, D], scaled to unit variance; t as in `add_noise`."""
        return z_t / _column(self.scale(t), z_t)

    def as_at(self, other: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """Return z_t, float [B, T, D], with the variance that it would have at another time.

        Its norm then gives away nothing about t. Times as in `add_noise`.
        """
        return z_t * _column(self.scale(other) / self.scale(t), z_t)

    def add_noise(self, z_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return z_t, float [B, T, D], for times [], [B], [B, 1] or [B, T]."""
        return _column(self.alpha(t), z_0) * z_0 + _column(self.sigma(t), z_0) * noise

    def add_more_noise(self, z_t: Tensor, t: Tensor, later: Tensor, noise: Tensor) -> Tensor:
        """Noise z_t further to a later time: the Markov coupling of the ancestral sampler.

        ``z_t' = a z_t + sqrt(sigma'^2 - a^2 sigma^2) noise`` with ``a = alpha'/alpha``, so that
        z_t' is distributed as if z_0 had been noised to t' directly.

        Args:
            z_t: float [B, T, D] at time ``t``.
            t, later: times as in `add_noise`; ``later >= t``. At ``t = 1`` there is no signal to
                carry over, and z_t itself is returned.
            noise: standard normal, float [B, T, D], independent of the noise in z_t.
        """
        a, variance = self.transition(t, later)
        return _column(a, z_t) * z_t + _column(torch.sqrt(variance), z_t) * noise

    @_remembered
    def transition(self, t: Tensor, later: Tensor) -> tuple[Tensor, Tensor]:
        """Return a = alpha'/alpha and the variance sigma'^2 - a^2 sigma^2 between two times.

        Times and results have any one shape.
        """
        dtype, t, later = t.dtype, t.double(), later.double()
        alpha = self.alpha(t)
        a = torch.where(alpha > 0, self.alpha(later) / alpha.clamp_min(1e-30), 1.0)
        variance = self.sigma(later) ** 2 - a**2 * self.sigma(t) ** 2
        return a.to(dtype), variance.clamp_min(0).to(dtype)


def _column(level: Tensor, like: Tensor) -> Tensor:
    """Append axes to a level of shape [], [B], [B, 1] or [B, T] until it fits [B, T, D]."""
    return level.reshape(level.shape + (1,) * (like.dim() - level.dim()))


TIME_GRIDS = ("uniform", "quadratic", "log-snr")
_END = 1e-3  # the log-SNR grid is cut there: the logarithm is infinite at t = 0 and t = 1


def time_grid(steps: int, kind: str, schedule: NoiseSchedule) -> Tensor:
    """Return the N + 1 times 1 = tau_0 > ... > tau_N = 0 of an N-step run, float [N + 1].

    Args:
        steps: N, at least 1.
        kind: ``uniform`` in t; ``quadratic``: uniform in sqrt(t), more steps at low noise;
            ``log-snr``: uniform in log(alpha/sigma), from t = 0.999 to 0.001.
        schedule: the noise levels.
    """
    grid = grid_time(torch.linspace(1, 0, steps + 1), kind, schedule)
    grid[0], grid[-1] = 1, 0
    return grid


def grid_time(u: Tensor, kind: str, schedule: NoiseSchedule) -> Tensor:
    """Return the time at a position u in [0, 1] of a grid (0: its end, 1: its start)."""
    if kind == "quadratic":
        return u**2
    if kind == "log-snr":
        times, positions = _log_snr_table(schedule, u.device)
        return _interpolate(u, positions, times)
    return u


def grid_position(t: Tensor, kind: str, schedule: NoiseSchedule) -> Tensor:
    """Return the position of a time: the inverse of `grid_time`."""
    if kind == "quadratic":
        return torch.sqrt(t)
    if kind == "log-snr":
        return _interpolate(t, *_log_snr_table(schedule, t.device))
    return t


@cache
def _log_snr_table(schedule: NoiseSchedule, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return times between the cuts and their positions on the log-SNR grid, both rising."""
    t = torch.linspace(_END, 1 - _END, 10_000, dtype=torch.float64)
    log_snr = torch.log(schedule.alpha(t) / schedule.sigma(t))
    positions = (log_snr - log_snr[0]) / (log_snr[-1] - log_snr[0])
    return t.to(device), positions.to(device)


def _interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Interpolate linearly between the points of a table; beyond its ends, return those."""
    right = torch.searchsorted(xs, x.double()).clamp(1, len(xs) - 1)
    left = right - 1
    share = ((x - xs[left]) / (xs[right] - xs[left])).clamp(0, 1)
    return torch.lerp(ys[left], ys[right], share).to(x.dtype)
