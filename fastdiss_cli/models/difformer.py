"""Continuous embedding diffusion with standard self-conditioning (Difformer-style).

Source: Gao et al. 2024, "Empowering diffusion models on the embedding space for text
generation" (arXiv 2212.09412); the noise schedule and losses are those of the README.
"""
# B sentences, N rows (B x candidates), S source length, T target length, D latent, H model,
# V vocabulary

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiss_cli.config import one_of, require
from fastdiss_cli.data.batching import Batch, pad
from fastdiss_cli.diffusion.objective import (
    Condition,
    Denoise,
    draw_times,
    standard_self_conditioning,
)
from fastdiss_cli.diffusion.sampler import SELF_COND_MODES, sample
from fastdiss_cli.diffusion.schedule import ABAR, TIME_GRIDS, NoiseSchedule
from fastdiss_cli.diffusion.solvers import SOLVERS
from fastdiss_cli.models.layers import (
    SIZES,
    Decoder,
    Encoder,
    Memory,
    NetworkConfig,
    initialise,
    positions,
    sinusoid,
)
from fastdiss_cli.models.registry import (
    HistoryStep,
    Hypothesis,
    Loss,
    Seq2SeqModel,
    Vocabulary,
    register,
)
from fastdiss_cli.randomness import counter_normal

FORMS = ("raw", "nearest", "expected")  # of an estimate: see `LatentEmbedding.project`
LOGIT_SCALES = ("rsqrt", "learned", "one")


@dataclass(frozen=True)
class DiffusionConfig(NetworkConfig):
    """Options of the network and of the diffusion process."""

    latent_dim: int = 128
    noise_schedule: str = "sqrt"
    noise_factor: float = 4.0
    self_cond_rate: float = 0.5  # share of batches with standard self-conditioning
    self_cond_form: str = "expected"  # how an estimate is told: raw, nearest or expected embedding
    logit_scale: str = "rsqrt"  # of z0_hat . embedding: 1/sqrt(D), learned from there on, or 1
    embedding_scale: bool = False  # learn a common scale of the target embeddings
    length_loss: float = 0.1
    max_length_offset: int = 128  # target length - source length, at most, either way

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "noise_schedule", tuple(ABAR))
        one_of(self, "self_cond_form", FORMS)
        one_of(self, "logit_scale", LOGIT_SCALES)
        require(self, "latent_dim", self.latent_dim >= 1, "at least 1")
        require(self, "noise_factor", self.noise_factor > 0, "above 0")
        require(self, "self_cond_rate", 0 <= self.self_cond_rate <= 1, "in [0, 1]")
        require(self, "max_length_offset", self.max_length_offset >= 1, "at least 1")


@dataclass(frozen=True)
class DiffusionDecoding:
    """Options of sampling."""

    steps: int = 5
    length_beam: int = 1
    noise_beam: int = 1
    solver: str = "ddpm"
    time_grid: str = "log-snr"
    clamp: str = "expected"  # what the solver takes for z_0: the raw, nearest or expected embedding
    self_cond: str = "reuse"
    seed: int = 1
    history: bool = False
    diagnose: bool = False  # history with the gap between told and fresh estimates

    def __post_init__(self) -> None:
        require(self, "steps", self.steps >= 1, "at least 1")
        require(self, "length_beam", self.length_beam >= 1, "at least 1")
        require(self, "noise_beam", self.noise_beam >= 1, "at least 1")
        one_of(self, "solver", tuple(SOLVERS))
        one_of(self, "time_grid", TIME_GRIDS)
        one_of(self, "clamp", FORMS)
        one_of(self, "self_cond", SELF_COND_MODES)

    @property
    def candidates(self) -> int:
        return self.length_beam * self.noise_beam


