"""Solvers: from z at time t and the estimate of z_0 to z at an earlier time s.

Each run makes its own solver, which may remember earlier estimates, and calls it once per step.
To add one, write its class and name it in `SOLVERS`.
"""
# N rows, T target length, D latent

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from fastdiss_cli.diffusion.schedule import NoiseSchedule


class Solver(ABC):
    """The contract of all solvers.

    Class attributes:
        adds_noise: whether a step draws noise.
    """

    adds_noise: ClassVar[bool]

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.schedule = schedule

    @abstractmethod
    def __call__(
        self, z: Tensor, z0_hat: Tensor, t: Tensor, s: Tensor, noise: Callable[[], Tensor]
    ) -> Tensor:
        """Return z at time s.

        Args:
            z: at time t, float [N, T, D].
            z0_hat: the estimate of z_0 from it, float [N, T, D].
            t, s: t >= s > 0; they broadcast with z. In sampling they are 0-d and on the CPU,
                wherever z is.
            noise: draws a standard normal, float [N, T, D]; in sampling, times the temperature.
        """

    def select(self, rows: Tensor) -> None:  # noqa: B027 - optional
        """Go on with some rows only; int64 indices into N."""


class Ancestral(Solver):
    """The Gaussian posterior q(z_s | z_t, z_0 = z0_hat), with its variance scaled by eta^2.

    Its mean ``(a s_s^2/s_t^2) z_t + (alpha_s s_{t|s}^2/s_t^2) z0_hat`` and variance
    ``s_{t|s}^2 s_s^2/s_t^2`` are the case eta = 1 (Ho et al. 2020, DDPM); eta = 0 keeps the
    direction of the noise (Song et al. 2021, DDIM, equation 12).
    """

    eta, adds_noise = 1.0, True

    def __call__(
        self, z: Tensor, z0_hat: Tensor, t: Tensor, s: Tensor, noise: Callable[[], Tensor]
    ) -> Tensor:
        alpha_t, alpha_s = self.schedule.alpha(t), self.schedule.alpha(s)
        sigma_t, sigma_s = self.schedule.sigma(t), self.schedule.sigma(s)
        _, between = self.schedule.transition(s, t)  # sigma_{t|s}^2
        variance = self.eta**2 * between * sigma_s**2 / sigma_t**2
        direction = (z - alpha_t * z0_hat) / sigma_t
        mean = alpha_s * z0_hat + torch.sqrt((sigma_s**2 - variance).clamp_min(0)) * direction
        return mean + torch.sqrt(variance) * noise() if self.adds_noise else mean


class Deterministic(Ancestral):
    eta, adds_noise = 0.0, False


class DPMSolverPP2M(Solver):
    """Second-order multistep DPM-Solver++ for the data prediction (Lu et al. 2022, algorithm 2).

    It steps in ``lambda = log(alpha/sigma)``. The step from t = 1, where lambda is -inf, has no
    earlier estimate and is of first order.
    """

    adds_noise = False

    def __init__(self, schedule: NoiseSchedule) -> None:
        super().__init__(schedule)
        self.earlier: tuple[Tensor, Tensor] | None = None  # (lambda, z0_hat) of the step before

    def __call__(
        self, z: Tensor, z0_hat: Tensor, t: Tensor, s: Tensor, noise: Callable[[], Tensor]
    ) -> Tensor:
        lambda_t, lambda_s = self._log_snr(t), self._log_snr(s)
        estimate = z0_hat
        if self.earlier is not None:
            lambda_before, z0_before = self.earlier
            # h_before is infinite after the step from t = 1, which makes this first order again
            half_ratio = 0.5 * (lambda_s - lambda_t) / (lambda_t - lambda_before)
            estimate = z0_hat + half_ratio * (z0_hat - z0_before)
        self.earlier = (lambda_t, z0_hat)
        sigma_ratio = self.schedule.sigma(s) / self.schedule.sigma(t)
        decay = self.schedule.alpha(t) / self.schedule.alpha(s) * sigma_ratio  # exp(-h)
        return sigma_ratio * z + self.schedule.alpha(s) * (1 - decay) * estimate

    def select(self, rows: Tensor) -> None:
        if self.earlier is not None:
            self.earlier = (self.earlier[0], self.earlier[1][rows])

    def _log_snr(self, t: Tensor) -> Tensor:
        return torch.log(self.schedule.alpha(t)) - torch.log(self.schedule.sigma(t))


SOLVERS: dict[str, type[Solver]] = {
    "ddpm": Ancestral,
    "ddim": Deterministic,
    "dpm-solver++": DPMSolverPP2M,
}
