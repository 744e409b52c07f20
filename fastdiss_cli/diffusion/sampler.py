"""The sampling loop: N denoiser evaluations from pure noise to an estimate of z_0."""
# N rows, T target length, D latent

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastdiss_cli.diffusion import Denoise, Tell
from fastdiss_cli.diffusion.schedule import NoiseSchedule, time_grid
from fastdiss_cli.diffusion.solvers import SOLVERS

SELF_COND_MODES = ("reuse", "none", "recompute", "gold")


def sample(
    denoise: Denoise,
    schedule: NoiseSchedule,
    noise: Callable[[int], Tensor],
    steps: int,
    solver: str = "ddpm",
    self_cond: str = "reuse",
    gold: Tensor | None = None,
    grid: str = "log-snr",
    temperature: float = 1.0,
    tell: Tell = lambda z0_hat: z0_hat,
    clamp: Callable[[Tensor], Tensor] | None = None,
    watch: Callable[[Tensor, Tensor, Tensor], None] | None = None,
    drop: Callable[[Tensor], Tensor | None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample with exactly ``steps`` steps.

    Args:
        denoise: (z [N, T, D], t [], self_cond [N, T, D]) -> z0_hat [N, T, D].
        schedule: the one that the network was trained with.
        noise: the k-th standard normal draw, float [N, T, D]; 0 is the start. Each is taken once,
            none but the start where the temperature is 0.
        steps: N, at least 1.
        solver: a key of `SOLVERS`.
        self_cond: what the network is told of z_0. ``reuse``: the estimate of the step before,
            zeros in the first; ``none``: zeros; ``recompute``: an estimate at the present step
            by a second evaluation; ``gold``: the true embeddings (for diagnosis).
        gold: float [N, T, D], needed for ``gold``.
        grid: one of `TIME_GRIDS`.
        temperature: scale of the noise that the solver adds in a step; 1: that of its formula.
            With ddpm the first step discards the noise of the start, so that from then on z has
            ``temperature`` times the noise of the schedule.
        tell: maps an estimate z0_hat to the form in which the network is told it.
        clamp: maps an estimate to what the solver takes for z_0; None: what ``tell`` gives.
        watch: called at every step with its t (0-d), z and z0_hat.
        drop: called between steps with z0_hat; drops the rows that are finished and returns which
            are left (int64), or None: all. From then on N is those, for all of these functions.

    Returns:
        The last z0_hat of each row, float [N, T, D], and its number of denoiser evaluations [N].
    """
    z = noise(0)
    device = z.device
    solver_times = time_grid(steps, grid, schedule)  # on the CPU: its levels cost no launches
    # filled, not copied: a copy would wait for the device, and cannot be captured as a graph
    times = [torch.full((), t, device=device) for t in solver_times.tolist()]
    z = z * schedule.sigma(solver_times[0])
    move = SOLVERS[solver](schedule)
    answer, nfe = torch.zeros_like(z), torch.zeros(len(z), dtype=torch.long, device=device)
    rows = torch.arange(len(z), device=device)
    earlier = torch.zeros_like(z)

    def added(draw: int) -> Tensor:
        return temperature * noise(draw) if temperature else torch.zeros_like(z)

    for k in range(steps):
        told = earlier
        if self_cond == "recompute":
            told = tell(denoise(z, times[k], torch.zeros_like(z)))
        elif self_cond == "gold":
            assert gold is not None
            told = gold[rows]
        z0_hat = denoise(z, times[k], told)
        nfe[rows] += 2 if self_cond == "recompute" else 1
        if watch is not None:
            watch(times[k], z, z0_hat)
        if k + 1 == steps:
            answer[rows] = z0_hat
            break
        kept = drop(z0_hat) if drop else None
        if kept is not None:
            answer[rows] = z0_hat
            rows, z, z0_hat = rows[kept], z[kept], z0_hat[kept]
            move.select(kept)
            if not len(rows):
                break
        estimate = tell(z0_hat)
        earlier = estimate if self_cond == "reuse" else torch.zeros_like(z)
        z = move(
            z,
            clamp(z0_hat) if clamp else estimate,
            solver_times[k],
            solver_times[k + 1],
            partial(added, k + 1),
        )
    return answer, nfe
