"""SCP and MANS: times, couplings, the inputs of the network, and the number of passes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastdiss_cli.diffusion.objective import (
    MANS,
    SCP,
    SCP_OFFSETS,
    draw_times,
    perturbed_self_conditioning,
    standard_self_conditioning,
)
from fastdiss_cli.diffusion.schedule import TIME_GRIDS, NoiseSchedule, time_grid

SCHEDULE = NoiseSchedule("sqrt", factor=4.0)
B, T, D = 6, 3, 4
OFF = MANS(0.0, "distance", (0.1, 1.0), 0, False, "token")


class Recorder:
    """A denoiser that records its inputs and returns a constant."""

    def __init__(self, answer: float = 7.0) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []
        self.answer = answer

    def __call__(self, z_t: Tensor, t: Tensor, self_cond: Tensor) -> Tensor:
        self.calls.append((z_t, t, self_cond))
        return torch.full_like(z_t, self.answer)


def scp(**changes: object) -> SCP:
    return SCP(
        **{
            "offset": "fixed",
            "grid": "uniform",
            "coupling": "markov",
            "rate": 1.0,
            "gap": 0.2,
            "step_counts": (2, 5),
            "unroll": 0.0,
            **changes,
        }
    )


def as_it_is(z0_hat: Tensor) -> Tensor:
    return z0_hat


def condition(
    denoise: Callable,
    t: Tensor,
    perturbation: SCP,
    mans: MANS = OFF,
    confidence: Tensor | None = None,
    update: int = 10,
):
    torch.manual_seed(0)
    z_0, noise = torch.randn(B, T, D), torch.randn(B, T, D)
    given = perturbed_self_conditioning(
        denoise, as_it_is, lambda _: confidence, SCHEDULE, perturbation, mans, z_0, noise,
        t[:, None], update,
    )  # fmt: skip
    return given, z_0, noise


def test_times_cover_the_unit_interval_evenly() -> None:
    torch.manual_seed(0)
    t = draw_times(1000, torch.device("cpu"))
    assert t.shape == (1000, 1)
    t = t.flatten()
    # one draw in each of the thousand bins, in random order
    assert torch.equal(t.sort().values.mul(1000).floor(), torch.arange(1000.0))
    assert not torch.equal(t, t.sort().values)


def test_standard_self_conditioning_estimates_at_the_same_noise() -> None:
    z_t, t = torch.randn(B, T, D), torch.rand(B, T)
    denoise = Recorder()
    given = standard_self_conditioning(denoise, as_it_is, z_t, t, rate=1.0)
    (seen,) = denoise.calls
    assert torch.equal(seen[0], z_t) and torch.equal(seen[1], t) and not seen[2].any()
    assert (given.self_cond == 7).all() and torch.equal(given.t, t)


def test_rates_are_shares_of_batches() -> None:
    torch.manual_seed(0)
    z_t, t = torch.randn(B, T, D), torch.rand(B, T)
    conditioned = [
        standard_self_conditioning(Recorder(), as_it_is, z_t, t, rate=0.25).self_cond.any().item()
        for _ in range(400)
    ]
    assert sum(conditioned) / 400 == pytest.approx(0.25, abs=0.06)
    torch.manual_seed(0)
    denoise = Recorder()
    for _ in range(400):
        perturbed_self_conditioning(
            denoise, as_it_is, lambda _: None, SCHEDULE, scp(rate=0.25), OFF,
            z_t, z_t, torch.full((B, 1), 0.5), 1,
        )  # fmt: skip
    assert len(denoise.calls) / 400 == pytest.approx(0.25, abs=0.06)


def test_step_matched_times_are_those_of_the_step_before() -> None:
    torch.manual_seed(0)
    t = torch.full((2000,), 0.3)
    gaps = scp(offset="step-matched").stale_time(t, SCHEDULE) - t
    assert set(gaps.mul(1000).round().tolist()) == {500.0, 200.0}  # 1/2 and 1/5
    assert (gaps < 0.3).float().mean().item() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("grid", TIME_GRIDS)
def test_step_matched_times_are_on_the_grid_of_sampling(grid: str) -> None:
    """From a time of a 5-step run, with K = 5, the stale time is the one before it."""
    times = time_grid(5, grid, SCHEDULE)
    stale = scp(offset="step-matched", step_counts=(5,), grid=grid).stale_time(times, SCHEDULE)
    assert stale[0] > 1  # before the first step there is no estimate
    torch.testing.assert_close(stale[2:5], times[1:4], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("grid", TIME_GRIDS)
@pytest.mark.parametrize("offset", SCP_OFFSETS)
def test_drawing_a_stale_time_reads_no_value(grid: str, offset: str) -> None:
    """On a GPU the host would wait for it; the device meta has no values to read."""
    perturbation = scp(offset=offset, grid=grid)
    t = torch.zeros(3, 1, device="meta")
    assert perturbation.stale_time(t, SCHEDULE).device.type == "meta"


def test_uniform_times_lie_between_t_and_one() -> None:
    torch.manual_seed(0)
    t = torch.full((20_000,), 0.4)
    stale = scp(offset="uniform").stale_time(t, SCHEDULE)
    assert stale.min() >= 0.4 and stale.max() <= 1
    assert stale.mean().item() == pytest.approx(0.7, abs=0.01)


def test_first_pass_runs_at_the_stale_time() -> None:
    denoise = Recorder()
    t = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    given, *_ = condition(denoise, t, scp())
    (seen,) = denoise.calls
    torch.testing.assert_close(seen[1], (t + 0.2)[:, None])
    assert (given.self_cond == 7).all()
    torch.testing.assert_close(given.t, t[:, None])


def test_beyond_time_one_the_network_gets_no_estimate() -> None:
    t = torch.tensor([0.1, 0.79, 0.81, 0.9, 0.99, 0.5])
    given, *_ = condition(Recorder(), t, scp())
    assert given.self_cond[:, 0, 0].tolist() == [7, 7, 0, 0, 0, 7]


def test_couplings() -> None:
    t = torch.full((B,), 0.3)
    later = torch.full((B, T), 0.5)
    inputs = {}
    for coupling in ("markov", "shared", "independent"):
        denoise = Recorder()
        _, z_0, noise = condition(denoise, t, scp(coupling=coupling))
        inputs[coupling] = denoise.calls[0][0]
    torch.testing.assert_close(inputs["shared"], SCHEDULE.add_noise(z_0, later, noise))

    # given z_0, only the Markov coupling and the shared noise keep the noise that z_t has
    def kept(z: Tensor) -> float:
        residue = z - SCHEDULE.add_noise(z_0, later, torch.zeros_like(noise))
        return torch.corrcoef(torch.stack([residue.flatten(), noise.flatten()]))[0, 1].item()

    assert kept(inputs["markov"]) > 0.3
    assert abs(kept(inputs["independent"])) < 0.3


def test_mans_gives_easy_tokens_more_noise() -> None:
    """t_i = t + lambda r (1 - t), r linear between the anchors, per token."""
    mans = MANS(0.5, "distance", (0.2, 1.0), 0, False, "token")
    confidence = torch.tensor([0.0, 0.2, 0.6, 1.0, 1.7, 0.4])[:, None].expand(B, T)
    t = torch.full((B,), 0.4)
    denoise = Recorder()
    given, z_0, noise = condition(denoise, t, scp(), mans, confidence)
    ease = torch.tensor([1.0, 1.0, 0.5, 0.0, 0.0, 0.75])
    expected = 0.4 + 0.5 * ease * 0.6
    torch.testing.assert_close(given.t, expected[:, None].expand(B, T))
    first, second = denoise.calls  # MANS measures at t, SCP estimates at t' > t_i
    torch.testing.assert_close(first[0], SCHEDULE.add_noise(z_0, t, noise))
    torch.testing.assert_close(second[1], (expected + 0.2).clamp(max=1)[:, None].expand(B, T))


def test_uniform_stale_times_stay_uniform_above_the_time_of_the_token() -> None:
    """A token that MANS moved to t_i keeps its share of the rest: t' does not pile up at 1."""
    t, stale = torch.tensor([0.2]), torch.tensor([0.6])  # half of the way from t to 1
    token_t = torch.tensor([[0.2, 0.6, 0.9]])
    later = scp(offset="uniform").token_stale_times(token_t, t, stale)
    torch.testing.assert_close(later, torch.tensor([[0.6, 0.8, 0.95]]))


