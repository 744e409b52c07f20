"""Continuous embedding diffusion with standard self-conditioning (Difformer-style).

Source: Gao et al. 2024, "Empowering diffusion models on the embedding space for text
generation" (arXiv 2212.09412); the formulas are in docs/method.md.
"""
# B sentences, N rows (B x candidates), S source length, T target length, P tokens of a batch,
# D latent, H model, V vocabulary

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiss_cli.config import one_of, option, require
from fastdiss_cli.data.batching import Batch
from fastdiss_cli.data.layout import Layout
from fastdiss_cli.diffusion.objective import (
    Condition,
    draw_times,
    standard_self_conditioning,
)
from fastdiss_cli.diffusion.schedule import ABAR, NoiseSchedule
from fastdiss_cli.models import SIZES
from fastdiss_cli.models.denoiser import Denoiser
from fastdiss_cli.models.diffusion_decoding import SampledModel
from fastdiss_cli.models.embedding import FORMS, LOGIT_SCALES, LatentEmbedding
from fastdiss_cli.models.layers import (
    Decoder,
    Encoder,
    Memory,
    NetworkConfig,
    initialise,
    positions,
    sinusoid,
)
from fastdiss_cli.models.registry import Loss, Vocabulary, register
from fastdiss_cli.models.source_copy import source_copy


@dataclass(frozen=True)
class DiffusionConfig(NetworkConfig):
    """Options of the network and of the diffusion process."""

    latent_dim: int = option(128, "dimension of the target embeddings that are denoised")
    noise_schedule: str = option("sqrt", f"noise schedule: {', '.join(ABAR)}")
    noise_factor: float = option(4.0, "standard deviation of the noise at t = 1")
    self_cond_rate: float = option(0.5, "share of batches that are given an estimate")
    self_cond_form: str = option(
        "expected", f"form of that estimate: {', '.join(FORMS)}", needs=("self_cond_rate", True)
    )
    logit_scale: str = option("matched", f"scale of z0_hat . embedding: {', '.join(LOGIT_SCALES)}")
    source_copy: float = option(1.0, "width of the soft copy of the source; 0: none", before=0.0)
    length_loss: float = option(0.1, "weight of the length loss")
    max_length_offset: int = option(128, "largest difference of target and source length")

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "noise_schedule", tuple(ABAR))
        one_of(self, "self_cond_form", FORMS)
        one_of(self, "logit_scale", LOGIT_SCALES)
        # with a single coordinate all normalised embeddings are equal
        require(self, "latent_dim", self.latent_dim >= 2, "at least 2")
        require(self, "noise_factor", self.noise_factor > 0, "above 0")
        require(self, "self_cond_rate", 0 <= self.self_cond_rate <= 1, "in [0, 1]")
        copied = self.source_copy == 0 or 1e-3 <= self.source_copy < math.inf
        require(self, "source_copy", copied, "0, or at least 0.001 and finite")
        require(self, "length_loss", self.length_loss >= 0, "at least 0")
        require(self, "max_length_offset", self.max_length_offset >= 1, "at least 1")


