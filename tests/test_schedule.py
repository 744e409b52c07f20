"""Noise schedules: their ends, and noising further against noising directly."""

from __future__ import annotations

import math

import pytest
import torch

from fastdiss_cli.diffusion.schedule import (
    ABAR,
    TIME_GRIDS,
    NoiseSchedule,
    grid_position,
    grid_time,
    time_grid,
)
from fastdiss_cli.errors import FastdissError

SCHEDULES = sorted(ABAR)


@pytest.mark.parametrize("name", SCHEDULES)
def test_starts_from_the_data_and_ends_in_pure_noise_exactly(name: str) -> None:
    schedule = NoiseSchedule(name, factor=3.0)
    zero, one = torch.tensor(0.0), torch.tensor(1.0)
    assert (schedule.alpha(zero), schedule.sigma(zero)) == (1, 0)
    assert (schedule.alpha(one), schedule.sigma(one)) == (0, 3)


def test_a_schedule_that_does_not_fall_from_1_to_0_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for wrong, here in (
        (lambda t: 1 - 0.9 * t, "here it goes from 1 to 0.1"),
        (lambda t: t, "here it does not fall after t = 0"),
        (lambda t: t + math.nan, "here it does not fall after t = 0"),
        (lambda t: (1 - t) + 0 / (t - 0.5), "here it does not fall after t = 0.49"),
        (lambda t: ((1 - t) / 0.95).clamp(max=1), "here it does not fall after t = 0"),
    ):
        monkeypatch.setitem(ABAR, "mine", wrong)
        with pytest.raises(FastdissError) as refused:
            NoiseSchedule("mine", 1.0)
        assert "'mine': abar must fall from 1 at t = 0 to 0 at t = 1" in str(refused.value)
        assert str(refused.value).endswith(here)
    monkeypatch.setitem(ABAR, "mine", lambda t: torch.cos(0.5 * torch.pi * t) ** 2)  # rounded
    NoiseSchedule("mine", 1.0)


def test_levels_at_single_times_are_those_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are remembered: for the same times, type, factor and function only."""

    def levels(schedule: NoiseSchedule, t: torch.Tensor, later: torch.Tensor):
        return (
            schedule.alpha(t),
            schedule.sigma(t),
            schedule.scale(t),
            *schedule.transition(t, later),
        )

    t = torch.tensor(0.3)
    for schedule in (NoiseSchedule("sqrt", 2.0), NoiseSchedule("sqrt", 3.0)):
        for dtype in (torch.float32, torch.float64):
            times = t.to(dtype), torch.tensor(0.7, dtype=dtype)
            many = levels(schedule, *(time[None] for time in times))
            for _ in range(2):
                with torch.inference_mode():
                    one = levels(schedule, *times)
                assert {level.dtype for level in one} == {dtype}
                assert [*map(float, one)] == [*map(float, many)]
    schedule.alpha(t).mul_(0)
    assert schedule.alpha(t) > 0
    (schedule.alpha(t) * torch.ones(2, requires_grad=True)).sum().backward()
    monkeypatch.setitem(ABAR, "sqrt", lambda t: 1 - t)
    assert schedule.alpha(t).item() == pytest.approx(0.7**0.5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_signal_falls_and_noise_rises(name: str) -> None:
    t = torch.linspace(0, 1, 101)
    schedule = NoiseSchedule(name, factor=2.0)
    assert (schedule.alpha(t).diff() < 0).all()
    assert (schedule.sigma(t).diff() > 0).all()


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("times", [(0.2, 0.5), (0.05, 1.0), (0.3, 0.3)])
def test_noising_further_has_the_mean_and_variance_of_noising_directly(
    name: str, times: tuple[float, float]
) -> None:
    """The Markov coupling: z_t' given z_0 is N(alpha' z_0, sigma'^2), whatever the path."""
    torch.manual_seed(0)
    schedule = NoiseSchedule(name, factor=4.0)
    t, later = (torch.full((1,), time) for time in times)
    z_0 = torch.full((1, 200_000, 1), 1.5)
    z_t = schedule.add_noise(z_0, t, torch.randn_like(z_0))
    z_later = schedule.add_more_noise(z_t, t, later, torch.randn_like(z_0))
    sigma = schedule.sigma(later).item()
    assert z_later.mean().item() == pytest.approx(1.5 * schedule.alpha(later).item(), abs=0.04)
    assert z_later.std().item() == pytest.approx(sigma, rel=0.01)


