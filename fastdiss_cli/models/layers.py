"""The Transformer layers shared by all systems: pre-norm, fused projections, cached memory."""
# B sentences, N rows (B x candidates), S source length, T target length, P tokens (without
# padding) of a batch, H model, h heads

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiss_cli.config import option, require
from fastdiss_cli.data.layout import Layout


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes of the encoder-decoder."""

    model_dim: int = option(256, "width of the layers")
    ffn_dim: int = option(1024, "width inside the feed-forward blocks")
    heads: int = option(4, "attention heads, a divisor of model_dim")
    encoder_layers: int = option(4, "layers of the encoder")
    decoder_layers: int = option(4, "layers of the decoder")
    dropout: float = option(0.1, "dropout rate")
    label_smoothing: float = option(0.1, "label smoothing of the cross-entropy")

    def __post_init__(self) -> None:
        for key in ("model_dim", "ffn_dim", "heads", "encoder_layers", "decoder_layers"):
            require(self, key, getattr(self, key) >= 1, "at least 1")
        require(self, "model_dim", self.model_dim % 2 == 0, "even")
        require(self, "heads", self.model_dim % self.heads == 0, "a divisor of model_dim")
        require(self, "dropout", 0 <= self.dropout < 1, "in [0, 1)")
        require(self, "label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)")


@dataclass
class Memory:
    """The encoded sources, with the cross-attention keys and values of every decoder layer.

    Attributes:
        hidden: float [B, S, H], zeros as padding.
        layout: of the sources.
        keys_values: for each decoder layer, two float [B, h, S, H/h].
    """

    hidden: Tensor
    layout: Layout
    keys_values: list[tuple[Tensor, Tensor]]

    def widened(self, length: int) -> Memory:
        """Return the same memory, padded from S to ``length`` positions."""
        more = length - self.hidden.shape[1]

        def wide(x: Tensor) -> Tensor:
            return F.pad(x, (0, 0, 0, more))

        pad_mask = F.pad(self.layout.pad_mask, (0, more), value=True)
        pairs = [(wide(key), wide(value)) for key, value in self.keys_values]
        return Memory(wide(self.hidden), Layout(pad_mask, None, dense=True), pairs)

    def select(self, rows: Tensor) -> Memory:
        """Return the memory of some sentences; int64 indices into B."""
        return Memory(
            self.hidden[rows],
            self.layout.select(rows),
            [(key[rows], value[rows]) for key, value in self.keys_values],
        )


class Cache:
    """The self-attention keys and values of all positions so far, in a buffer with free ones."""

    def __init__(self) -> None:
        self.buffer: Tensor | None = None  # [2, N, h, capacity, H/h]
        self.length = 0

    def append(self, key_value: Tensor) -> Tensor:
        """Add one position [2, N, h, 1, H/h]; return all of them [2, N, h, length, H/h]."""
        if self.buffer is None or self.length == self.buffer.shape[3]:
            two, rows, heads, _, dim = key_value.shape
            grown = key_value.new_empty(two, rows, heads, max(16, 2 * self.length), dim)
            if self.buffer is not None:
                grown[:, :, :, : self.length] = self.buffer
            self.buffer = grown
        self.buffer[:, :, :, self.length] = key_value[:, :, :, 0]
        self.length += 1
        return self.buffer[:, :, :, : self.length]

    def select(self, rows: Tensor) -> None:
        """Keep some rows, in the order given; int64 indices into N, repeats allowed."""
        assert self.buffer is not None
        # with its free positions: copying whole rows is faster than copying parts of them
        self.buffer = self.buffer.index_select(1, rows)


class SelfAttention(nn.Module):
    """Multi-head attention of a batch to itself."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, layout: Layout, causal: bool = False) -> Tensor:
        """Attend among the tokens [P, H] of each row; causal attention never sees padding."""
        query, key, value = self._split(layout.padded(self.query_key_value(x)))
        attn_mask = None if causal else layout.attn_mask
        attended = attend(query, key, value, attn_mask, causal)
        return self.out(layout.flat(attended.transpose(1, 2).flatten(2)))

    def step(self, x: Tensor, cache: Cache) -> Tensor:
        """Attend from the newest position [N, H] of each row to itself and all before it."""
        parts = self._split(self.query_key_value(x)[:, None])
        key, value = cache.append(parts[1:])
        return self.out(attend(parts[0], key, value).flatten(1))

    def _split(self, x: Tensor) -> Tensor:
        """Split [N, T, 3H] into queries, keys and values of every head, [3, N, h, T, H/h]."""
        return x.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)