class Difformer(SampledModel):
    """Encoder, denoising decoder, length head."""

    Config = DiffusionConfig

    def __init__(self, config: DiffusionConfig, src: Vocabulary, tgt: Vocabulary) -> None:
        super().__init__(config, src, tgt)
        H, D = config.model_dim, config.latent_dim
        self.schedule = NoiseSchedule(config.noise_schedule, config.noise_factor)
        self.encoder = Encoder(src.size, config)
        self.decoder = Decoder(config)
        self.embedding = LatentEmbedding(tgt.size, D, config.logit_scale, config.label_smoothing)
        self.latent_in = nn.Linear(2 * D, H)
        self.time_in = nn.Sequential(nn.Linear(H, H), nn.SiLU(), nn.Linear(H, H))
        self.latent_out = nn.Linear(H, D)
        self.length_head = nn.Linear(H, 2 * config.max_length_offset + 1)
        initialise(self)
        nn.init.normal_(self.embedding.table.weight)

    def encode(self, src_tokens: Tensor, layout: Layout) -> Memory:
        return self.decoder.memory(self.encoder(src_tokens, layout), layout)

    def sketch(self, memory: Memory, layout: Layout) -> Tensor:
        """Return what is known of the target beforehand: its positions, and the source near them.

        Args:
            memory: of B sentences.
            layout: of N rows, N a multiple of B.

        Returns:
            float [P, H].
        """
        N, T = layout.pad_mask.shape
        x = positions(T, self.config.model_dim, memory.hidden.device)
        x = layout.flat(x.expand(N, -1, -1))
        if self.config.source_copy:
            x = x + source_copy(memory, layout, self.config.source_copy)
        return x

    def denoise(
        self,
        z_t: Tensor,
        t: Tensor,
        self_cond: Tensor,
        memory: Memory,
        layout: Layout,
        sketch: Tensor,
    ) -> Tensor:
        """Estimate z_0: the network f of docs/method.md.

        Args:
            z_t, self_cond: float [N, T, D].
            t: float [], [N, 1] or, per token, [N, T].
            memory, layout, sketch: see `sketch`.

        Returns:
            float32 [N, T, D], zeros as padding.
        """
        x = self.latent_in(layout.flat(torch.cat([self.schedule.unit(z_t, t), self_cond], -1)))
        time = self.time_in(sinusoid(1000 * t, x.shape[-1]))
        if t.dim():
            time = layout.flat(time.expand(*z_t.shape[:2], -1))
        x = x + sketch + time
        return layout.padded(self.latent_out(self.decoder(x, layout, memory)).float())

    def predict_lengths(self, memory: Memory) -> Tensor:
        pooled = memory.hidden.sum(1) / memory.layout.lengths[:, None]
        return F.log_softmax(self.length_head(pooled).float(), dim=-1)

    # training

    def misfits(self, src_lengths: np.ndarray, tgt_lengths: np.ndarray) -> str | None:
        limit = self.config.max_length_offset
        count = int((np.abs(tgt_lengths.astype(np.int64) - src_lengths) > limit).sum())
        if not count:
            return None
        return (
            f"{count:,} of {len(src_lengths):,} pairs differ in length by more than "
            f"model.max_length_offset = {limit}: the length head learns {limit} for them; raise it "
            "to keep their lengths"
        )

    def condition(
        self, denoiser: Denoiser, z_0: Tensor, noise: Tensor, tgt_tokens: Tensor, update: int
    ) -> Condition:
        """Choose the noise times and the self-conditioning; the systems differ only here.

        Args:
            denoiser: the network for this batch.
            z_0, noise: clean embeddings and standard normal, float [B, T, D].
            tgt_tokens: int64 [B, T].
            update: number of the current update.
        """
        t = draw_times(len(z_0), z_0.device)
        z_t = self.schedule.add_noise(z_0, t, noise)
        return standard_self_conditioning(
            denoiser, denoiser.to_self_cond, z_t, t, self.config.self_cond_rate
        )

    def loss(self, batch: Batch, update: int) -> Loss:
        config: DiffusionConfig = self.config
        memory = self.encode(batch.src_tokens, batch.src_layout)
        denoiser = Denoiser(self, memory, batch.tgt_layout)
        z_0 = self.embedding(batch.tgt_tokens)
        noise = torch.randn_like(z_0)
        with torch.no_grad():
            given = self.condition(denoiser, z_0, noise, batch.tgt_tokens, update)
        # before torch 2.10 autocast would reuse the weights it cast without gradient
        torch.clear_autocast_cache()
        z_t = given.z_t(self.schedule, z_0, noise)
        z0_hat = denoiser(z_t, given.network_t, given.self_cond)
        mse, anchor = self._token_losses(z0_hat, z_0, batch.tgt_tokens, denoiser.layout)
        limit = config.max_length_offset
        offset = batch.tgt_layout.lengths - memory.layout.lengths
        length = F.nll_loss(self.predict_lengths(memory), offset.clamp(-limit, limit) + limit)
        total = mse + anchor + config.length_loss * length
        return Loss(total, {"mse": mse, "anchor": anchor, "length": length})

    def losses_at(self, batch: Batch, t: float, later: float | None) -> tuple[Tensor, Tensor]:
        """Return the mean losses (mse, anchor) of a token at one time, for a diagnosis.

        Args:
            batch: sentence pairs.
            t: noise time of all tokens.
            later: condition the network on its estimate at this time, from t to 1, from the same
                z_t noised further. None: on zeros.
        """
        memory = self.encode(batch.src_tokens, batch.src_layout)
        denoiser = Denoiser(self, memory, batch.tgt_layout)
        z_0 = self.embedding(batch.tgt_tokens)
        now = torch.tensor(t, device=z_0.device)
        z_t = self.schedule.add_noise(z_0, now, torch.randn_like(z_0))
        self_cond = torch.zeros_like(z_0)
        if later is not None:
            then = torch.tensor(later, device=z_0.device)
            stale = self.schedule.add_more_noise(z_t, now, then, torch.randn_like(z_0))
            self_cond = denoiser.to_self_cond(denoiser(stale, then, self_cond))
        z0_hat = denoiser(z_t, now, self_cond)
        return self._token_losses(z0_hat, z_0, batch.tgt_tokens, denoiser.layout)

    def _token_losses(
        self, z0_hat: Tensor, z_0: Tensor, tgt_tokens: Tensor, layout: Layout
    ) -> tuple[Tensor, Tensor]:
        """Return the diffusion and the anchor loss, means over non-padding tokens."""
        estimate = layout.flat(z0_hat)
        gold, smoothing = layout.flat(tgt_tokens), self.config.label_smoothing
        anchor, _ = self.embedding.cross_entropy(estimate, gold, smoothing)
        return F.mse_loss(estimate, layout.flat(z_0)), anchor


def register_sizes(name: str, family: type[Difformer], description: str) -> None:
    """Register a diffusion family in the sizes that all systems share."""
    for size, sizes in SIZES.items():
        latent_dim = 64 if size == "tiny" else 128
        register(f"{name}_{size}", family, description, latent_dim=latent_dim, **sizes)


register_sizes("difformer", Difformer, "diffusion")
