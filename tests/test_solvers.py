"""Solvers against closed forms where the data are Gaussian: z_0 ~ N(mu, v) for each coordinate.

The best denoiser is then E[z_0 | z_t] = mu + gain (z_t - alpha mu), with
gain = alpha v / (alpha^2 v + sigma^2), and z_t itself is N(alpha mu, alpha^2 v + sigma^2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiss_cli.diffusion.sampler import SELF_COND_MODES, Sampled, sample
from fastdiss_cli.diffusion.schedule import TIME_GRIDS, NoiseSchedule, time_grid
from fastdiss_cli.diffusion.solvers import SOLVERS

MU, V = 0.7, 0.3
SCHEDULE = NoiseSchedule("cosine", factor=2.0)


@dataclass
class Rows(Sampled):
    """What two functions make of it; see `Sampled`."""

    denoise: Callable[[Tensor, Tensor, Tensor], Tensor] = None
    noise: Callable[[int], Tensor] = None
    gold: Tensor | None = None


def best_denoiser(z: Tensor, t: Tensor) -> Tensor:
    alpha, sigma = SCHEDULE.alpha(t), SCHEDULE.sigma(t)
    gain = alpha * V / (alpha**2 * V + sigma**2)
    return MU + gain * (z - alpha * MU)


def marginal(t: float) -> tuple[float, float]:
    """Mean and standard deviation of z_t."""
    time = torch.tensor(t, dtype=torch.float64)
    alpha, sigma = SCHEDULE.alpha(time).item(), SCHEDULE.sigma(time).item()
    return alpha * MU, math.sqrt(alpha**2 * V + sigma**2)


def solve(solver: str, steps: int, start: Tensor, until: int | None = None) -> Tensor:
    """Run the first ``until`` steps (all but the last by default) from ``start`` at t = 1."""
    move = SOLVERS[solver](SCHEDULE)
    times = time_grid(steps, "uniform", SCHEDULE).to(start.dtype)
    z = start
    for k in range(steps - 1 if until is None else until):
        estimate = best_denoiser(z, times[k])
        z = move(z, estimate, times[k], times[k + 1], lambda: torch.randn_like(start))
    return z


@pytest.mark.parametrize("solver", ["ddim", "dpm-solver++"])
def test_deterministic_solvers_follow_the_flow(solver: str) -> None:
    """The probability-flow ODE maps z_1 to the z_t of the same quantile, for a Gaussian exactly."""
    start = 2.0 * torch.linspace(-2, 2, 9, dtype=torch.float64)
    z = solve(solver, 400, start, until=200)
    mean, std = marginal(0.5)
    torch.testing.assert_close(z, mean + std * start / 2.0, rtol=0.01, atol=0.01)


def test_second_order_beats_first_order() -> None:
    start = 2.0 * torch.linspace(-2, 2, 9, dtype=torch.float64)
    mean, std = marginal(0.5)
    exact = mean + std * start / 2.0
    errors = {
        solver: [(solve(solver, n, start, n // 2) - exact).abs().max().item() for n in (40, 80)]
        for solver in ("ddim", "dpm-solver++")
    }
    assert errors["dpm-solver++"][1] < 0.2 * errors["ddim"][1]
    # halving the step halves the error of first order, and quarters that of second order
    assert errors["ddim"][0] / errors["ddim"][1] == pytest.approx(2, rel=0.15)
    assert errors["dpm-solver++"][0] / errors["dpm-solver++"][1] > 3


def test_ancestral_sampling_reaches_the_marginal() -> None:
    torch.manual_seed(0)
    z = solve("ddpm", 400, 2.0 * torch.randn(300_000, dtype=torch.float64), until=200)
    mean, std = marginal(0.5)
    assert z.mean().item() == pytest.approx(mean, abs=0.012)  # standard error 0.003
    assert z.std().item() == pytest.approx(std, rel=0.01)


def test_one_ancestral_step_is_the_gaussian_posterior() -> None:
    """With z_0 known, q(z_s | z_t, z_0) has the mean and variance of Ho et al. 2020, eq. 7."""
    torch.manual_seed(0)
    t, s = torch.tensor(0.8, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    z_t, z_0 = torch.full((200_000,), 1.3, dtype=torch.float64), torch.tensor(0.9)
    z_s = SOLVERS["ddpm"](SCHEDULE)(z_t, z_0, t, s, lambda: torch.randn_like(z_t))
    alpha_t, alpha_s = SCHEDULE.alpha(t), SCHEDULE.alpha(s)
    var_t, var_s = SCHEDULE.sigma(t) ** 2, SCHEDULE.sigma(s) ** 2
    a = alpha_t / alpha_s
    between = var_t - a**2 * var_s
    mean = a * var_s / var_t * 1.3 + alpha_s * between / var_t * 0.9
    assert z_s.mean().item() == pytest.approx(mean.item(), abs=0.01)
    assert z_s.var().item() == pytest.approx((between * var_s / var_t).item(), rel=0.01)


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_first_step_from_pure_noise_is_finite(solver: str) -> None:
    z = solve(solver, 5, torch.randn(7, dtype=torch.float64), until=4)
    assert z.isfinite().all()


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("grid", TIME_GRIDS)
def test_many_steps_are_finite(solver: str, grid: str) -> None:
    """In float32, noise levels of neighbouring times hardly differ, and are 0 near t = 0."""
    schedule = NoiseSchedule("cosine", factor=4.0)  # with the least noise near t = 0
    noise = torch.randn(1, 1, 2)
    rows = Rows(lambda z, t, self_cond: 0.5 * schedule.unit(z, t), lambda k: noise)
    z0_hat, _ = sample(rows, schedule, 2000, solver, grid, "reuse", 1.0)
    assert z0_hat.isfinite().all() and 0 < z0_hat.abs().max() < 100


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("self_cond", SELF_COND_MODES)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_n_steps_are_n_evaluations(solver: str, self_cond: str, steps: int) -> None:
    seen: list[float] = []

    def denoise(z: Tensor, t: Tensor, self_cond: Tensor) -> Tensor:
        seen.append(t.item())
        return z * 0.1

    rows = Rows(denoise, lambda k: torch.randn(2, 3, 4), gold=torch.randn(2, 3, 4))
    _, nfe = sample(rows, SCHEDULE, steps, solver, "log-snr", self_cond, 1.0)
    passes = 2 if self_cond == "recompute" else 1
    assert nfe.tolist() == [passes * steps] * 2 and len(seen) == passes * steps
    assert seen[::passes] == pytest.approx(time_grid(steps, "log-snr", SCHEDULE)[:-1].tolist())


def test_what_each_self_conditioning_mode_gives_the_network() -> None:
    self_conds: list[Tensor] = []

    def denoise(z: Tensor, t: Tensor, given: Tensor) -> Tensor:
        self_conds.append(given)
        return torch.full_like(z, float(len(self_conds)))

    def run(mode: str) -> list[float]:
        self_conds.clear()
        rows = Rows(denoise, lambda k: torch.ones(1, 1, 1), gold=torch.full((1, 1, 1), 9.0))
        sample(rows, SCHEDULE, 3, "ddim", "log-snr", mode, 0.0)
        return [given.item() for given in self_conds]

    assert run("reuse") == [0, 1, 2]  # the estimate of the step before
    assert run("none") == [0, 0, 0]
    assert run("recompute") == [0, 1, 0, 3, 0, 5]  # an estimate at the same step
    assert run("gold") == [9, 9, 9]


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0])
def test_the_temperature_scales_the_noise_of_a_step_and_not_the_start(temperature: float) -> None:
    seen: list[Tensor] = []

    def denoise(z: Tensor, t: Tensor, self_cond: Tensor) -> Tensor:
        seen.append(z)
        return torch.full_like(z, 2.0)

    draws = [torch.full((1, 2, 3), 3.0), torch.full((1, 2, 3), 5.0)]
    rows = Rows(denoise, draws.__getitem__)
    sample(rows, SCHEDULE, 2, "ddpm", "uniform", "reuse", temperature)
    half, one = torch.tensor(0.5), torch.tensor(1.0)
    torch.testing.assert_close(seen[0], SCHEDULE.sigma(one) * 3.0 * torch.ones(1, 2, 3))
    # from pure noise z at s is a noised estimate: alpha_s x + sigma_s noise
    wanted = SCHEDULE.alpha(half) * 2.0 + SCHEDULE.sigma(half) * temperature * draws[1]
    torch.testing.assert_close(seen[1], wanted)


@pytest.mark.parametrize("clamped", [True, False])
def test_the_solver_gets_the_clamped_estimate_and_the_network_its_form(
    clamped: bool,
) -> None:
    """ddim from pure noise: z at s is alpha_s x + sigma_s noise, x being the solver's estimate."""
    start = torch.randn(1, 2, 3)
    seen: list[tuple[Tensor, Tensor]] = []

    def denoise(z: Tensor, t: Tensor, self_cond: Tensor) -> Tensor:
        seen.append((z, self_cond))
        return torch.full_like(z, 2.0)

    class Formed(Rows):
        def to_self_cond(self, z0_hat: Tensor) -> Tensor:
            return z0_hat + 1

        def clamp(self, z0_hat: Tensor, self_cond: Tensor) -> Tensor:
            return z0_hat * 5 if clamped else super().clamp(z0_hat, self_cond)

    sample(Formed(denoise, lambda _: start), SCHEDULE, 2, "ddim", "uniform", "reuse", 0.0)
    half = torch.tensor(0.5)
    taken = 10.0 if clamped else 3.0
    wanted = SCHEDULE.alpha(half) * taken + SCHEDULE.sigma(half) * start
    torch.testing.assert_close(seen[1][0], wanted)
    assert not seen[0][1].any() and (seen[1][1] == 3).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_levels_of_a_step_cost_the_device_nothing(solver: str) -> None:
    """The device meta stands in for a GPU, where each of some 80 numbers would be a launch."""

    class Numbers(TorchDispatchMode):
        seen: ClassVar[list[str]] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            made = func(*args, **kwargs or {})
            if isinstance(made, Tensor) and made.device.type == "meta" and not made.dim():
                self.seen.append(str(func))
            return made

    start = torch.zeros(2, 3, 4, device="meta")
    with Numbers() as numbers:
        rows = Rows(lambda z, t, self_cond: z + t, lambda draw: start)
        sample(rows, SCHEDULE, 4, solver, "log-snr", "reuse", 1.0)
    # the times that the network gets, one launch each
    assert numbers.seen == ["aten.full.default"] * 5