class CrossAttention(nn.Module):
    """Multi-head attention to keys and values that are computed once and used in every step."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    def keys_values(self, hidden: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Project the tokens [P, H] of B sentences to keys and values, each [B, h, S, H/h]."""
        key, value = layout.padded(self.key_value(hidden)).chunk(2, dim=-1)
        return self._split(key), self._split(value)

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        keys_values: tuple[Tensor, Tensor],
        attn_mask: Tensor | None,
    ) -> Tensor:
        """Attend from the tokens [P, H] of N rows to B sentences; attn_mask: bool [B, 1, 1, S].

        With N a multiple of B, the candidates of a sentence (neighbouring rows) are folded into
        its query length, so that they share its keys and values without a copy.
        """
        key, value = keys_values
        rows = layout.padded(self.query(x))
        query = self._split(rows.reshape(len(key), -1, rows.shape[-1]))
        attended = attend(query, key, value, attn_mask)
        return self.out(layout.flat(attended.transpose(1, 2).reshape(rows.shape)))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Layer(nn.Module):
    """One pre-norm Transformer layer: self-attention, cross-attention in a decoder, and FFN."""

    def __init__(self, config: NetworkConfig, cross: bool) -> None:
        super().__init__()
        dim = config.model_dim
        self.self_norm, self.self_attention = nn.LayerNorm(dim), SelfAttention(dim, config.heads)
        self.cross_norm = nn.LayerNorm(dim) if cross else None
        self.cross_attention = CrossAttention(dim, config.heads) if cross else None
        self.ffn_norm = nn.LayerNorm(dim)
        self.ffn_in = nn.Linear(dim, config.ffn_dim)
        self.ffn_out = nn.Linear(config.ffn_dim, dim)
        self.dropout = config.dropout

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        causal: bool = False,
        memory: tuple[Tensor, Tensor] | None = None,
        memory_mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Return the layer's output [P, H].

        With ``cache``, ``x`` holds the newest position of each row, which attends to the cache too.
        """
        normed = self.self_norm(x)
        if cache is None:
            x = x + self._drop(self.self_attention(normed, layout, causal))
        else:
            x = x + self._drop(self.self_attention.step(normed, cache))
        if self.cross_attention is not None:
            normed = self.cross_norm(x)
            x = x + self._drop(self.cross_attention(normed, layout, memory, memory_mask))
        hidden = self._drop(F.relu(self.ffn_in(self.ffn_norm(x))))
        return x + self._drop(self.ffn_out(hidden))

    def _drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.dropout, self.training)


class Encoder(nn.Module):
    """Token embedding, sinusoidal positions and the encoder layers.

    Args:
        vocab_size: source vocabulary.
        config: sizes.
    """

    def __init__(self, vocab_size: int, config: NetworkConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.embedding = nn.Embedding(vocab_size, config.model_dim)
        self.layers = nn.ModuleList(
            [Layer(config, cross=False) for _ in range(config.encoder_layers)]
        )
        self.norm = nn.LayerNorm(config.model_dim)

    def forward(self, src_tokens: Tensor, layout: Layout) -> Tensor:
        """Encode int64 [B, S] to the tokens' float [P, H]."""
        x = self.embedding(src_tokens) * math.sqrt(self.embedding.embedding_dim)
        x = layout.flat(x + positions(x.shape[1], x.shape[2], x.device))
        x = dropout(x, self.dropout, self.training)
        for layer in self.layers:
            x = layer(x, layout)
        return self.norm(x)


class Decoder(nn.Module):
    """The decoder layers, for an input that the model has already embedded."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.layers = nn.ModuleList(
            [Layer(config, cross=True) for _ in range(config.decoder_layers)]
        )
        self.norm = nn.LayerNorm(config.model_dim)

    def memory(self, hidden: Tensor, layout: Layout) -> Memory:
        """Compute every layer's cross-attention keys and values from encoded tokens [P, H]."""
        keys_values = [layer.cross_attention.keys_values(hidden, layout) for layer in self.layers]
        return Memory(layout.padded(hidden), layout, keys_values)

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        memory: Memory,
        causal: bool = False,
        caches: list[Cache] | None = None,
    ) -> Tensor:
        """Decode the tokens [P, H] of N rows against a memory of B sentences.

        With ``caches``, one per layer, the tokens are the newest position of each row.
        """
        x = dropout(x, self.dropout, self.training)
        attn_mask = memory.layout.attn_mask
        for i, layer in enumerate(self.layers):
            cache = None if caches is None else caches[i]
            x = layer(x, layout, causal, memory.keys_values[i], attn_mask, cache)
        return self.norm(x)


def attend(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Return scaled dot-product attention, float [N, h, T, H/h].

    torch's own is slow in bfloat16 on a CPU: with its gradient it takes five times as long as plain
    matrix products for sentences of 15 tokens, and twice as long for 256.

    Args:
        query: float [N, h, T, H/h].
        key, value: float [N, h, S, H/h].
        attn_mask: bool [N, 1, 1, S], true at positions to attend to; None: all.
        causal: attend to no later position; needs T = S.
    """
    if query.device.type != "cpu" or query.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=attn_mask, is_causal=causal
        )
    with torch.autocast("cpu", enabled=False):
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        if causal:
            attn_mask = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril()
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        return scores.softmax(-1) @ value


def dropout(x: Tensor, rate: float, training: bool) -> Tensor:
    """Zero a fraction ``rate`` of a tensor in training, and scale the rest by 1 / (1 - rate).

    On a CPU torch draws a float for every element, which took a quarter of a training update; here
    four elements share one draw of 64 bits, and the rate is rounded to a multiple of 2^-16.
    """
    if not training or rate == 0 or x.device.type != "cpu":
        return F.dropout(x, rate, training)
    dropped = min(round(rate * 2**16), 2**16 - 1)
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    words = draws.view(torch.int16)[: x.numel()].view(x.shape)
    return x * ((words >= dropped - 2**15) * (2**16 / (2**16 - dropped))).to(x.dtype)


def positions(length: int, dim: int, device: torch.device, start: int = 0) -> Tensor:
    """Return sinusoidal position embeddings, float [length, dim] (Vaswani et al. 2017, 3.5)."""
    return sinusoid(torch.arange(start, start + length, device=device), dim)


def sinusoid(x: Tensor, dim: int) -> Tensor:
    """Embed numbers of any shape as sines and cosines: float [..., dim], dim even."""
    half = torch.arange(dim // 2, device=x.device, dtype=torch.float32)
    angles = x[..., None].float() * torch.exp(-math.log(10_000.0) * half / (dim // 2))
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def initialise(module: nn.Module) -> None:
    """Initialise weights: Xavier matrices, zero biases, N(0, 1/dim) embeddings."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.xavier_uniform_(child.weight)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
        elif isinstance(child, nn.Embedding):
            nn.init.normal_(child.weight, std=child.embedding_dim**-0.5)
