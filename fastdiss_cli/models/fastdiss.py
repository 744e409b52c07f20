"""FastDiSS (arXiv 2604.05551): the network of `difformer`, trained with SCP and optional MANS."""
# B sentences, T target length, D latent

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiss_cli.config import one_of, option, require
from fastdiss_cli.diffusion.objective import (
    MANS,
    MANS_CONFIDENCES,
    MANS_TIMES,
    SCP,
    SCP_COUPLINGS,
    SCP_OFFSETS,
    Condition,
    draw_times,
    perturbed_self_conditioning,
)
from fastdiss_cli.diffusion.schedule import TIME_GRIDS
from fastdiss_cli.models.denoiser import Denoiser
from fastdiss_cli.models.difformer import Difformer, DiffusionConfig, register_sizes
from fastdiss_cli.models.registry import Vocabulary

ESTIMATED = ("self_cond_rate", True)
MANS_ON = ("mans_strength", True)
STEP_MATCHED = ("scp_offset", "step-matched")
PERTURBED = ("scp_offset", tuple(name for name in SCP_OFFSETS if name != "none"))
DEFAULT_ANCHORS = {"distance": (0.1, 1.0), "probability": (0.9, 0.1)}


@dataclass(frozen=True)
class FastDiSSConfig(DiffusionConfig):
    """Options of SCP and MANS; see `SCP` and `MANS` for what they mean."""

    self_cond_rate: float = option(1.0, "share of batches with a first pass at t' > t")
    scp_offset: str = option(
        "step-matched", f"how t' is drawn: {', '.join(SCP_OFFSETS)}", needs=ESTIMATED
    )
    scp_coupling: str = option(
        "markov", f"coupling of z_t' and z_t: {', '.join(SCP_COUPLINGS)}", needs=ESTIMATED
    )
    scp_gap: float = option(0.2, "t' - t where scp_offset is fixed", needs=("scp_offset", "fixed"))
    scp_step_counts: tuple[int, ...] = option(
        (2, 3, 5, 10, 20), "step counts that step-matched draws from", needs=STEP_MATCHED
    )
    scp_grid: str = option(
        "uniform", f"time grid of step-matched: {', '.join(TIME_GRIDS)}", needs=STEP_MATCHED
    )
    scp_unroll: float = option(
        0.5, "share of sentences with an estimate that are unrolled", needs=PERTURBED
    )
    # MANS is off: its gain was shown on one corpus only, see docs/method.md
    mans_strength: float = option(0.0, "lambda: how much more noise easy tokens get; 0: no MANS")
    mans_confidence: str = option(
        "distance", f"what makes a token easy: {', '.join(MANS_CONFIDENCES)}", needs=MANS_ON
    )
    mans_anchors: tuple[float, ...] = option(
        (),
        "values [easy, hard]; empty: [0.1, 1] by distance, [0.9, 0.1] by probability",
        needs=MANS_ON,
    )
    mans_start_update: int = option(0, "the first update that uses MANS", needs=MANS_ON)
    mans_shared_pass: bool = option(
        False, "take the confidence from SCP's pass, not one of its own", needs=MANS_ON
    )
    mans_time: str = option(
        "sentence",
        f"time that the network is given: {', '.join(MANS_TIMES)}",
        needs=MANS_ON,
        before="token",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "scp_offset", SCP_OFFSETS)
        one_of(self, "scp_coupling", SCP_COUPLINGS)
        one_of(self, "scp_grid", TIME_GRIDS)
        one_of(self, "mans_confidence", MANS_CONFIDENCES)
        one_of(self, "mans_time", MANS_TIMES)
        require(self, "scp_gap", 0 < self.scp_gap <= 1, "in (0, 1]")
        require(
            self,
            "scp_step_counts",
            len(self.scp_step_counts) > 0 and min(self.scp_step_counts) >= 1,
            "step counts of at least 1",
        )
        require(self, "scp_unroll", 0 <= self.scp_unroll <= 1, "in [0, 1]")
        require(self, "mans_strength", 0 <= self.mans_strength <= 1, "in [0, 1]")
        shared = self.mans_strength > 0 and self.mans_shared_pass
        require(
            self,
            "mans_shared_pass",
            not shared or self.scp_offset != "none",
            "false with scp_offset none (no pass at a higher noise)",
        )
        by_distance = self.mans_confidence == "distance"
        rising = self.mans_anchors if by_distance else self.mans_anchors[::-1]
        require(
            self,
            "mans_anchors",
            not rising or (len(rising) == 2 and rising[0] < rising[1]),
            f"empty or [easy, hard], where by {self.mans_confidence} easy is the "
            f"{'smaller' if by_distance else 'larger'} one",
        )


class FastDiSS(Difformer):
    """Difformer with a repaired training: see `perturbed_self_conditioning`."""

    Config = FastDiSSConfig

    def __init__(self, config: FastDiSSConfig, src: Vocabulary, tgt: Vocabulary) -> None:
        super().__init__(config, src, tgt)
        self.scp = SCP(
            offset=config.scp_offset,
            coupling=config.scp_coupling,
            rate=config.self_cond_rate,
            gap=config.scp_gap,
            step_counts=config.scp_step_counts,
            grid=config.scp_grid,
            unroll=config.scp_unroll,
        )
        self.mans = MANS(
            strength=config.mans_strength,
            confidence=config.mans_confidence,
            anchors=config.mans_anchors or DEFAULT_ANCHORS[config.mans_confidence],
            start_update=config.mans_start_update,
            shared_pass=config.mans_shared_pass,
            time=config.mans_time,
        )

    def condition(
        self, denoiser: Denoiser, z_0: Tensor, noise: Tensor, tgt_tokens: Tensor, update: int
    ) -> Condition:
        def measure(z0_hat: Tensor) -> Tensor:
            if self.mans.confidence == "distance":
                return (z0_hat - z_0).square().mean(-1)
            layout = denoiser.layout
            logits = self.embedding.logits(layout.flat(z0_hat))
            nll = F.cross_entropy(logits, layout.flat(tgt_tokens), reduction="none")
            return layout.padded(torch.exp(-nll))

        return perturbed_self_conditioning(
            denoiser,
            denoiser.to_self_cond,
            measure,
            self.schedule,
            self.scp,
            self.mans,
            z_0,
            noise,
            t=draw_times(len(z_0), z_0.device),
            update=update,
        )


register_sizes("fastdiss", FastDiSS, "diffusion, SCP/MANS")