@pytest.mark.parametrize("shared", [False, True])
def test_the_network_gets_the_time_of_the_sentence(shared: bool) -> None:
    """In both passes it sees the noise that MANS adds, but neither the times t_i nor their norm."""
    mans = MANS(0.5, "distance", (0.2, 1.0), 0, shared, "sentence")
    denoise, t = Recorder(), torch.full((B,), 0.4)
    given, z_0, noise = condition(denoise, t, scp(unroll=0.0), mans, torch.zeros(B, T))
    assert (given.t > 0.4).all()
    assert torch.equal(given.network_t, t[:, None])
    torch.testing.assert_close(denoise.calls[-1][1], torch.full((B, 1), 0.6))
    noised = SCHEDULE.add_noise(z_0, given.t, noise)
    torch.testing.assert_close(
        SCHEDULE.unit(given.z_t(SCHEDULE, z_0, noise), given.network_t),
        SCHEDULE.unit(noised, given.t),
    )
    by_token = MANS(0.5, "distance", (0.2, 1.0), 0, shared, "token")
    given, *_ = condition(Recorder(), t, scp(), by_token, torch.zeros(B, T))
    assert torch.equal(given.network_t, given.t)


@pytest.mark.parametrize("shared", [False, True])
def test_the_norm_of_what_the_network_is_given_says_nothing_of_the_tokens(shared: bool) -> None:
    """Half of the tokens are easy; in both passes all have unit variance at the time it is told."""
    mans = MANS(1.0, "distance", (0.2, 1.0), 0, shared, "sentence")
    z_0, noise = torch.randn(2, 2, 64, 512, generator=torch.Generator().manual_seed(1))
    easy = torch.arange(64).expand(2, -1) % 2
    denoise, t = Recorder(), torch.full((2, 1), 0.05)
    given = perturbed_self_conditioning(
        denoise, as_it_is, lambda _: 1.0 - easy, SCHEDULE, scp(gap=0.5), mans, z_0, noise, t, 1
    )
    assert (given.t > 0.1).sum() == easy.sum()
    final = given.z_t(SCHEDULE, z_0, noise), given.network_t
    for z, told in (final, denoise.calls[-1][:2]):
        deviations = SCHEDULE.unit(z, told).std(-1)
        torch.testing.assert_close(deviations, torch.ones(2, 64), rtol=0, atol=0.15)


