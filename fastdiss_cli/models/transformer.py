"""The autoregressive Transformer: reference, distillation teacher and reranker.

Source: Vaswani et al. 2017, "Attention is all you need"; pre-norm.
"""
# B sentences, K beam, N rows (B x K), S source length, T target length, V vocabulary

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiss_cli.config import require
from fastdiss_cli.data.batching import Batch, pad
from fastdiss_cli.models.beam_search import beam_search
from fastdiss_cli.models.layers import (
    SIZES,
    Decoder,
    Encoder,
    Memory,
    NetworkConfig,
    initialise,
    positions,
)
from fastdiss_cli.models.registry import Hypothesis, Loss, Seq2SeqModel, Vocabulary, register


@dataclass(frozen=True)
class TransformerConfig(NetworkConfig):
    """Options of the network."""

    share_embeddings: bool = True  # one table for source, target and output if vocabularies agree


@dataclass(frozen=True)
class BeamDecoding:
    """Options of beam search; a beam of 1 is greedy search."""

    beam: int = 5
    lenpen: float = 1.0  # hypotheses are compared by log-probability / length ** lenpen
    max_len_a: float = 0.0  # a hypothesis has at most max_len_a * S + max_len_b tokens
    max_len_b: int = 200
    min_len: int = 1

    def __post_init__(self) -> None:
        require(self, "beam", self.beam >= 1, "at least 1")
        require(self, "max_len_a", self.max_len_a >= 0, "at least 0")
        require(self, "max_len_b", self.max_len_b >= 1, "at least 1")
        require(self, "min_len", self.min_len >= 0, "at least 0")

    @property
    def candidates(self) -> int:
        return self.beam


class Transformer(Seq2SeqModel):
    """Encoder, causal decoder, tied output layer."""

    Config = TransformerConfig
    Decoding = BeamDecoding

    def __init__(self, config: TransformerConfig, src: Vocabulary, tgt: Vocabulary) -> None:
        super().__init__(config, src, tgt)
        self.encoder = Encoder(src.size, src.pad, config)
        self.decoder = Decoder(config)
        self.embedding = nn.Embedding(tgt.size, config.model_dim)
        initialise(self)
        if config.share_embeddings and src == tgt:
            self.encoder.embedding = self.embedding

    def encode(self, src_tokens: Tensor) -> Memory:
        return self.decoder.memory(*self.encoder(src_tokens))

    def embed(self, tokens: Tensor, start: int = 0) -> Tensor:
        """Embed int64 [N, T] whose first column is at position ``start``; float [N, T, H]."""
        x = self.embedding(tokens) * math.sqrt(self.embedding.embedding_dim)
        return x + positions(x.shape[1], x.shape[2], x.device, start)

    def logits(self, memory: Memory, tgt_tokens: Tensor) -> Tensor:
        """Score every next token under teacher forcing; float32 [N, T, V].

        As in fairseq the decoder starts from eos. Padding is on the right, where causal
        attention cannot see it.
        """
        given = tgt_tokens.roll(1, dims=1)
        given[:, 0] = self.tgt.eos
        hidden = self.decoder(self.embed(given), memory, causal=True)
        return F.linear(hidden, self.embedding.weight).float()

    def loss(self, batch: Batch, update: int) -> Loss:
        real = ~batch.tgt_pad_mask
        logits = self.logits(self.encode(batch.src_tokens), batch.tgt_tokens)[real]
        gold = batch.tgt_tokens[real]
        total = F.cross_entropy(logits, gold, label_smoothing=self.config.label_smoothing)
        with torch.no_grad():
            nll = F.cross_entropy(logits, gold)
        return Loss(total, {"nll": nll})

    def log_likelihood(self, memory: Memory, answers: Sequence[Sequence[int]]) -> Tensor:
        """Return the mean log-probability of a token of each answer, eos included; float [N].

        Args:
            memory: of B sentences.
            answers: N answers without eos, those of a sentence as neighbours; N a multiple of B.
        """
        rows = [[*tokens, self.tgt.eos] for tokens in answers]
        tokens, pad_mask = (x.to(memory.hidden.device) for x in pad(rows, self.tgt.pad))
        log_probs = F.log_softmax(self.logits(memory, tokens), dim=-1)
        gold = log_probs.gather(-1, tokens[..., None]).squeeze(-1).masked_fill(pad_mask, 0)
        return gold.sum(1) / (~pad_mask).sum(1)

    def decode(
        self,
        memory: Memory,
        sentences: Tensor,
        options: BeamDecoding,
        gold: Sequence[Sequence[int]] | None = None,
    ) -> list[list[Hypothesis]]:
        def step(tokens: Tensor, position: int, memory: Memory, caches: list) -> tuple:
            hidden, caches = self.decoder.step(self.embed(tokens, position), memory, caches)
            logits = F.linear(hidden[:, 0], self.embedding.weight).float()
            logits[:, [self.tgt.pad, self.tgt.bos]] = float("-inf")
            return F.log_softmax(logits, dim=-1), caches

        return beam_search(step, memory, self.tgt.eos, options)


for size, sizes in SIZES.items():
    register(f"transformer_{size}", Transformer, "autoregressive, beam search", **sizes)
