"""The sampling loop: N denoiser evaluations from pure noise to an estimate of z_0."""
# N rows, T target length, D latent

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial

import torch
from torch import Tensor

from fastdiss_cli.diffusion.schedule import NoiseSchedule, time_grid
from fastdiss_cli.diffusion.solvers import SOLVERS

SELF_COND_MODES = ("reuse", "none", "recompute", "gold")


class Sampled(ABC):
    """What is sampled: N rows that are denoised together.

    Attributes:
        gold: the true embeddings of all rows, float [N, T, D], for a diagnosis.
    """

    gold: Tensor | None = None

    @abstractmethod
    def noise(self, draw: int) -> Tensor:
        """Return the k-th standard normal draw, float [N, T, D].

        Draw 0 is the start. Each is requested at most once; at temperature 0, only draw 0 is.
        """

    @abstractmethod
    def denoise(self, z: Tensor, t: Tensor, self_cond: Tensor) -> Tensor:
        """Return z0_hat from z and self_cond, float [N, T, D] all, at time t (0-d)."""

    def to_self_cond(self, z0_hat: Tensor) -> Tensor:
        """Return the ``self_cond`` of the next evaluation that an estimate becomes."""
        return z0_hat

    def clamp(self, z0_hat: Tensor, self_cond: Tensor) -> Tensor:
        """Return what the solver takes for z_0, from an estimate and what it became."""
        return self_cond

    def watch(self, rows: Tensor, t: Tensor, z: Tensor, z0_hat: Tensor) -> None:  # noqa: B027
        """Take note of a step; ``rows``: those still sampled, int64 indices into the first N."""

    def drop(self) -> Tensor | None:
        """Return the rows that go on, int64 indices into N, or None: all; called between steps.

        From then on N is their number.
        """
        return None


def sample(
    batch: Sampled,
    schedule: NoiseSchedule,
    steps: int,
    solver: str,
    grid: str,
    self_cond: str,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Sample with exactly ``steps`` steps.

    Args:
        batch: the rows, and what the network makes of them.
        schedule: the one that the network was trained with.
        steps: at least 1.
        solver: a key of `SOLVERS`.
        grid: one of `TIME_GRIDS`.
        self_cond: the estimate that the network is conditioned on. ``reuse``: that of the previous
            step, zeros in the first; ``none``: zeros; ``recompute``: one of the current step, from
            a second evaluation; ``gold``: the true embeddings.
        temperature: scale of the noise that the solver adds in a step; 1 is the formula's own.
            With ddpm the first step discards the noise of the start, so that from then on z has
            ``temperature`` times the noise of the schedule.

    Returns:
        The last z0_hat of each row, float [N, T, D], and its number of denoiser evaluations [N].
    """
    z = batch.noise(0)
    device = z.device
    solver_times = time_grid(steps, grid, schedule)  # on the CPU: its levels cost no launches
    # filled, not copied: a copy would wait for the device, and cannot be captured as a graph
    times = [torch.full((), t, device=device) for t in solver_times.tolist()]
    z = z * schedule.sigma(solver_times[0])
    move = SOLVERS[solver](schedule)
    answer, nfe = torch.zeros_like(z), torch.zeros(len(z), dtype=torch.long, device=device)
    rows = torch.arange(len(z), device=device)
    earlier = torch.zeros_like(z)
    evaluations = 2 if self_cond == "recompute" else 1  # in a step

    def added(draw: int) -> Tensor:
        return temperature * batch.noise(draw) if temperature else torch.zeros_like(z)

    for k in range(steps):
        given = earlier
        if self_cond == "recompute":
            given = batch.to_self_cond(batch.denoise(z, times[k], torch.zeros_like(z)))
        elif self_cond == "gold":
            assert batch.gold is not None
            given = batch.gold[rows]
        z0_hat = batch.denoise(z, times[k], given)
        answer[rows] = z0_hat
        nfe.index_fill_(0, rows, (k + 1) * evaluations)
        batch.watch(rows, times[k], z, z0_hat)
        if k + 1 == steps:
            break
        estimate = batch.to_self_cond(z0_hat)
        kept = batch.drop()
        if kept is not None:
            rows, z, z0_hat, estimate = rows[kept], z[kept], z0_hat[kept], estimate[kept]
            move.select(kept)
            if not len(rows):
                break
        earlier = estimate if self_cond == "reuse" else torch.zeros_like(z)
        clean = batch.clamp(z0_hat, estimate)
        z = move(z, clean, solver_times[k], solver_times[k + 1], partial(added, k + 1))
    return answer, nfe