class LatentEmbedding(nn.Module):
    """The target embeddings and the output layer tied to them.

    Every embedding has norm sqrt(D), so that a schedule means the same for all tokens; with a
    learned scale, a common multiple of it. The logit of a perfect estimate is D times the logit
    scale: with 1 that is so large that the smoothed anchor loss holds z0_hat to a fraction of the
    embeddings' norm, and what the solver then makes of it is no z_t that training has seen.
    """

    def __init__(self, vocab: Vocabulary, config: DiffusionConfig) -> None:
        super().__init__()
        dim = config.latent_dim
        self.table = nn.Embedding(vocab.size, dim)
        self.bias = nn.Parameter(torch.zeros(vocab.size))
        self.scale = nn.Parameter(torch.ones(1)) if config.embedding_scale else None
        self.logit_scale: float | Tensor = 1.0 if config.logit_scale == "one" else dim**-0.5
        if config.logit_scale == "learned":
            self.logit_scale = nn.Parameter(torch.full((1,), dim**-0.5))

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed int64 [...] to float [..., D]."""
        return self._normalise(self.table(tokens))

    def logits(self, z0_hat: Tensor) -> Tensor:
        """Score all tokens for estimates [..., D]; float32 [..., V]."""
        rows = self._normalise(self.table.weight)
        return F.linear(z0_hat * self.logit_scale, rows, self.bias).float()

    def project(self, z0_hat: Tensor, form: str) -> Tensor:
        """Return estimates in one of `FORMS`; float [..., D] both.

        Args:
            z0_hat: the estimates.
            form: ``raw``: as they are; ``nearest``: the embedding of the best token (Li et al.
                2022, Diffusion-LM, the clamping trick); ``expected``: the mean embedding under
                the softmax (Dieleman et al. 2022, CDCD, score interpolation).
        """
        if form == "nearest":
            return self(self.logits(z0_hat).argmax(-1))
        if form == "expected":
            return self.logits(z0_hat).softmax(-1) @ self._normalise(self.table.weight).float()
        return z0_hat

    def _normalise(self, rows: Tensor) -> Tensor:
        unit = F.layer_norm(rows, rows.shape[-1:])
        return unit if self.scale is None else unit * self.scale


class Difformer(Seq2SeqModel):
    """Encoder, denoising decoder, length head."""

    Config = DiffusionConfig
    Decoding = DiffusionDecoding
    default_select = "mbr"

    def __init__(self, config: DiffusionConfig, src: Vocabulary, tgt: Vocabulary) -> None:
        super().__init__(config, src, tgt)
        H, D = config.model_dim, config.latent_dim
        self.schedule = NoiseSchedule(config.noise_schedule, config.noise_factor)
        self.encoder = Encoder(src.size, src.pad, config)
        self.decoder = Decoder(config)
        self.embedding = LatentEmbedding(tgt, config)
        self.latent_in = nn.Linear(2 * D, H)
        self.time_in = nn.Sequential(nn.Linear(H, H), nn.SiLU(), nn.Linear(H, H))
        self.latent_out = nn.Linear(H, D)
        self.length_head = nn.Linear(H, 2 * config.max_length_offset + 1)
        initialise(self)
        nn.init.normal_(self.embedding.table.weight)

    def encode(self, src_tokens: Tensor) -> Memory:
        return self.decoder.memory(*self.encoder(src_tokens))

    def denoise(
        self, z_t: Tensor, t: Tensor, self_cond: Tensor, memory: Memory, pad_mask: Tensor
    ) -> Tensor:
        """Estimate z_0: the network f of the README.

        Args:
            z_t, self_cond: float [N, T, D].
            t: float [N] or, per token, [N, T].
            memory: of B sentences, N a multiple of B.
            pad_mask: bool [N, T].
        """
        if t.dim() == 1:
            t = t[:, None]
        unit = z_t / self.schedule.scale(t)[..., None]
        x = self.latent_in(torch.cat([unit, self_cond], dim=-1))
        x = x + self.time_in(sinusoid(1000 * t, x.shape[-1]))
        x = x + positions(x.shape[1], x.shape[2], x.device)
        return self.latent_out(self.decoder(x, memory, pad_mask)).float()

    def tell(self, z0_hat: Tensor) -> Tensor:
        """Return the form in which the network is told an estimate; float [N, T, D] both."""
        return self.embedding.project(z0_hat, self.config.self_cond_form)

    def predict_lengths(self, memory: Memory) -> Tensor:
        """Return log-probabilities of target length - source length + max_length_offset."""
        kept = (~memory.pad_mask).unsqueeze(-1)
        pooled = (memory.hidden * kept).sum(1) / kept.sum(1)
        return F.log_softmax(self.length_head(pooled).float(), dim=-1)

    # training

    def condition(
        self, denoise: Denoise, z_0: Tensor, noise: Tensor, tgt_tokens: Tensor, update: int
    ) -> Condition:
        """Choose the noise times and what the network is told; the systems differ here only.

        Args:
            denoise: the network, with the batch's memory and mask.
            z_0, noise: clean embeddings and standard normal, float [B, T, D].
            tgt_tokens: int64 [B, T].
            update: number of the present update.
        """
        t = draw_times(len(z_0), z_0.device)[:, None].expand(z_0.shape[:2])
        z_t = self.schedule.add_noise(z_0, t, noise)
        return standard_self_conditioning(denoise, self.tell, z_t, t, self.config.self_cond_rate)

    def loss(self, batch: Batch, update: int) -> Loss:
        config: DiffusionConfig = self.config
        memory = self.encode(batch.src_tokens)
        z_0 = self.embedding(batch.tgt_tokens)
        noise = torch.randn_like(z_0)

        def denoise(z_t: Tensor, t: Tensor, self_cond: Tensor) -> Tensor:
            return self.denoise(z_t, t, self_cond, memory, batch.tgt_pad_mask)

        with torch.no_grad():
            given = self.condition(denoise, z_0, noise, batch.tgt_tokens, update)
        # before torch 2.10 autocast would go on with casts of the weights that carry no gradient
        torch.clear_autocast_cache()
        z0_hat = denoise(self.schedule.add_noise(z_0, given.t, noise), given.t, given.self_cond)
        mse, anchor = self._token_losses(z0_hat, z_0, batch)
        real = ~batch.tgt_pad_mask
        limit = config.max_length_offset
        offset = real.sum(1) - (~batch.src_pad_mask).sum(1)
        length = F.nll_loss(self.predict_lengths(memory), offset.clamp(-limit, limit) + limit)
        total = mse + anchor + config.length_loss * length
        return Loss(total, {"mse": mse, "anchor": anchor, "length": length})

    def losses_at(self, batch: Batch, t: float, gap: float | None) -> tuple[Tensor, Tensor]:
        """Return the mean losses (mse, anchor) of a token at one time, for a diagnosis.

        Args:
            batch: sentence pairs.
            t: noise time of all tokens.
            gap: the network is told its estimate at t + gap, noised further from the same z_t;
                zeros where that exceeds 1. None: it is told nothing.
        """
        memory = self.encode(batch.src_tokens)
        z_0 = self.embedding(batch.tgt_tokens)
        now = torch.full((len(z_0), 1), t, device=z_0.device).expand(z_0.shape[:2])
        z_t = self.schedule.add_noise(z_0, now, torch.randn_like(z_0))
        told = torch.zeros_like(z_0)
        if gap is not None and t + gap <= 1:
            later = now + gap
            stale = self.schedule.add_more_noise(z_t, now, later, torch.randn_like(z_0))
            told = self.tell(self.denoise(stale, later, told, memory, batch.tgt_pad_mask))
        z0_hat = self.denoise(z_t, now, told, memory, batch.tgt_pad_mask)
        return self._token_losses(z0_hat, z_0, batch)

    def _token_losses(self, z0_hat: Tensor, z_0: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the diffusion and the anchor loss, means over the tokens that are no padding."""
        real = ~batch.tgt_pad_mask
        anchor = F.cross_entropy(
            self.embedding.logits(z0_hat[real]),
            batch.tgt_tokens[real],
            label_smoothing=self.config.label_smoothing,
        )
        return F.mse_loss(z0_hat[real], z_0[real]), anchor

    # decoding

    def decode(
        self,
        memory: Memory,
        sentences: Tensor,
        options: DiffusionDecoding,
        gold: Sequence[Sequence[int]] | None = None,
    ) -> list[list[Hypothesis]]:
        B, D = len(sentences), self.config.latent_dim
        device = memory.hidden.device
        if options.self_cond == "gold":
            assert gold is not None
            lengths = torch.tensor([len(tokens) for tokens in gold], device=device)[:, None]
        else:
            lengths = self._length_candidates(memory, options.length_beam)
        # rows of one sentence are neighbours: its lengths, and for each length its noise draws
        per_sentence = lengths.shape[1] * options.noise_beam
        lengths = lengths.repeat_interleave(options.noise_beam, dim=1).flatten()
        rows = sentences.repeat_interleave(per_sentence)
        candidates = torch.arange(per_sentence, device=device).repeat(B)
        T = int(lengths.max())
        pad_mask = torch.arange(T, device=device) >= lengths[:, None]

        told = None
        if options.self_cond == "gold":
            told = self.embedding(pad(gold, self.tgt.pad)[0].to(device))
            told = told.repeat_interleave(per_sentence, dim=0)
        frames: list[list[HistoryStep]] = []

        def denoise(z: Tensor, t: Tensor, told: Tensor) -> Tensor:
            return self.denoise(z, t, told, memory, pad_mask)

        def clamp(z0_hat: Tensor) -> Tensor:
            return self.embedding.project(z0_hat, options.clamp)

        def watch(t: Tensor, z: Tensor, z0_hat: Tensor) -> None:
            fresh = None
            if options.diagnose and self.config.self_cond_rate:
                at = t.expand(len(z))
                fresh = denoise(z, at, self.tell(denoise(z, at, torch.zeros_like(z))))
            frames.append(self._history(float(t), z0_hat, fresh, lengths))

        z0_hat, nfe = sample(
            denoise,
            self.schedule,
            lambda draw: counter_normal(options.seed, rows, candidates, draw, T, D),
            options.steps,
            options.solver,
            # who was never told anything in training is told nothing
            options.self_cond if self.config.self_cond_rate else "none",
            told,
            options.time_grid,
            self.tell,
            None if options.clamp == self.config.self_cond_form else clamp,
            watch if options.history or options.diagnose else None,
        )
        scores, tokens = (x.tolist() for x in self._read(z0_hat))
        answers = []
        for row, length in enumerate(lengths.tolist()):
            ids, token_scores = self._trim(tokens[row][:length], scores[row])
            score = sum(token_scores) / len(token_scores)
            history = [frame[row] for frame in frames]
            answers.append(Hypothesis(ids, score, token_scores, nfe, history))
        return [
            sorted(answers[b * per_sentence : (b + 1) * per_sentence], key=lambda h: -h.score)
            for b in range(B)
        ]

    def _length_candidates(self, memory: Memory, beam: int) -> Tensor:
        """Return the most likely target lengths of each sentence, int64 [B, beam], all >= 1."""
        limit = self.config.max_length_offset
        src_lengths = (~memory.pad_mask).sum(1, keepdim=True)
        log_probs = self.predict_lengths(memory)
        reachable = src_lengths + torch.arange(-limit, limit + 1, device=src_lengths.device) >= 1
        log_probs = log_probs.masked_fill(~reachable, float("-inf"))
        beam = min(beam, limit + 1)
        return src_lengths + log_probs.topk(beam, dim=1).indices - limit

    def _read(self, z0_hat: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probability and id of the best token at every position, both [N, T]."""
        logits = self.embedding.logits(z0_hat)
        logits[..., [self.tgt.bos, self.tgt.pad]] = float("-inf")
        best, tokens = logits.max(dim=-1)
        return best - logits.logsumexp(dim=-1), tokens

    def _history(
        self, time: float, z0_hat: Tensor, fresh: Tensor | None, lengths: Tensor
    ) -> list[HistoryStep]:
        """Return what each row looks like at one step; means are over its own positions."""
        scores, tokens = self._read(z0_hat)
        own = torch.arange(z0_hat.shape[1], device=z0_hat.device) < lengths[:, None]

        def mean(squares: Tensor) -> list[float]:
            return ((squares.mean(-1) * own).sum(1) / lengths).tolist()

        norms = mean(z0_hat.square())
        gaps = [math.nan] * len(norms) if fresh is None else mean((z0_hat - fresh).square())
        rows = zip(lengths.tolist(), tokens.tolist(), scores.exp().tolist(), strict=True)
        return [
            HistoryStep(time, *self._trim(ids[:length], values), norm, gap)
            for (length, ids, values), norm, gap in zip(rows, norms, gaps, strict=True)
        ]

    def _trim(self, tokens: list[int], values: list[float]) -> tuple[list[int], list[float]]:
        """Cut a row at its first eos; the values keep that of the eos."""
        end = tokens.index(self.tgt.eos) if self.tgt.eos in tokens else len(tokens)
        return tokens[:end], values[: min(end + 1, len(tokens))]


def register_sizes(name: str, family: type[Difformer], description: str) -> None:
    """Register a diffusion family in the sizes that all systems share."""
    for size, sizes in SIZES.items():
        latent_dim = 64 if size == "tiny" else 128
        register(f"{name}_{size}", family, description, **sizes, latent_dim=latent_dim)


register_sizes("difformer", Difformer, "continuous diffusion, standard self-conditioning")
