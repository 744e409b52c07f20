"""A diffusion network bound to one batch: its sources, its layout, its candidates."""
# B sentences, N rows (B x candidates), T target length, P tokens of a batch, D latent, H model

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from fastdiss_cli.data.layout import Layout
from fastdiss_cli.models.layers import Memory
from fastdiss_cli.randomness import counter_normal

if TYPE_CHECKING:
    from fastdiss_cli.models.difformer import Difformer

EXIT_PROBABILITY = 0.5  # an early exit needs more for every token: see docs/method.md
# random numbers that are drawn in one call: on a CPU as many as fit in a core's cache
_CPU_NUMBERS, _GPU_NUMBERS = 2**17, 2**22


@dataclass
class Denoiser:
    """The network bound to the sources of a batch and the layout of its targets.

    Attributes:
        model: the network.
        memory: of B sentences.
        layout: of N rows, N a multiple of B.
        sketch: float [P, H], see `Difformer.sketch`; the same in all steps.
    """

    model: Difformer
    memory: Memory
    layout: Layout

    def __post_init__(self) -> None:
        self.sketch = self.model.sketch(self.memory, self.layout)

    def __call__(self, z_t: Tensor, t: Tensor, self_cond: Tensor) -> Tensor:
        """Return z0_hat [N, T, D]; see `Difformer.denoise`."""
        return self.model.denoise(z_t, t, self_cond, self.memory, self.layout, self.sketch)

    def select(self, sentences: Tensor, rows: Tensor) -> None:
        """Go on with some sentences and their rows; int64 indices into B and into N."""
        sketch = self.layout.padded(self.sketch)[rows]
        self.memory, self.layout = self.memory.select(sentences), self.layout.select(rows)
        self.sketch = self.layout.flat(sketch)

    def to_self_cond(self, z0_hat: Tensor) -> Tensor:
        """Return the self_cond that an estimate becomes; float [N, T, D] both."""
        return self.project(z0_hat, self.model.config.self_cond_form)

    def project(self, z0_hat: Tensor, form: str) -> Tensor:
        """Return estimates [N, T, D] in one of `FORMS`, zeros as padding."""
        projected = self.model.embedding.project(self.layout.flat(z0_hat), form)
        return self.layout.padded(projected)


@dataclass
class Candidates:
    """The candidates that are being sampled, grouped by sentence.

    Attributes:
        denoiser: the network, with the memory of B sentences and the layout of N candidates; both
            shrink when sentences are dropped.
        seeds, numbers: int64 [N], the seed of its sentence and its number within the sentence, from
            which its noise is drawn.
        noise_keys: int64 [10, 2, K], of the draws of noise of a run: see `randomness.draw_keys`.
        best, before: int64 [N, T] and bool [N]: the best tokens of this step and of the step
            before, and whether the network is sure of all of them, for an early exit.
        drawn: draws that are made but not used yet, float [N, T, D], by their number.
    """

    denoiser: Denoiser
    seeds: Tensor
    numbers: Tensor
    noise_keys: Tensor
    best: tuple[Tensor, Tensor] | None = None
    before: tuple[Tensor, Tensor] | None = None
    drawn: dict[int, Tensor] = field(default_factory=dict)

    def noise(self, dim: int, draw: int) -> Tensor:
        """Return the k-th standard normal draw of every candidate, float [N, T, dim].

        Each is used once. For few candidates several draws are made in one call, because a call
        costs 150 operations even for a few numbers.
        """
        if draw not in self.drawn:
            length = self.denoiser.layout.pad_mask.shape[1]
            numbers = _CPU_NUMBERS if self.noise_keys.device.type == "cpu" else _GPU_NUMBERS
            count = max(numbers // (len(self.seeds) * length * dim), 1)
            keys = self.noise_keys[..., draw : draw + count]
            noise = counter_normal(keys, self.seeds, self.numbers, length, dim)
            self.drawn = dict(enumerate(noise, draw))
        return self.drawn.pop(draw)

    def to_self_cond(self, z0_hat: Tensor) -> Tensor:
        """Return what `Denoiser.to_self_cond` does, and take note of the best tokens."""
        model, layout = self.denoiser.model, self.denoiser.layout
        estimate, probabilities, tokens = map(
            layout.padded,
            model.embedding.project_and_read(layout.flat(z0_hat), model.config.self_cond_form),
        )
        sure = (probabilities > EXIT_PROBABILITY) | layout.pad_mask
        self.best = tokens, sure.all(1)
        return estimate

    def drop_settled(self) -> Tensor | None:
        """Drop the sentences whose candidates are sure of the same tokens for a second step.

        Returns:
            The rows that are kept, int64 indices into N, or None: all.
        """
        assert self.best is not None
        (tokens, sure), before = self.best, self.before
        self.before = self.best
        if before is None:
            return None
        settled = (tokens == before[0]).all(1) & before[1] & sure
        go_on = ~settled.reshape(len(self.denoiser.memory.hidden), -1).all(1)
        if go_on.all():
            return None
        rows = go_on.repeat_interleave(len(tokens) // len(go_on)).nonzero().squeeze(1)
        self.denoiser.select(go_on.nonzero().squeeze(1), rows)
        self.seeds, self.numbers = self.seeds[rows], self.numbers[rows]
        self.before = tokens[rows], sure[rows]
        self.drawn = {draw: noise[rows] for draw, noise in self.drawn.items()}
        return rows
