"""A diffusion network bound to one batch: its sources and the layout of its targets."""
# B sentences, N rows (B x candidates), T target length, P tokens of a batch, D latent, H model

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from fastdiss_cli.data.layout import Layout
from fastdiss_cli.models.layers import Memory

if TYPE_CHECKING:
    from fastdiss_cli.models.difformer import Difformer


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
