"""The Transformer layers that all systems share: pre-norm, fused projections, cached memory."""
# B sentences, N rows (B x candidates), S source length, T target length, H model, h heads

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiss_cli.config import require


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes of the encoder-decoder."""

    model_dim: int = 256
    ffn_dim: int = 1024
    heads: int = 4
    encoder_layers: int = 4
    decoder_layers: int = 4
    dropout: float = 0.1
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        for key in ("model_dim", "ffn_dim", "heads", "encoder_layers", "decoder_layers"):
            require(self, key, getattr(self, key) >= 1, "at least 1")
        require(self, "model_dim", self.model_dim % 2 == 0, "even")
        require(self, "heads", self.model_dim % self.heads == 0, "a divisor of model_dim")
        require(self, "dropout", 0 <= self.dropout < 1, "in [0, 1)")
        require(self, "label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)")


SIZES: dict[str, dict[str, Any]] = {
    "tiny": dict(model_dim=128, ffn_dim=512, heads=2, encoder_layers=2, decoder_layers=2),
    "small": dict(model_dim=256, ffn_dim=1024, heads=4, encoder_layers=4, decoder_layers=4),
    "iwslt_de_en": dict(
        model_dim=512, ffn_dim=1024, heads=4, encoder_layers=6, decoder_layers=6, dropout=0.3
    ),
    "base": dict(model_dim=512, ffn_dim=2048, heads=8, encoder_layers=6, decoder_layers=6),
}


@dataclass
class Memory:
    """The encoded sources, with every decoder layer's keys and values computed once.

    Attributes:
        hidden: float [B, S, H].
        pad_mask: bool [B, S], true on padding.
        keys_values: for each decoder layer, two float [B, h, S, H/h].
    """

    hidden: Tensor
    pad_mask: Tensor
    keys_values: list[tuple[Tensor, Tensor]]

    def select(self, rows: Tensor) -> Memory:
        """Return the memory of some sentences; int64 indices into B."""
        return Memory(
            self.hidden[rows],
            self.pad_mask[rows],
            [(key[rows], value[rows]) for key, value in self.keys_values],
        )


class Attention(nn.Module):
    """Multi-head attention over given keys and values."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Project [B, S, H] to keys and values, each [B, h, S, H/h]."""
        key, value = self.key_value(x).chunk(2, dim=-1)
        return self._split(key), self._split(value)

    def forward(
        self,
        x: Tensor,
        keys_values: tuple[Tensor, Tensor],
        visible: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        """Attend from [N, T, H] to keys and values of B sentences; visible: bool [B, 1, 1, S].

        With N a multiple of B, the candidates of a sentence (neighbouring rows) are folded into
        its query length, so that they share its keys and values without a copy.
        """
        key, value = keys_values
        query = self._split(self.query(x).reshape(key.shape[0], -1, x.shape[-1]))
        attended = F.scaled_dot_product_attention(
            query, key, value, attn_mask=visible, is_causal=causal
        )
        return self.out(attended.transpose(1, 2).reshape(x.shape))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Layer(nn.Module):
    """One pre-norm Transformer layer: self-attention, cross-attention in a decoder, and FFN."""

    def __init__(self, config: NetworkConfig, cross: bool) -> None:
        super().__init__()
        dim = config.model_dim
        self.self_norm, self.self_attention = nn.LayerNorm(dim), Attention(dim, config.heads)
        self.cross_norm = nn.LayerNorm(dim) if cross else None
        self.cross_attention = Attention(dim, config.heads) if cross else None
        self.ffn_norm = nn.LayerNorm(dim)
        self.ffn_in = nn.Linear(dim, config.ffn_dim)
        self.ffn_out = nn.Linear(config.ffn_dim, dim)
        self.dropout = config.dropout

    def forward(
        self,
        x: Tensor,
        visible: Tensor | None = None,
        causal: bool = False,
        memory: tuple[Tensor, Tensor] | None = None,
        memory_visible: Tensor | None = None,
        cache: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the layer's output [N, T, H] and its self-attention keys and values.

        With ``cache``, ``x`` holds the newest positions only and attends to the cache as well.
        """
        normed = self.self_norm(x)
        keys_values = self.self_attention.keys_values(normed)
        if cache is not None:
            keys_values = (
                torch.cat([cache[0], keys_values[0]], dim=2),
                torch.cat([cache[1], keys_values[1]], dim=2),
            )
        x = x + self._drop(self.self_attention(normed, keys_values, visible, causal))
        if self.cross_attention is not None and memory is not None:
            x = x + self._drop(self.cross_attention(self.cross_norm(x), memory, memory_visible))
        hidden = self._drop(F.relu(self.ffn_in(self.ffn_norm(x))))
        return x + self._drop(self.ffn_out(hidden)), keys_values

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class Encoder(nn.Module):
    """Token embedding, sinusoidal positions and the encoder layers.

    Args:
        vocab_size: source vocabulary.
        pad: its padding id.
        config: sizes.
    """

    def __init__(self, vocab_size: int, pad: int, config: NetworkConfig) -> None:
        super().__init__()
        self.pad, self.dropout = pad, config.dropout
        self.embedding = nn.Embedding(vocab_size, config.model_dim)
        self.layers = nn.ModuleList(
            [Layer(config, cross=False) for _ in range(config.encoder_layers)]
        )
        self.norm = nn.LayerNorm(config.model_dim)

    def forward(self, src_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Encode int64 [B, S] to float [B, S, H] and the padding mask [B, S]."""
        pad_mask = src_tokens == self.pad
        x = self.embedding(src_tokens) * math.sqrt(self.embedding.embedding_dim)
        x = x + positions(x.shape[1], x.shape[2], x.device)
        x = F.dropout(x, self.dropout, self.training)
        for layer in self.layers:
            x, _ = layer(x, visible(pad_mask))
        return self.norm(x), pad_mask


class Decoder(nn.Module):
    """The decoder layers, over an input that the model has embedded."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.layers = nn.ModuleList(
            [Layer(config, cross=True) for _ in range(config.decoder_layers)]
        )
        self.norm = nn.LayerNorm(config.model_dim)

    def memory(self, hidden: Tensor, pad_mask: Tensor) -> Memory:
        """Compute every layer's cross-attention keys and values."""
        keys_values = [layer.cross_attention.keys_values(hidden) for layer in self.layers]
        return Memory(hidden, pad_mask, keys_values)

    def forward(
        self, x: Tensor, memory: Memory, pad_mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """Decode [N, T, H] against a memory of B sentences; pad_mask: bool [N, T]."""
        x = F.dropout(x, self.dropout, self.training)
        seen = None if pad_mask is None else visible(pad_mask)
        memory_seen = visible(memory.pad_mask)
        for layer, keys_values in zip(self.layers, memory.keys_values, strict=True):
            x, _ = layer(x, seen, causal, keys_values, memory_seen)
        return self.norm(x)

    def step(
        self, x: Tensor, memory: Memory, caches: list[tuple[Tensor, Tensor] | None]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor] | None]]:
        """Decode one more position [N, 1, H]; return it and the grown caches."""
        grown: list[tuple[Tensor, Tensor] | None] = []
        memory_seen = visible(memory.pad_mask)
        for layer, keys_values, cache in zip(self.layers, memory.keys_values, caches, strict=True):
            x, cache = layer(x, None, False, keys_values, memory_seen, cache)
            grown.append(cache)
        return self.norm(x), grown


def visible(pad_mask: Tensor) -> Tensor:
    """Return the attention mask of a padding mask: bool [B, 1, 1, S], true where to look."""
    return ~pad_mask[:, None, None, :]


def positions(length: int, dim: int, device: torch.device, start: int = 0) -> Tensor:
    """Return sinusoidal position embeddings, float [length, dim] (Vaswani et al. 2017, 3.5)."""
    return sinusoid(torch.arange(start, start + length, device=device), dim)


def sinusoid(x: Tensor, dim: int) -> Tensor:
    """Embed numbers of any shape as sines and cosines: float [..., dim], dim even."""
    half = torch.arange(dim // 2, device=x.device, dtype=torch.float32)
    angles = x[..., None].float() * torch.exp(-math.log(10_000.0) * half / (dim // 2))
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def initialise(module: nn.Module) -> None:
    """Initialise weights as fairseq does: Xavier matrices, zero biases, N(0, 1/dim) embeddings."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.xavier_uniform_(child.weight)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
        elif isinstance(child, nn.Embedding):
            nn.init.normal_(child.weight, std=child.embedding_dim**-0.5)