def test_noising_further_keeps_the_noise_that_is_there() -> None:
    """The correlation of z_t' with z_t is alpha'/alpha sigma/sigma': no fresh start."""
    torch.manual_seed(0)
    schedule = NoiseSchedule("sqrt", factor=4.0)
    t, later = torch.tensor([0.2]), torch.tensor([0.4])
    z_0 = torch.zeros(1, 200_000, 1)
    z_t = schedule.add_noise(z_0, t, torch.randn_like(z_0))
    z_later = schedule.add_more_noise(z_t, t, later, torch.randn_like(z_0))
    correlation = torch.corrcoef(torch.stack([z_t.flatten(), z_later.flatten()]))[0, 1]
    expected = schedule.alpha(later) / schedule.alpha(t) * schedule.sigma(t) / schedule.sigma(later)
    assert correlation.item() == pytest.approx(expected.item(), abs=0.01)


def test_times_may_differ_from_token_to_token() -> None:
    schedule = NoiseSchedule("sqrt", factor=2.0)
    z_0, noise = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    t = torch.rand(2, 3)
    z_t = schedule.add_noise(z_0, t, noise)
    one = schedule.add_noise(z_0[1:, 2:], t[1:, 2], noise[1:, 2:])
    torch.testing.assert_close(z_t[1:, 2:], one)


def test_noising_further_from_pure_noise_changes_nothing() -> None:
    schedule = NoiseSchedule("cosine", factor=2.0)
    z = torch.randn(1, 4, 5)
    one = torch.ones(1)
    torch.testing.assert_close(schedule.add_more_noise(z, one, one, torch.randn_like(z)), z)


def test_grid_of_n_steps_has_n_steps() -> None:
    schedule = NoiseSchedule("sqrt", factor=4.0)
    assert time_grid(1, "uniform", schedule).tolist() == [1, 0]
    assert time_grid(4, "uniform", schedule).tolist() == [1, 0.75, 0.5, 0.25, 0]


@pytest.mark.parametrize("name", sorted(ABAR))
@pytest.mark.parametrize("kind", TIME_GRIDS)
@pytest.mark.parametrize("steps", [1, 2, 5, 100])
def test_grids_fall_from_one_to_zero(name: str, kind: str, steps: int) -> None:
    grid = time_grid(steps, kind, NoiseSchedule(name, factor=4.0))
    assert len(grid) == steps + 1 and grid[0] == 1 and grid[-1] == 0
    assert (grid.diff() < 0).all()


def test_quadratic_grid_is_uniform_in_the_root() -> None:
    roots = time_grid(10, "quadratic", NoiseSchedule("sqrt", factor=4.0)).sqrt()
    torch.testing.assert_close(roots, torch.linspace(1, 0, 11))


@pytest.mark.parametrize("name", sorted(ABAR))
def test_log_snr_grid_is_uniform_in_log_snr(name: str) -> None:
    schedule = NoiseSchedule(name, factor=4.0)
    inner = time_grid(8, "log-snr", schedule)[1:-1].double()
    gaps = torch.log(schedule.alpha(inner) / schedule.sigma(inner)).diff()
    torch.testing.assert_close(gaps, gaps.mean().expand(6), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", sorted(ABAR))
@pytest.mark.parametrize("kind", TIME_GRIDS)
def test_positions_on_a_grid_are_the_inverse_of_its_times(name: str, kind: str) -> None:
    schedule = NoiseSchedule(name, factor=4.0)
    t = torch.linspace(0.01, 0.99, 50)
    torch.testing.assert_close(
        grid_time(grid_position(t, kind, schedule), kind, schedule), t, rtol=1e-3, atol=1e-5
    )
    u = grid_position(torch.tensor([0.0, 1.0]), kind, schedule)
    torch.testing.assert_close(u, torch.tensor([0.0, 1.0]))
