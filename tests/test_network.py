"""The networks and their losses against docs/method.md, written out one sentence at a time.

The reference below has no batches, no padding, no caches and no packed tokens; only the weights are
those of the model. ``drop`` stands for dropout, which is at every place that it is called.
"""
# S source length, T target length, D latent, H model, V vocabulary

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from networks import VOCAB, make_batch, make_model, random_sentences
from torch import Tensor, nn

from fastdiss_cli.data.batching import pad
from fastdiss_cli.diffusion.objective import Condition
from fastdiss_cli.models import layers
from fastdiss_cli.models.denoiser import Denoiser
from fastdiss_cli.models.registry import Vocabulary

Drop = Callable[[Tensor], Tensor]
DROPPED = 3.0  # dropout multiplies by it, so that its places show


def kept(x: Tensor) -> Tensor:
    return x


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(params=["decoding", "training"])
def drop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Drop:
    """Dropout of the reference; in training that of the layers is replaced by the same."""

    def visible(x: Tensor, rate: float, training: bool) -> Tensor:
        return DROPPED * x if training and rate == 0.2 else x

    monkeypatch.setattr(layers, "dropout", visible)
    return kept if request.param == "decoding" else lambda x: DROPPED * x


def sinusoid(x: float, dim: int) -> Tensor:
    angles = [x / 10_000 ** (i / (dim // 2)) for i in range(dim // 2)]
    return torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles])


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, causal: bool) -> Tensor:
    """Attend from [T, H] to [S, H], one head at a time."""
    answers = []
    for q, k, v in zip(*(x.chunk(heads, dim=-1) for x in (query, key, value)), strict=True):
        scores = q @ k.T / math.sqrt(q.shape[-1])
        if causal:
            scores = scores + torch.full_like(scores, -math.inf).triu(1)
        answers.append(scores.softmax(-1) @ v)
    return torch.cat(answers, dim=-1)


