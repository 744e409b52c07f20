"""The autoregressive Transformer: reference, distillation teacher and reranker.

Source: Vaswani et al. 2017, "Attention is all you need"; pre-norm.
"""
# B sentences, K beam, N rows (B x K), S source length, T target length, P tokens of a
# batch, V vocabulary

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiss_cli.config import option
from fastdiss_cli.data.batching import Batch, pad
from fastdiss_cli.data.layout import Layout
from fastdiss_cli.models import SIZES
from fastdiss_cli.models.beam_search import BeamDecoding, beam_search
from fastdiss_cli.models.cross_entropy import linear_cross_entropy
from fastdiss_cli.models.layers import (
    Cache,
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

    share_embeddings: bool = option(
        True, "share one table between source, target and output if vocabularies are equal"
    )


class Transformer(Seq2SeqModel):
    """Encoder, causal decoder, tied output layer."""

    Config = TransformerConfig
    Decoding = BeamDecoding

    def __init__(self, config: TransformerConfig, src: Vocabulary, tgt: Vocabulary) -> None:
        super().__init__(config, src, tgt)
        self.encoder = Encoder(src.size, config)
        self.decoder = Decoder(config)
        self.embedding = nn.Embedding(tgt.size, config.model_dim)
        self.output = nn.Linear(config.model_dim, tgt.size, bias=False)
        initialise(self)
        self.output.weight = self.embedding.weight
        if config.share_embeddings and src == tgt:
            self.encoder.embedding = self.embedding

    def encode(self, src_tokens: Tensor, layout: Layout) -> Memory:
        return self.decoder.memory(self.encoder(src_tokens, layout), layout)

    def embed(self, tokens: Tensor, start: int = 0) -> Tensor:
        """Embed int64 [N, T] whose first column is at position ``start``; float [N, T, H]."""
        x = self.embedding(tokens) * math.sqrt(self.embedding.embedding_dim)
        return x + positions(x.shape[1], x.shape[2], x.device, start)

    def teach(self, memory: Memory, tgt_tokens: Tensor, layout: Layout) -> Tensor:
        """Decode the P non-padding tokens of [N, T] under teacher forcing; float [P, H].

        As in fairseq the decoder starts from eos.
        """
        given = tgt_tokens.roll(1, dims=1)
        given[:, 0] = self.tgt.eos
        return self.decoder(layout.flat(self.embed(given)), layout, memory, causal=True)

    def logits(self, memory: Memory, tgt_tokens: Tensor, layout: Layout) -> Tensor:
        """Score every token at the P positions of `teach`; float32 [P, V]."""
        return self.output(self.teach(memory, tgt_tokens, layout)).float()

    def loss(self, batch: Batch, update: int) -> Loss:
        layout, memory = batch.tgt_layout, self.encode(batch.src_tokens, batch.src_layout)
        hidden = self.teach(memory, batch.tgt_tokens, layout)
        gold, smoothing = layout.flat(batch.tgt_tokens), self.config.label_smoothing
        total, nll = linear_cross_entropy(hidden, self.output.weight, None, gold, smoothing)
        return Loss(total, {"nll": nll})

    def log_likelihood(self, memory: Memory, answers: Sequence[Sequence[int]]) -> Tensor:
        """Return the mean log-probability per token of each answer, including eos; float [N].

        Args:
            memory: of B sentences.
            answers: N answers without eos, grouped by sentence; N is a multiple of B.
        """
        rows = [[*tokens, self.tgt.eos] for tokens in answers]
        tokens, layout = (x.to(memory.hidden.device) for x in pad(rows, self.tgt.pad))
        gold = layout.flat(tokens)
        nll = F.cross_entropy(self.logits(memory, tokens, layout), gold, reduction="none")
        return -layout.padded(nll).sum(1) / layout.lengths

    def decode(
        self,
        memory: Memory,
        seeds: Tensor,
        options: BeamDecoding,
        gold: Sequence[Sequence[int]] | None = None,
    ) -> list[list[Hypothesis]]:
        caches = [Cache() for _ in self.decoder.layers]

        def step(tokens: Tensor, position: int, memory: Memory) -> Tensor:
            layout = Layout(torch.zeros_like(tokens, dtype=torch.bool), None)
            x = self.embed(tokens, position).squeeze(1)
            logits = self.output(self.decoder(x, layout, memory, caches=caches)).float()
            logits[:, self.tgt.bos] = logits[:, self.tgt.pad] = float("-inf")
            return logits

        return beam_search(step, caches, memory, self.tgt.eos, options)


for size, sizes in SIZES.items():
    register(f"transformer_{size}", Transformer, "autoregressive", **sizes)
