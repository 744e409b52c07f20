"""Decoding with a diffusion model: length prediction, candidates, sampling, reading off answers."""
# B sentences, N rows (B x candidates), S source length, T target length, P tokens of a batch,
# D latent, V vocabulary

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fastdiss_cli.config import one_of, require
from fastdiss_cli.data.batching import pad
from fastdiss_cli.data.layout import Layout
from fastdiss_cli.diffusion.sampler import SELF_COND_MODES, sample
from fastdiss_cli.diffusion.schedule import TIME_GRIDS, NoiseSchedule
from fastdiss_cli.diffusion.solvers import SOLVERS
from fastdiss_cli.models.candidates import Candidates
from fastdiss_cli.models.denoiser import Denoiser
from fastdiss_cli.models.embedding import FORMS, LatentEmbedding
from fastdiss_cli.models.graphs import GraphCache
from fastdiss_cli.models.layers import Memory
from fastdiss_cli.models.registry import HistoryStep, Hypothesis, Seq2SeqModel, Vocabulary
from fastdiss_cli.randomness import draw_keys

TEMPERATURE = 0.25  # of ddpm: see docs/method.md
# on a GPU, batches of up to REPLAYED positions on either side and runs of up to REPLAYED_STEPS are
# captured as graphs; both sides are padded to a multiple of WIDEN, so that shapes come again
REPLAYED, REPLAYED_STEPS, WIDEN = 1024, 32, 8


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
    early_exit: bool = False  # stop a sentence when two steps are sure of the same tokens
    history: bool = False
    diagnose: bool = False  # history with the gap between stale and fresh estimates

    def __post_init__(self) -> None:
        require(self, "steps", 1 <= self.steps <= 10_000, "from 1 to 10000")
        require(self, "length_beam", 1 <= self.length_beam <= 1000, "from 1 to 1000")
        require(self, "noise_beam", 1 <= self.noise_beam <= 1000, "from 1 to 1000")
        one_of(self, "solver", tuple(SOLVERS))
        adds_noise = getattr(SOLVERS[self.solver], "adds_noise", None)
        require(self, "solver", adds_noise is not None, "a subclass of diffusion.solvers.Solver")
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


