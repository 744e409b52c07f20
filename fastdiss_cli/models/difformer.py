"""Continuous embedding diffusion with standard self-conditioning (Difformer-style).

Source: Gao et al. 2024, "Empowering diffusion models on the embedding space for text
generation" (arXiv 2212.09412); the formulas are in docs/method.md.
"""
# B sentences, N rows (B x candidates), S source length, T target length, P tokens of a batch,
# D latent, H model, V vocabulary

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiss_cli.config import one_of, option, require
from fastdiss_cli.data.batching import Batch, pad
from fastdiss_cli.data.layout import Layout
from fastdiss_cli.diffusion.objective import (
    Condition,
    draw_times,
    standard_self_conditioning,
)
from fastdiss_cli.diffusion.sampler import SELF_COND_MODES, sample
from fastdiss_cli.diffusion.schedule import ABAR, TIME_GRIDS, NoiseSchedule
from fastdiss_cli.diffusion.solvers import SOLVERS
from fastdiss_cli.errors import FastdissError
from fastdiss_cli.models import SIZES
from fastdiss_cli.models.denoiser import Candidates, Denoiser
from fastdiss_cli.models.embedding import FORMS, LOGIT_SCALES, LatentEmbedding
from fastdiss_cli.models.graphs import GraphCache
from fastdiss_cli.models.layers import (
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
from fastdiss_cli.models.source_copy import source_copy
from fastdiss_cli.randomness import draw_keys


@dataclass(frozen=True)
class DiffusionConfig(NetworkConfig):
    """Options of the network and of the diffusion process."""

    latent_dim: int = option(128, "dimension of the target embeddings that are denoised")
    noise_schedule: str = option("sqrt", f"signal by time: {', '.join(ABAR)}")
    noise_factor: float = option(4.0, "standard deviation of the noise at t = 1")
    self_cond_rate: float = option(0.5, "share of batches that are told an estimate")
    self_cond_form: str = option("expected", f"how they are told it: {', '.join(FORMS)}")
    logit_scale: str = option("matched", f"of z0_hat . embedding: {', '.join(LOGIT_SCALES)}")
    embedding_scale: bool = option(False, "learn a common scale of the target embeddings")
    source_copy: float = option(0.0, "width of the soft copy that denoising begins with; 0: none")
    length_loss: float = option(0.1, "weight of the loss of the length head")
    max_length_offset: int = option(128, "target length - source length, at most, either way")

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "noise_schedule", tuple(ABAR))
        one_of(self, "self_cond_form", FORMS)
        one_of(self, "logit_scale", LOGIT_SCALES)
        require(self, "latent_dim", self.latent_dim >= 1, "at least 1")
        require(self, "noise_factor", self.noise_factor > 0, "above 0")
        require(self, "self_cond_rate", 0 <= self.self_cond_rate <= 1, "in [0, 1]")
        copied = self.source_copy == 0 or 1e-3 <= self.source_copy < math.inf
        require(self, "source_copy", copied, "0, or at least 0.001 and finite")
        require(self, "length_loss", self.length_loss >= 0, "at least 0")
        require(self, "max_length_offset", self.max_length_offset >= 1, "at least 1")


TEMPERATURE = 0.25  # of ddpm: see docs/method.md
# a GPU replays batches of at most so many positions, both sides widened to a multiple of WIDEN
REPLAYED, WIDEN = 1024, 8