def test_mans_by_probability_has_its_anchors_the_other_way_round() -> None:
    mans = MANS(0.5, "probability", (0.9, 0.1), 0, False, "token")
    assert mans.ease(torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])).tolist() == pytest.approx(
        [0, 0, 0.5, 1, 1]
    )


def test_mans_starts_at_its_update() -> None:
    mans = MANS(0.5, "distance", (0.2, 1.0), 100, False, "token")
    easy = torch.zeros(B, T)
    t = torch.full((B,), 0.4)
    before, *_ = condition(Recorder(), t, scp(), mans, easy, update=99)
    after, *_ = condition(Recorder(), t, scp(), mans, easy, update=100)
    assert (before.t == 0.4).all() and (after.t > 0.4).all()


def test_shared_pass_saves_a_pass_and_stays_below_the_stale_time() -> None:
    mans = MANS(1.0, "distance", (0.2, 1.0), 0, True, "token")
    denoise = Recorder()
    t = torch.full((B,), 0.4)
    given, *_ = condition(denoise, t, scp(), mans, torch.zeros(B, T))
    assert len(denoise.calls) == 1
    torch.testing.assert_close(given.t, torch.full((B, T), 0.6))  # not 1.0: t' is 0.6


def test_passes_without_scp() -> None:
    """Rate 0 leaves MANS alone: one pass for the confidence, and zeros for the network."""
    mans = MANS(0.5, "distance", (0.2, 1.0), 0, False, "token")
    denoise = Recorder()
    given, *_ = condition(denoise, torch.full((B,), 0.4), scp(rate=0.0), mans, torch.zeros(B, T))
    assert len(denoise.calls) == 1
    assert not given.self_cond.any() and (given.t > 0.4).all()


def test_without_an_offset_scp_is_standard_self_conditioning() -> None:
    denoise, t = Recorder(), torch.rand(B)
    given, z_0, noise = condition(denoise, t, scp(offset="none"))
    (seen,) = denoise.calls
    torch.testing.assert_close(seen[0], SCHEDULE.add_noise(z_0, given.t, noise))
    assert torch.equal(seen[1], given.t) and (given.self_cond == 7).all()