class SampledModel(Seq2SeqModel):
    """The decoding half of `Difformer`, which adds the network and its training.

    Attributes:
        schedule: the noise levels.
        embedding: the target embeddings.
        graphs: the captured CUDA graphs; None on a CPU, and before the model is frozen.
    """

    Decoding = DiffusionDecoding
    default_select = "mbr"
    schedule: NoiseSchedule
    embedding: LatentEmbedding

    def __init__(self, config: Any, src: Vocabulary, tgt: Vocabulary) -> None:
        super().__init__(config, src, tgt)
        self.graphs: GraphCache | None = None

    def freeze(self, dtype: torch.dtype) -> None:
        """Prepare for decoding: on a GPU, batches of a repeated shape are replayed as graphs."""
        if self.device.type == "cuda":
            self.graphs = GraphCache()

    @abstractmethod
    def predict_lengths(self, memory: Memory) -> Tensor:
        """Return log-probabilities of target length - source length + max_length_offset."""

    def check_decoding(self, options: DiffusionDecoding) -> None:
        most = self.config.max_length_offset + 1  # a source of one token has no more lengths
        reason = f"at most {most}, one more than the model's max_length_offset"
        require(options, "length_beam", options.length_beam <= most, reason)

    @property
    def self_conditioned(self) -> bool:
        """Whether the network was trained with self-conditioning at all."""
        return self.config.self_cond_rate > 0

    def decode(
        self,
        memory: Memory,
        seeds: Tensor,
        options: DiffusionDecoding,
        gold: Sequence[Sequence[int]] | None = None,
    ) -> list[list[Hypothesis]]:
        device = memory.hidden.device
        if options.self_cond == "gold":
            assert gold is not None
            lengths = torch.tensor([len(tokens) for tokens in gold], device=device)[:, None]
            weights = torch.ones(lengths.shape)
        else:
            lengths, weights = self._length_candidates(memory, options.length_beam)
        # rows are grouped by sentence, then by length, then by noise draw
        per_sentence = lengths.shape[1] * options.noise_beam
        lengths, weights = (
            x.repeat_interleave(options.noise_beam, dim=1).flatten() for x in (lengths, weights)
        )
        longest = int(lengths.max())
        noise_keys = draw_keys(options.seed, options.steps if options.temperature else 1).to(device)
        history: list[list[HistoryStep]] = [[] for _ in lengths]
        results = None
        if self.graphs is not None and options.is_fixed:
            results = self._replay(memory, lengths, longest, seeds, noise_keys, options)
        if results is None:
            gold_z0 = None
            if options.self_cond == "gold":
                gold_z0 = self.embedding(pad(gold, self.tgt.pad)[0].to(device))
                gold_z0 = gold_z0.repeat_interleave(per_sentence, dim=0)
            layout = Layout.of(torch.arange(longest, device=device) >= lengths[:, None])
            results = self._sample(memory, layout, seeds, noise_keys, options, gold_z0, history)
        scores, tokens, nfe = (x.tolist() for x in results)
        answers = []
        columns = lengths.tolist(), weights.tolist(), nfe
        for row, (length, weight, cost) in enumerate(zip(*columns, strict=True)):
            ids, token_scores = self.trim(tokens[row][:length], scores[row])
            score = sum(token_scores) / len(token_scores)
            steps = history[row]
            answers.append(Hypothesis(ids, score, token_scores, cost, steps, weight=weight))
        return [
            sorted(answers[b : b + per_sentence], key=lambda h: -h.score)
            for b in range(0, len(answers), per_sentence)
        ]

    def _sample(
        self,
        memory: Memory,
        layout: Layout,
        seeds: Tensor,
        noise_keys: Tensor,
        options: DiffusionDecoding,
        gold_z0: Tensor | None = None,
        history: list[list[HistoryStep]] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sample all candidates of B sentences.

        Args:
            memory: of the sentences.
            layout: of the N candidates.
            seeds: int64 [B], of the noise of each sentence.
            noise_keys: see `Candidates`.
            options: how.
            gold_z0: the true embeddings, float [N, T, D], if the options ask for them.
            history: that of each candidate, filled if the options ask for it.

        Returns:
            Log-probability and id of the best token at every position, both [N, T], and how many
            denoiser evaluations each candidate took, int64 [N].
        """
        count, device = len(layout.pad_mask) // len(seeds), seeds.device
        candidates = Candidates(
            Denoiser(self, memory, layout),
            options,
            seeds.repeat_interleave(count),
            torch.arange(count, device=device).repeat(len(seeds)),
            noise_keys,
            gold_z0,
            history or [],
        )
        # a model that was trained without self-conditioning gets none
        self_cond = options.self_cond if self.self_conditioned else "none"
        z0_hat, nfe = sample(
            candidates,
            self.schedule,
            options.steps,
            options.solver,
            options.time_grid,
            self_cond,
            options.temperature,
        )
        return *self.read(z0_hat, layout), nfe

    def _replay(
        self,
        memory: Memory,
        lengths: Tensor,
        longest: int,
        seeds: Tensor,
        noise_keys: Tensor,
        options: DiffusionDecoding,
    ) -> tuple[Tensor, ...] | None:
        """Replay `_sample` in one launch, or return None where that does not pay.

        It pays for a small batch, whose operations take less time than their launches, and whose
        shape is repeated; to that end both sides are padded to a multiple of `WIDEN`.
        """
        assert self.graphs is not None
        S, T = (-(-length // WIDEN) * WIDEN for length in (memory.hidden.shape[1], longest))
        how = replace(options, seed=0)  # the seed enters by `noise_keys`, which are an input
        shape = len(seeds), S, len(lengths), T, how
        small = max(len(seeds) * S, len(lengths) * T) <= REPLAYED
        if not small or options.steps > REPLAYED_STEPS or not self.graphs.has_seen(shape):
            return None
        memory = memory.widened(S)

        def function(
            seeds: Tensor,
            noise_keys: Tensor,
            tgt_pad_mask: Tensor,
            src_pad_mask: Tensor,
            hidden: Tensor,
            *keys_values: Tensor,
        ) -> tuple[Tensor, ...]:
            pairs = list(zip(keys_values[::2], keys_values[1::2], strict=True))
            dense = Memory(hidden, Layout(src_pad_mask, None, dense=True), pairs)
            layout = Layout(tgt_pad_mask, None, dense=True)
            return self._sample(dense, layout, seeds, noise_keys, options)

        tgt_pad_mask = torch.arange(T, device=lengths.device) >= lengths[:, None]
        given = [seeds, noise_keys, tgt_pad_mask, memory.layout.pad_mask, memory.hidden]
        return self.graphs.run(shape, function, [*given, *chain(*memory.keys_values)])

    def _length_candidates(self, memory: Memory, beam: int) -> tuple[Tensor, Tensor]:
        """Return the most likely target lengths of each sentence and their probabilities.

        Both are [B, beam], int64 and float; lengths are at least 1.
        """
        limit = self.config.max_length_offset
        src_lengths = memory.layout.lengths[:, None]
        log_probs = self.predict_lengths(memory)
        reachable = src_lengths + torch.arange(-limit, limit + 1, device=src_lengths.device) >= 1
        log_probs = log_probs.masked_fill(~reachable, float("-inf"))
        best = log_probs.topk(beam, dim=1)
        return src_lengths + best.indices - limit, best.values.exp()

    def read(self, z0_hat: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Return log-probability and id of the best token at every position, both [N, T]."""
        logits = self.embedding.logits(layout.flat(z0_hat))
        logits[:, self.tgt.bos] = logits[:, self.tgt.pad] = float("-inf")  # in no answer
        best, tokens = logits.max(dim=-1, keepdim=True)
        # logsumexp would look for the maximum again, and copy all logits
        log_probs = -logits.sub_(best).exp_().sum(-1).log()
        return layout.padded(log_probs), layout.padded(tokens.squeeze(-1))

    def trim(self, tokens: list[int], values: list[float]) -> tuple[list[int], list[float]]:
        """Truncate a row before its first eos; the values keep the one of the eos."""
        end = tokens.index(self.tgt.eos) if self.tgt.eos in tokens else len(tokens)
        return tokens[:end], values[: min(end + 1, len(tokens))]