@dataclass(frozen=True)
class DiffusionDecoding:
    """Options of sampling."""

    steps: int = 5
    length_beam: int = 1
    noise_beam: int = 1
    solver: str = "ddpm"
    temperature: float | None = None  # scale of the noise that ddpm adds; None: TEMPERATURE
    time_grid: str = "log-snr"
    clamp: str = "expected"  # what the solver takes for z_0: the raw, nearest or expected embedding
    self_cond: str = "reuse"
    seed: int = 1
    early_exit: bool = False  # stop a sentence when a step leaves the tokens of it as they are
    history: bool = False
    diagnose: bool = False  # history with the gap between told and fresh estimates

    def __post_init__(self) -> None:
        require(self, "steps", 1 <= self.steps <= 100_000, "from 1 to 100000")
        require(self, "length_beam", self.length_beam >= 1, "at least 1")
        require(self, "noise_beam", self.noise_beam >= 1, "at least 1")
        one_of(self, "solver", tuple(SOLVERS))
        adds_noise = SOLVERS[self.solver].adds_noise
        if self.temperature is None:
            object.__setattr__(self, "temperature", TEMPERATURE if adds_noise else 0.0)
        require(self, "temperature", 0 <= self.temperature <= 1, "in [0, 1]")
        require(self, "temperature", adds_noise or self.temperature == 0, f"0 with {self.solver}")
        one_of(self, "time_grid", TIME_GRIDS)
        one_of(self, "clamp", FORMS)
        one_of(self, "self_cond", SELF_COND_MODES)
        if self.self_cond == "gold":
            require(self, "length_beam", self.length_beam == 1, "1 with self_cond gold")

    @property
    def candidates(self) -> int:
        return self.length_beam * self.noise_beam

    @property
    def is_fixed(self) -> bool:
        """Whether the operations are the same for all batches of a shape."""
        return not (self.early_exit or self.history or self.diagnose or self.self_cond == "gold")


