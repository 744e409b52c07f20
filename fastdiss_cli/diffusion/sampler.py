"""The sampling loop: N denoiser evaluations from pure noise to an estimate of z_0."""
# N rows, T target length, D latent

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastdiss_cli.diffusion import Denoise, ToSelfCond
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
    to_self_cond: ToSelfCond = lambda z0_hat: z0_hat,
    clamp: Callable[[Tensor], Tensor] | None = None,
    watch: Callable[[Tensor, Tensor, Tensor, Tensor], None] | None = None,
    drop: Callable[[], Tensor | None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample with exactly ``steps`` steps.

    Args:
        denoise: (z [N, T, D], t [], self_cond [N, T, D]) -> z0_hat [N, T, D].
        schedule: the one that the network was trained with.
        noise: returns the k-th standard normal draw, float [N, T, D]. Draw 0 is the start. Each is
            requested at most once; at temperature 0, only draw 0 is.
        steps: N, at least 1.
        solver: a key of `SOLVERS`.
        self_cond: the estimate that the network is conditioned on. ``reuse``: that of the previous
            step, zeros in the first; ``none``: zeros; ``recompute``: one of the current step, from
            a second evaluation; ``gold``: the true embeddings (for diagnosis).
        gold: float [N, T, D], needed for ``gold``.
        grid: one of `TIME_GRIDS`.
        temperature: scale of the noise that the solver adds in a step; 1 is the formula's own.
            With ddpm the first step discards the noise of the start, so that from then on z has
            ``temperature`` times the noise of the schedule.
        to_self_cond: maps an estimate z0_hat to the ``self_cond`` of the next evaluation.
        clamp: maps an estimate to what the solver takes for z_0; None: ``to_self_cond``.
        watch: called at every step with the rows that are still sampled (int64 indices into the
            first N), its t (0-d), z and z0_hat.
        drop: called between steps, after ``to_self_cond``; returns the rows that go on (int64
            indices into N), or None: all. From then on N is their number, for all of these
            functions.

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
    evaluations = 2 if self_cond == "recompute" else 1  # in a step

    def added(draw: int) -> Tensor:
        return temperature * noise(draw) if temperature else torch.zeros_like(z)

    for k in range(steps):
        given = earlier
        if self_cond == "recompute":
            given = to_self_cond(denoise(z, times[k], torch.zeros_like(z)))
        elif self_cond == "gold":
            assert gold is not None
            given = gold[rows]
        z0_hat = denoise(z, times[k], given)
        answer[rows] = z0_hat
        nfe.index_fill_(0, rows, (k + 1) * evaluations)
        if watch is not None:
            watch(rows, times[k], z, z0_hat)
        if k + 1 == steps:
            break
        estimate = to_self_cond(z0_hat)
        kept = drop() if drop else None
        if kept is not None:
            rows, z, z0_hat, estimate = rows[kept], z[kept], z0_hat[kept], estimate[kept]
            move.select(kept)
            if not len(rows):
                break
        earlier = estimate if self_cond == "reuse" else torch.zeros_like(z)
        z = move(
            z,
            clamp(z0_hat) if clamp else estimate,
            solver_times[k],
            solver_times[k + 1],
            partial(added, k + 1),
        )
    return answer, nfe