def layer(
    weights: layers.Layer, x: Tensor, drop: Drop, source: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Return a pre-norm layer's output for [T, H]; a decoder's attends to the source [S, H]."""
    own, ffn = weights.self_attention, F.relu
    query, key, value = own.query_key_value(weights.self_norm(x)).chunk(3, dim=-1)
    x = x + drop(own.out(attention(query, key, value, own.heads, causal)))
    if source is not None:
        cross = weights.cross_attention
        key, value = cross.key_value(source).chunk(2, dim=-1)
        query = cross.query(weights.cross_norm(x))
        x = x + drop(cross.out(attention(query, key, value, cross.heads, causal=False)))
    return x + drop(weights.ffn_out(drop(ffn(weights.ffn_in(weights.ffn_norm(x))))))


def embedded(table: nn.Embedding, tokens: list[int]) -> Tensor:
    """Return scaled embeddings with their positions, [T, H]."""
    H = table.embedding_dim
    places = torch.stack([sinusoid(i, H) for i in range(len(tokens))])
    return math.sqrt(H) * table.weight[tokens] + places


def encoded(model: nn.Module, tokens: list[int], drop: Drop) -> Tensor:
    x = drop(embedded(model.encoder.embedding, tokens))
    for weights in model.encoder.layers:
        x = layer(weights, x, drop)
    return model.encoder.norm(x)


def decoded(model: nn.Module, x: Tensor, source: Tensor, drop: Drop, causal: bool) -> Tensor:
    x = drop(x)
    for weights in model.decoder.layers:
        x = layer(weights, x, drop, source, causal)
    return model.decoder.norm(x)


def denoised(
    model: nn.Module, z_t: Tensor, t: Tensor, self_cond: Tensor, source: Tensor, drop: Drop
) -> Tensor:
    """Return z0_hat for z_t [T, D] at times [T]: the f of docs/method.md, of the sqrt schedule."""
    H, factor, rows = model.config.model_dim, model.config.noise_factor, []
    T, S = len(z_t), len(source)
    for i in range(T):
        abar = 1 - math.sqrt(t[i])
        deviation = math.sqrt(abar + factor**2 * (1 - abar))
        x = model.latent_in(torch.cat([z_t[i] / deviation, self_cond[i]]))
        x = x + model.time_in(sinusoid(1000 * float(t[i]), H)) + sinusoid(i, H)
        weights = [math.exp(-abs(j + 0.5 - (i + 0.5) * S / T)) for j in range(S)]
        rows.append(x + torch.tensor(weights) @ source / sum(weights))
    return model.latent_out(decoded(model, torch.stack(rows), source, drop, causal=False))


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("family", ["difformer", "fastdiss"])
def test_the_denoiser_is_the_one_of_the_formula(family: str, per_token: bool, drop: Drop) -> None:
    """For two candidates of each sentence, with different lengths."""
    model, sources = make_model(family, dropout=0.2), random_sentences(4)
    model.train(drop is not kept)
    _, layout = pad(random_sentences(8, longest=7), VOCAB.pad)
    N, T = layout.pad_mask.shape
    z_t, self_cond = 3 * torch.randn(N, T, 16), torch.randn(N, T, 16)
    t = torch.rand(N, T) if per_token else torch.rand(N, 1)
    memory = model.encode(*pad(sources, VOCAB.pad))
    found = Denoiser(model, memory, layout)(z_t, t, self_cond)
    lengths = model.predict_lengths(memory)
    for n, length in enumerate(layout.lengths.tolist()):
        source = encoded(model, sources[n // 2], drop)
        at = t.expand(N, T)[n, :length]
        wanted = denoised(model, z_t[n, :length], at, self_cond[n, :length], source, drop)
        torch.testing.assert_close(found[n, :length], wanted, rtol=1e-3, atol=1e-4)
        log_probs = model.length_head(source.mean(0)).log_softmax(-1)
        torch.testing.assert_close(lengths[n // 2], log_probs, rtol=1e-3, atol=1e-4)


def test_the_transformer_is_the_one_of_the_formula(drop: Drop) -> None:
    model, sources = make_model("transformer", dropout=0.2), random_sentences(4)
    model.train(drop is not kept)
    targets = sources[::-1]
    tokens, layout = pad(targets, VOCAB.pad)
    memory = model.encode(*pad(sources, VOCAB.pad))
    found = layout.padded(model.logits(memory, tokens, layout))
    for n, target in enumerate(targets):
        source = encoded(model, sources[n], drop)
        x = embedded(model.embedding, [VOCAB.eos, *target[:-1]])
        wanted = decoded(model, x, source, drop, causal=True) @ model.embedding.weight.T
        torch.testing.assert_close(found[n, : len(target)], wanted, rtol=1e-3, atol=1e-4)


def smoothed(log_probs: Tensor, gold: int, share: float) -> Tensor:
    """Return the cross-entropy with label smoothing."""
    return -(1 - share) * log_probs[gold] - share * log_probs.mean()


@pytest.mark.parametrize("family", ["difformer", "fastdiss"])
def test_the_loss_is_the_one_of_the_formula(family: str) -> None:
    """Means over tokens of the error and the smoothed labels, over sentences of the lengths."""
    model = make_model(family, max_length_offset=2, length_loss=0.3, label_smoothing=0.2)
    sources, targets = random_sentences(6), random_sentences(12)[6:]
    offsets = [len(target) - len(source) for source, target in zip(sources, targets, strict=True)]
    assert max(offsets) > 2 and min(offsets) < -2  # beyond the range of the length head
    batch, seen = make_batch(sources, targets), SimpleNamespace()

    def condition(denoiser, z_0: Tensor, noise: Tensor, *_: object) -> Condition:
        seen.t, seen.self_cond, seen.noise = torch.rand(6, 1), torch.randn_like(z_0), noise
        return Condition(seen.t, seen.t, seen.self_cond)

    model.condition = condition
    loss = model.loss(batch, update=1)
    mse, anchor, length = [], [], []
    rows = F.layer_norm(model.embedding.table.weight, (16,))
    for n, (tokens, offset) in enumerate(zip(targets, offsets, strict=True)):
        source, T = encoded(model, sources[n], kept), len(tokens)
        z_0, t = rows[tokens], seen.t[n].expand(T)
        abar = 1 - t.sqrt()[:, None]
        z_t = abar.sqrt() * z_0 + 4 * (1 - abar).sqrt() * seen.noise[n, :T]
        estimate = denoised(model, z_t, t, seen.self_cond[n, :T], source, kept)
        mse += (estimate - z_0).square().mean(-1)
        scale = math.log(1 + VOCAB.size * 0.8 / 0.2) / 16
        logits = scale * estimate @ rows.T + model.embedding.bias
        anchor += [smoothed(p, y, 0.2) for p, y in zip(logits.log_softmax(-1), tokens, strict=True)]
        lengths = model.length_head(source.mean(0)).log_softmax(-1)
        length.append(-lengths[max(-2, min(offset, 2)) + 2])
    parts = {"mse": mse, "anchor": anchor, "length": length}
    parts = {name: torch.stack(values).mean() for name, values in parts.items()}
    torch.testing.assert_close(loss.parts, parts, rtol=1e-4, atol=1e-5)
    total = parts["mse"] + parts["anchor"] + 0.3 * parts["length"]
    torch.testing.assert_close(loss.total, total, rtol=1e-4, atol=1e-5)


def test_the_loss_of_the_transformer_is_the_smoothed_cross_entropy() -> None:
    model = make_model("transformer", label_smoothing=0.2)
    sources, targets = random_sentences(6), random_sentences(6)[::-1]
    loss = model.loss(make_batch(sources, targets), update=1)
    totals, nll = [], []
    for source, target in zip(sources, targets, strict=True):
        x = embedded(model.embedding, [VOCAB.eos, *target[:-1]])
        hidden = decoded(model, x, encoded(model, source, kept), kept, causal=True)
        for p, y in zip((hidden @ model.embedding.weight.T).log_softmax(-1), target, strict=True):
            totals.append(smoothed(p, y, 0.2))
            nll.append(-p[y])
    torch.testing.assert_close(loss.total, torch.stack(totals).mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss.parts["nll"], torch.stack(nll).mean(), rtol=1e-4, atol=1e-5)


def test_a_new_network_begins_as_fairseqs_does() -> None:
    """Target embeddings have variance 1, the source's 1/H; logits have their initial scale."""
    vocab = Vocabulary(size=5000, bos=0, pad=1, eos=2)
    sizes = {"model_dim": 64, "ffn_dim": 128, "heads": 2, "latent_dim": 32}
    for scale, start in (("learned", 32**-0.5), ("rsqrt", 32**-0.5), ("one", 1.0)):
        model = make_model("difformer", vocab=vocab, logit_scale=scale, **sizes)
        assert float(model.embedding.logit_scale) == pytest.approx(start)
    assert model.embedding.table.weight.std().item() == pytest.approx(1, rel=0.02)
    assert model.encoder.embedding.weight.std().item() == pytest.approx(1 / 8, rel=0.02)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            limit = math.sqrt(6 / sum(module.weight.shape))  # Glorot & Bengio 2010, equation 16
            assert module.weight.abs().max() <= limit, name
            assert module.weight.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.05), name
            assert not module.bias.any()
    assert not model.embedding.bias.any()