class Difformer(Seq2SeqModel):
    """Encoder, denoising decoder, length head."""

    Config = DiffusionConfig
    Decoding = DiffusionDecoding
    default_select = "mbr"

    def __init__(self, config: DiffusionConfig, src: Vocabulary, tgt: Vocabulary) -> None:
        super().__init__(config, src, tgt)
        H, D = config.model_dim, config.latent_dim
        self.schedule = NoiseSchedule(config.noise_schedule, config.noise_factor)
        self.encoder = Encoder(src.size, config)
        self.decoder = Decoder(config)
        self.embedding = LatentEmbedding(
            tgt.size, D, config.logit_scale, config.label_smoothing, config.embedding_scale
        )
        self.latent_in = nn.Linear(2 * D, H)
        self.time_in = nn.Sequential(nn.Linear(H, H), nn.SiLU(), nn.Linear(H, H))
        self.latent_out = nn.Linear(H, D)
        self.length_head = nn.Linear(H, 2 * config.max_length_offset + 1)
        self.graphs: GraphCache | None = None
        initialise(self)
        nn.init.normal_(self.embedding.table.weight)

    def freeze(self, dtype: torch.dtype) -> None:
        """Prepare for decoding: on a GPU, batches of a shape that comes again are replayed."""
        if self.latent_in.weight.device.type == "cuda":
            self.graphs = GraphCache()

    def encode(self, src_tokens: Tensor, layout: Layout) -> Memory:
        return self.decoder.memory(self.encoder(src_tokens, layout), layout)

    def denoise(
        self, z_t: Tensor, t: Tensor, self_cond: Tensor, memory: Memory, layout: Layout
    ) -> Tensor:
        """Estimate z_0: the network f of docs/method.md.

        Args:
            z_t, self_cond: float [N, T, D].
            t: float [], [N, 1] or, per token, [N, T].
            memory: of B sentences, N a multiple of B.
            layout: of the N rows.

        Returns:
            float32 [N, T, D], zeros as padding.
        """
        x = self.latent_in(layout.flat(torch.cat([self.schedule.unit(z_t, t), self_cond], -1)))
        time = self.time_in(sinusoid(1000 * t, x.shape[-1]))
        time = time + positions(z_t.shape[1], x.shape[-1], x.device)
        x = x + layout.flat(time.expand(*z_t.shape[:2], -1))
        if self.config.source_copy:
            x = x + source_copy(memory, layout, self.config.source_copy)
        return layout.padded(self.latent_out(self.decoder(x, layout, memory)).float())

    def predict_lengths(self, memory: Memory) -> Tensor:
        """Return log-probabilities of target length - source length + max_length_offset."""
        pooled = memory.hidden.sum(1) / memory.layout.lengths[:, None]
        return F.log_softmax(self.length_head(pooled).float(), dim=-1)

    @property
    def self_conditioned(self) -> bool:
        """Whether the network has ever been told an estimate in training."""
        return self.config.self_cond_rate > 0

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
        """Choose the noise times and what the network is told; the systems differ here only.

        Args:
            denoiser: the network for this batch.
            z_0, noise: clean embeddings and standard normal, float [B, T, D].
            tgt_tokens: int64 [B, T].
            update: number of the present update.
        """
        t = draw_times(len(z_0), z_0.device)[:, None]
        z_t = self.schedule.add_noise(z_0, t, noise)
        return standard_self_conditioning(
            denoiser, denoiser.tell, z_t, t, self.config.self_cond_rate
        )

    def loss(self, batch: Batch, update: int) -> Loss:
        config: DiffusionConfig = self.config
        memory = self.encode(batch.src_tokens, batch.src_layout)
        denoiser = Denoiser(self, memory, batch.tgt_layout)
        z_0 = self.embedding(batch.tgt_tokens)
        noise = torch.randn_like(z_0)
        with torch.no_grad():
            given = self.condition(denoiser, z_0, noise, batch.tgt_tokens, update)
        # before torch 2.10 autocast would go on with casts of the weights that carry no gradient
        torch.clear_autocast_cache()
        z_t = given.z_t(self.schedule, z_0, noise)
        z0_hat = denoiser(z_t, given.told_t, given.self_cond)
        mse, anchor = self._token_losses(z0_hat, z_0, batch.tgt_tokens, denoiser.layout)
        limit = config.max_length_offset
        offset = batch.tgt_layout.lengths - memory.layout.lengths
        length = F.nll_loss(self.predict_lengths(memory), offset.clamp(-limit, limit) + limit)
        total = mse + anchor + config.length_loss * length
        return Loss(total, {"mse": mse, "anchor": anchor, "length": length})

    def losses_at(self, batch: Batch, t: float, gap: float | None) -> tuple[Tensor, Tensor]:
        """Return the mean losses (mse, anchor) of a token at one time, for a diagnosis.

        Args:
            batch: sentence pairs.
            t: noise time of all tokens.
            gap: the network is told its estimate at t + gap, at most 1, noised further from the
                same z_t. None: it is told nothing.
        """
        memory = self.encode(batch.src_tokens, batch.src_layout)
        denoiser = Denoiser(self, memory, batch.tgt_layout)
        z_0 = self.embedding(batch.tgt_tokens)
        now = torch.tensor(t, device=z_0.device)
        z_t = self.schedule.add_noise(z_0, now, torch.randn_like(z_0))
        told = torch.zeros_like(z_0)
        if gap is not None:
            later = now + gap
            stale = self.schedule.add_more_noise(z_t, now, later, torch.randn_like(z_0))
            told = denoiser.tell(denoiser(stale, later, told))
        z0_hat = denoiser(z_t, now, told)
        return self._token_losses(z0_hat, z_0, batch.tgt_tokens, denoiser.layout)

    def _token_losses(
        self, z0_hat: Tensor, z_0: Tensor, tgt_tokens: Tensor, layout: Layout
    ) -> tuple[Tensor, Tensor]:
        """Return the diffusion and the anchor loss, means over the tokens that are no padding."""
        estimate = layout.flat(z0_hat)
        gold, smoothing = layout.flat(tgt_tokens), self.config.label_smoothing
        anchor, _ = self.embedding.cross_entropy(estimate, gold, smoothing)
        return F.mse_loss(estimate, layout.flat(z_0)), anchor

    # decoding

    def decode(
        self,
        memory: Memory,
        sentences: Tensor,
        options: DiffusionDecoding,
        gold: Sequence[Sequence[int]] | None = None,
    ) -> list[list[Hypothesis]]:
        device = memory.hidden.device
        if options.self_cond == "gold":
            assert gold is not None
            lengths = torch.tensor([len(tokens) for tokens in gold], device=device)[:, None]
        else:
            lengths = self._length_candidates(memory, options.length_beam)
        # rows of one sentence are neighbours: its lengths, and for each length its noise draws
        per_sentence = lengths.shape[1] * options.noise_beam
        lengths = lengths.repeat_interleave(options.noise_beam, dim=1).flatten()
        longest = int(lengths.max())
        keys = draw_keys(options.seed, options.steps if options.temperature else 1).to(device)
        history: list[list[HistoryStep]] = [[] for _ in lengths]
        results = None
        if self.graphs is not None and options.is_fixed:
            results = self._replay(memory, lengths, longest, sentences, keys, options)
        if results is None:
            told = None
            if options.self_cond == "gold":
                told = self.embedding(pad(gold, self.tgt.pad)[0].to(device))
                told = told.repeat_interleave(per_sentence, dim=0)
            layout = Layout.of(torch.arange(longest, device=device) >= lengths[:, None])
            results = self._sample(memory, layout, sentences, keys, options, told, history)
        scores, tokens, nfe = (x.tolist() for x in results)
        answers = []
        for row, (length, cost) in enumerate(zip(lengths.tolist(), nfe, strict=True)):
            ids, token_scores = self._trim(tokens[row][:length], scores[row])
            score = sum(token_scores) / len(token_scores)
            answers.append(Hypothesis(ids, score, token_scores, cost, history[row]))
        return [
            sorted(answers[b : b + per_sentence], key=lambda h: -h.score)
            for b in range(0, len(answers), per_sentence)
        ]

    def _sample(
        self,
        memory: Memory,
        layout: Layout,
        sentences: Tensor,
        keys: Tensor,
        options: DiffusionDecoding,
        told: Tensor | None = None,
        history: list[list[HistoryStep]] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sample all candidates of B sentences.

        Args:
            memory: of the sentences.
            layout: of the N candidates.
            sentences: int64 [B], the number of each in the corpus.
            keys: see `Candidates`.
            options: how.
            told: the true embeddings, float [N, T, D], where the options ask for them.
            history: of each candidate, where the options ask for it.

        Returns:
            Log-probability and id of the best token at every position, both [N, T], and how many
            denoiser evaluations each candidate took, int64 [N].
        """
        count, device = len(layout.pad_mask) // len(sentences), sentences.device
        denoiser = Denoiser(self, memory, layout)
        running = Candidates(
            denoiser,
            torch.arange(len(layout.pad_mask), device=device),
            sentences.repeat_interleave(count),
            torch.arange(count, device=device).repeat(len(sentences)),
            keys,
        )

        def watch(t: Tensor, z: Tensor, z0_hat: Tensor) -> None:
            fresh = None
            if options.diagnose and self.self_conditioned:
                fresh = denoiser(z, t, denoiser.tell(denoiser(z, t, torch.zeros_like(z))))
            steps = self._history(float(t), z0_hat, fresh, denoiser.layout)
            for place, step in zip(running.places.tolist(), steps, strict=True):
                history[place].append(step)

        def go_on(z0_hat: Tensor) -> Tensor | None:
            tokens = self._logits(z0_hat, denoiser.layout).argmax(-1)
            return running.drop_unchanged(denoiser.layout.padded(tokens))

        clamp = None  # where it is what the network is told it is not computed twice
        if options.clamp != self.config.self_cond_form:
            clamp = partial(denoiser.project, form=options.clamp)
        z0_hat, nfe = sample(
            denoiser,
            self.schedule,
            partial(running.noise, self.config.latent_dim),
            options.steps,
            solver=options.solver,
            temperature=options.temperature,
            # a model that was trained without self-conditioning gets none
            self_cond=options.self_cond if self.self_conditioned else "none",
            gold=told,
            grid=options.time_grid,
            tell=denoiser.tell,
            clamp=clamp,
            watch=watch if options.history or options.diagnose else None,
            go_on=go_on if options.early_exit else None,
        )
        return *self._read(z0_hat, layout), nfe

    def _replay(
        self,
        memory: Memory,
        lengths: Tensor,
        longest: int,
        sentences: Tensor,
        keys: Tensor,
        options: DiffusionDecoding,
    ) -> tuple[Tensor, ...] | None:
        """Do what `_sample` does in one launch, or return None where that does not pay.

        It pays for a small batch, whose operations are faster than their launches, of a shape that
        comes again, for which both sides are widened.
        """
        assert self.graphs is not None
        S, T = (-(-length // WIDEN) * WIDEN for length in (memory.hidden.shape[1], longest))
        kind = lengths.device.type
        dtype = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        key = len(sentences), S, len(lengths), T, options, dtype
        if len(lengths) * T > REPLAYED or not self.graphs.has_seen(key):
            return None
        memory = memory.widened(S)

        def function(
            sentences: Tensor,
            keys: Tensor,
            tgt_pad_mask: Tensor,
            src_pad_mask: Tensor,
            hidden: Tensor,
            *keys_values: Tensor,
        ) -> tuple[Tensor, ...]:
            pairs = list(zip(keys_values[::2], keys_values[1::2], strict=True))
            dense = Memory(hidden, Layout(src_pad_mask, None, dense=True), pairs)
            layout = Layout(tgt_pad_mask, None, dense=True)
            return self._sample(dense, layout, sentences, keys, options)

        tgt_pad_mask = torch.arange(T, device=lengths.device) >= lengths[:, None]
        given = [sentences, keys, tgt_pad_mask, memory.layout.pad_mask, memory.hidden]
        return self.graphs.run(key, function, [*given, *chain(*memory.keys_values)])

    def _length_candidates(self, memory: Memory, beam: int) -> Tensor:
        """Return the most likely target lengths of each sentence, int64 [B, beam], all >= 1.

        Raises:
            FastdissError: a source of one token has not as many.
        """
        limit = self.config.max_length_offset
        src_lengths = memory.layout.lengths[:, None]
        log_probs = self.predict_lengths(memory)
        reachable = src_lengths + torch.arange(-limit, limit + 1, device=src_lengths.device) >= 1
        log_probs = log_probs.masked_fill(~reachable, float("-inf"))
        if beam > limit + 1:
            raise FastdissError(
                f"length_beam {beam}: a model with max_length_offset {limit} tries at most "
                f"{limit + 1} lengths"
            )
        return src_lengths + log_probs.topk(beam, dim=1).indices - limit

    def _read(self, z0_hat: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Return log-probability and id of the best token at every position, both [N, T]."""
        logits = self._logits(z0_hat, layout)
        best, tokens = logits.max(dim=-1)
        return layout.padded(best - logits.logsumexp(dim=-1)), layout.padded(tokens)

    def _logits(self, z0_hat: Tensor, layout: Layout) -> Tensor:
        """Score all tokens that an answer may have for estimates [N, T, D]; float32 [P, V]."""
        logits = self.embedding.logits(layout.flat(z0_hat))
        logits[:, self.tgt.bos] = logits[:, self.tgt.pad] = float("-inf")
        return logits

    def _history(
        self, time: float, z0_hat: Tensor, fresh: Tensor | None, layout: Layout
    ) -> list[HistoryStep]:
        """Return what each row looks like at one step; means are over its own positions."""
        scores, tokens = self._read(z0_hat, layout)
        own = ~layout.pad_mask
        lengths = own.sum(1)

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
        network = {**sizes, "latent_dim": 64 if size == "tiny" else 128, "source_copy": 1.0}
        register(f"{name}_{size}", family, description, **network)


register_sizes("difformer", Difformer, "continuous diffusion, standard self-conditioning")