def test_an_unrolled_input_is_a_step_of_sampling_from_the_estimate() -> None:
    """It is distributed like z_t if the estimate is z_0, and shifted by its error otherwise."""
    t, n = torch.full((40_000,), 0.2), 40_000
    z_0 = torch.full((n, 1, 1), 1.5)

    def unrolled(z0_hat: float) -> Tensor:
        torch.manual_seed(0)
        noise = torch.randn_like(z_0)
        given = perturbed_self_conditioning(
            Recorder(z0_hat), as_it_is, lambda _: None, SCHEDULE, scp(gap=0.4, unroll=1.0), OFF,
            z_0, noise, t[:, None], 1,
        )  # fmt: skip
        return given.z_t(SCHEDULE, z_0, noise)

    right, (alpha, sigma) = unrolled(1.5), (SCHEDULE.alpha(t[0]), SCHEDULE.sigma(t[0]))
    assert right.mean().item() == pytest.approx(1.5 * alpha.item(), abs=0.05)
    assert right.std().item() == pytest.approx(sigma.item(), rel=0.02)
    later = t[0] + 0.4
    weight = alpha * SCHEDULE.transition(t[0], later)[1] / SCHEDULE.sigma(later) ** 2
    moved = right - unrolled(-0.5)
    torch.testing.assert_close(moved, (2 * weight).expand_as(moved), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mans_time", ["sentence", "token"])
def test_an_unrolled_step_takes_what_sampling_would(mans_time: str) -> None:
    """From z_t' to each token's own time, with the estimate in the form that the network gets.

    Two estimates, 1 and 0, with the same draws reveal the weight of z0_hat in a step:
    alpha_s sigma_{t|s}^2 / sigma_t^2, at the noise levels that the tokens really have.
    """
    mans = MANS(0.5, "distance", (0.2, 1.0), 0, False, mans_time)
    t, confidence = torch.full((B,), 0.4), torch.linspace(0, 1.2, B)[:, None].expand(B, T)

    def unrolled(z0_hat: float) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        z_0, noise = torch.randn(B, T, D), torch.randn(B, T, D)
        given = perturbed_self_conditioning(
            Recorder(z0_hat), lambda z: 3 * z, lambda _: confidence, SCHEDULE,
            scp(unroll=1.0, gap=0.1), mans, z_0, noise, t[:, None], 1,
        )  # fmt: skip
        return given.z_t(SCHEDULE, z_0, noise), given.t

    (one, times), (zero, same) = unrolled(1.0), unrolled(0.0)
    assert torch.equal(times, same) and len(times.unique()) > 3
    _, between = SCHEDULE.transition(times, times + 0.1)
    weight = SCHEDULE.alpha(times) * between / SCHEDULE.sigma(times + 0.1) ** 2
    if mans_time == "sentence":  # the network is given z_t with the variance of t
        weight = weight * SCHEDULE.scale(t)[:, None] / SCHEDULE.scale(times)
    wanted = (3 * weight)[..., None].expand(B, T, D)
    torch.testing.assert_close(one - zero, wanted, rtol=1e-3, atol=1e-4)


def test_without_an_offset_nothing_is_unrolled() -> None:
    given, z_0, noise = condition(Recorder(), torch.rand(B), scp(offset="none", unroll=1.0))
    noised = SCHEDULE.add_noise(z_0, given.t, noise)
    assert given.unrolled is None and torch.equal(given.z_t(SCHEDULE, z_0, noise), noised)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_the_sentences_is_unrolled(share: float) -> None:
    torch.manual_seed(0)
    n = 2000
    t = torch.linspace(0, 0.9, n)  # above 0.8, t' > 1: the first step of sampling
    z_0, noise = torch.randn(n, T, D), torch.randn(n, T, D)
    given = perturbed_self_conditioning(
        Recorder(), as_it_is, lambda _: None, SCHEDULE, scp(unroll=share), OFF, z_0, noise,
        t[:, None], 1,
    )  # fmt: skip
    noised = SCHEDULE.add_noise(z_0, t, noise)
    same = (given.z_t(SCHEDULE, z_0, noise) == noised).all(-1).all(-1)
    assert same[t > 0.8].all()
    assert 1 - same[t < 0.8].double().mean().item() == pytest.approx(share, abs=0.04)


def test_the_network_gets_its_estimate_in_the_requested_form() -> None:
    z, t = torch.randn(B, T, D), torch.full((B, 1), 0.1)
    given = perturbed_self_conditioning(
        Recorder(), lambda z0_hat: -z0_hat, lambda _: None, SCHEDULE,
        scp(offset="fixed", gap=0.2), OFF, z, z, t, 1,
    )  # fmt: skip
    assert (given.self_cond == -7).all()


def test_a_time_that_rounds_up_is_below_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """At t = 1 exactly, an offset that is uniform on the rest would be 0/0."""
    nearly = torch.tensor(1 - 2**-24)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: nearly)
    t = draw_times(512, torch.device("cpu"))
    assert t.max() < 1
    stale = scp(offset="uniform").token_stale_times(t, t, t + (1 - t) / 2)
    assert stale.isfinite().all()
