"""The networks: what padding, batches, caches and candidates must not change."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from networks import SMALL, VOCAB, make_batch, make_model, random_sentences

from fastdiss_cli.config import build
from fastdiss_cli.data.batching import Batch, pad
from fastdiss_cli.data.layout import Layout
from fastdiss_cli.decoding.diagnosis import by_time
from fastdiss_cli.decoding.generation import Run, SequenceGenerator
from fastdiss_cli.decoding.selection import by_score
from fastdiss_cli.diffusion.solvers import SOLVERS
from fastdiss_cli.errors import FastdissError
from fastdiss_cli.models.denoiser import Denoiser
from fastdiss_cli.models.embedding import LatentEmbedding
from fastdiss_cli.models.frozen import can_pack, freeze
from fastdiss_cli.models.graphs import GraphCache
from fastdiss_cli.models.layers import Cache
from fastdiss_cli.models.registry import Seq2SeqModel, Vocabulary, architecture, architectures
from fastdiss_cli.models.sampling import TEMPERATURE
from fastdiss_cli.models.source_copy import source_copy
from fastdiss_cli.models.transformer import Transformer

FAMILIES = ("transformer", "difformer", "fastdiss")


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def answers(model: Seq2SeqModel, sources: list[list[int]], max_tokens: int, **options: object):
    limit = {"max_len_b": 12} if isinstance(model, Transformer) else {}
    run = Run(model.Decoding(**limit, **options))
    SequenceGenerator(model, by_score, max_tokens).decode(sources, [run])
    return [(h.tokens, pytest.approx(h.score, abs=1e-4)) for h in run.best]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_tokens", [1, 64, 150])
def test_a_hypothesis_does_not_depend_on_its_batch(family: str, max_tokens: int) -> None:
    model, sources = make_model(family), random_sentences(64)
    assert answers(model, sources, max_tokens) == answers(model, sources, 10 * 64)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hypothesis_does_not_depend_on_the_order_of_the_corpus(family: str) -> None:
    """Noise belongs to a sentence's number, so here the numbers move along with the sentences."""
    model, sources = make_model(family), random_sentences(12)
    options = model.Decoding(**({"max_len_b": 12} if isinstance(model, Transformer) else {}))
    memory = model.encode(*pad(sources, VOCAB.pad))
    forward = model.decode(memory, torch.arange(12), options)
    backward = model.decode(
        model.encode(*pad(sources[::-1], VOCAB.pad)), torch.arange(12).flip(0), options
    )
    assert [h[0].tokens for h in forward] == [h[0].tokens for h in reversed(backward)]


class Replayed(GraphCache):
    """Runs what a GPU would capture as a graph, from the first time on."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[tuple] = []

    def has_seen(self, key: object) -> bool:
        super().has_seen(key)
        return True

    def run(self, key, function, inputs):
        self.runs.append((key, function, inputs))
        return function(*inputs)


@pytest.mark.parametrize("family", ["difformer", "fastdiss"])
@pytest.mark.parametrize("options", [{}, {"solver": "ddim"}, {"length_beam": 2, "noise_beam": 2}])
def test_what_a_gpu_replays_gives_the_same_answers(family: str, options: dict[str, Any]) -> None:
    model, sources = make_model(family), random_sentences(20)
    launched = [answers(model, sources, size, **options) for size in (1, 150)]
    model.graphs = Replayed()
    assert [answers(model, sources, size, **options) for size in (1, 150)] == launched
    keys = [key for key, *_ in model.graphs.runs]
    assert len(set(keys)) < len(keys)  # of 8 or 16 positions
    before = len(keys)
    answers(model, sources, 150, early_exit=True)  # it depends on the answers what comes next
    answers(model, sources[:2], 150, steps=100)
    answers(model, [[5] * 1500 + [VOCAB.eos]], 2000, steps=1)  # too large to be kept
    assert len(model.graphs.runs) == before


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("self_cond", ["reuse", "none", "recompute"])
def test_what_a_gpu_replays_never_waits_for_it(
    solver: str, self_cond: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the device `meta`, which has no numbers, whatever asks for one fails."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)  # it knows no such device
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    model, sources = make_model("fastdiss"), random_sentences(3)
    model.graphs = Replayed()
    answers(model, sources, 150, solver=solver, self_cond=self_cond)
    ((_, function, inputs),) = model.graphs.runs
    model = model.to("meta")
    scores, tokens, nfe = function(*(x.to("meta") for x in inputs))
    _, _, pad_mask, *_ = inputs
    assert scores.shape == tokens.shape == pad_mask.shape and nfe.shape == (3,)


def test_a_graph_is_captured_for_what_comes_again() -> None:
    graphs = GraphCache()
    assert [graphs.has_seen(key) for key in ("a", "b", "a")] == [False, False, True]
    for key in range(1000):
        assert not graphs.has_seen(key)
    assert not graphs.has_seen("a")  # long ago
    assert graphs.captured == 0


def test_other_sentence_numbers_and_seeds_draw_other_noise() -> None:
    model, sources = make_model("difformer"), random_sentences(4)
    memory = model.encode(*pad(sources, VOCAB.pad))
    first, other, reseeded = (
        [h[0].score for h in model.decode(memory, torch.arange(4) + n, model.Decoding(seed=seed))]
        for n, seed in ((0, 1), (4, 1), (0, 2))
    )
    assert len({tuple(first), tuple(other), tuple(reseeded)}) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_more_padding_changes_neither_memory_nor_loss(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sentences = make_model(family), random_sentences(6)
    batch = make_batch(sentences, sentences[::-1])
    memory = model.encode(batch.src_tokens, batch.src_layout)
    wider = torch.nn.functional.pad(batch.src_tokens, (0, 5), value=VOCAB.pad)
    kept = model.encode(wider, Layout.of(wider == VOCAB.pad)).hidden[:, : memory.hidden.shape[1]]
    real = ~batch.src_layout.pad_mask
    torch.testing.assert_close(kept[real], memory.hidden[real], rtol=1e-4, atol=1e-5)

    # of wide noise the narrow batch gets a part, and both draw the same times
    noise, tgt_tokens = torch.randn(6, 40, 16), batch.tgt_tokens
    monkeypatch.setattr(torch, "randn_like", lambda x: noise[:, : x.shape[1]])
    losses = []
    for extra in (0, 7):
        wide = torch.nn.functional.pad(tgt_tokens, (0, extra), value=VOCAB.pad)
        layout = Layout.of(wide == VOCAB.pad)
        padded = Batch(batch.src_tokens, batch.src_layout, wide, layout)
        torch.manual_seed(1)
        losses.append(model.loss(padded, update=1).total)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("transformer", {}),
        ("difformer", {"self_cond_rate": 1.0}),
        ("fastdiss", {}),
        ("fastdiss", {"self_cond_form": "nearest", "scp_offset": "uniform"}),
        ("fastdiss", {"mans_strength": 0.5, "mans_confidence": "probability"}),
        ("fastdiss", {"mans_strength": 0.5, "mans_shared_pass": True}),
    ],
)
@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_gradient_never_waits_for_the_device(
    family: str, options: dict[str, Any], bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device meta stands in for a GPU: it has no values, and what is elsewhere is refused."""
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda _: torch.bfloat16)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: bfloat16)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    device, sentences = torch.device("meta"), random_sentences(6)
    model = make_model(family, **options).train().to(device)
    batch = make_batch(sentences, sentences[::-1]).to(device)
    right = torch.tensor

    def on_the_host(data: Any, device: Any = "cpu", **other: Any) -> torch.Tensor:
        assert str(device) == "cpu", "a copy of host memory waits"
        return right(data, device=device, **other)

    with torch.enable_grad():
        model.loss(batch, update=1)  # constants are copied there once
        monkeypatch.setattr(torch, "tensor", on_the_host)
        loss = model.loss(batch, update=1).total
    loss.backward()
    assert loss.device == device and all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("family", ["difformer", "fastdiss"])
def test_more_padding_changes_no_estimate(family: str) -> None:
    model, sentences = make_model(family), random_sentences(5)
    memory = model.encode(*pad(sentences, VOCAB.pad))
    _, layout = pad(sentences, VOCAB.pad)
    mask = layout.pad_mask
    N, T = mask.shape
    z, t = torch.randn(N, T + 4, 16), torch.rand(N, 1)
    wide_mask = torch.nn.functional.pad(mask, (0, 4), value=True)
    narrow = model.denoise(z[:, :T], t, z[:, :T] * 0.5, memory, layout)
    wide = model.denoise(z, t, z * 0.5, memory, Layout.of(wide_mask))[:, :T]
    torch.testing.assert_close(wide[~mask], narrow[~mask], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_the_source_is_copied_along_the_diagonal(
    padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the formula, position by position, for two candidates of each of two sentences."""
    sources = [[5, 6, 7, 8, 2], [9, 4, 2] if padded else [9, 9, 5, 4, 2]]
    lengths = [3, 7, 2, 4] if padded else [3, 3, 3, 3]
    memory = make_model("difformer").encode(*pad(sources, VOCAB.pad))
    layout = Layout.of(torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None])
    rows = []
    for n, T in enumerate(lengths):
        hidden = memory.hidden[n // 2, : len(sources[n // 2])]
        S = len(hidden)
        for i in range(T):
            weights = [math.exp(-abs(j + 0.5 - (i + 0.5) * S / T) / 2) for j in range(S)]
            rows.append(torch.tensor(weights) @ hidden / sum(weights))
    for together in (3, 1024):
        monkeypatch.setattr("fastdiss_cli.models.source_copy._TOGETHER", together)
        torch.testing.assert_close(source_copy(memory, layout, 2.0), torch.stack(rows))


def test_a_network_without_source_copy_starts_from_positions_alone() -> None:
    """At pure noise two targets of one source differ by where they look, or not at all."""
    sources = [[5, 6, 7, 8, 2]]
    with_copy, without = (make_model("difformer", source_copy=width) for width in (1.0, 0.0))
    layout = Layout.of(torch.tensor([[False] * 2 + [True] * 3]))
    longer = Layout.of(torch.tensor([[False] * 5]))
    starts = {}
    for model in (with_copy, without):
        seen = starts[model.config.source_copy] = []
        model.decoder.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0]))
        memory = model.encode(*pad(sources, VOCAB.pad))
        for which in (layout, longer):
            zeros = torch.zeros(1, 5, 16)
            model.denoise(zeros, torch.tensor(1.0), zeros, memory, which)
    assert torch.equal(starts[0.0][0], starts[0.0][1][:2])
    assert not torch.allclose(starts[1.0][0], starts[1.0][1][:2])
    torch.testing.assert_close(
        starts[1.0][1], starts[0.0][1] + source_copy(memory, longer, 1.0)
    )  # the weights of both models are the same


def test_candidates_share_the_memory_of_their_sentence() -> None:
    """Folding candidates into the query is the same as repeating the memory for each."""
    model, sentences = make_model("difformer"), random_sentences(3)
    memory = model.encode(*pad(sentences, VOCAB.pad))
    z, t = torch.randn(6, 7, 16), torch.rand(6, 1)
    layout = Layout.of(torch.arange(7) >= torch.tensor([7, 3, 5, 7, 6, 2])[:, None])
    folded = model.denoise(z, t, z, memory, layout)
    repeated = model.denoise(z, t, z, memory.select(torch.arange(3).repeat_interleave(2)), layout)
    torch.testing.assert_close(folded, repeated, rtol=1e-4, atol=1e-5)


def test_times_of_tokens_and_of_sentences_agree() -> None:
    model, sentences = make_model("difformer"), random_sentences(3)
    memory = model.encode(*pad(sentences, VOCAB.pad))
    z, t, layout = torch.randn(3, 5, 16), torch.rand(()), Layout.of(torch.zeros(3, 5) > 0)
    estimate = model.denoise(z, t, z, memory, layout)
    for shape in ((3, 1), (3, 5)):
        torch.testing.assert_close(model.denoise(z, t.expand(shape), z, memory, layout), estimate)


def test_every_embedding_has_norm_sqrt_d() -> None:
    model = make_model("difformer")
    norms = model.embedding(torch.arange(VOCAB.size)).norm(dim=-1)
    torch.testing.assert_close(norms, torch.full_like(norms, math.sqrt(16)), rtol=1e-3, atol=0)


def test_all_step_counts_share_one_encoder_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sources = make_model("difformer"), random_sentences(8)
    right, calls = model.encode, []

    def counted(src_tokens: torch.Tensor, layout: Layout):
        calls.append(len(src_tokens))
        return right(src_tokens, layout)

    monkeypatch.setattr(model, "encode", counted)
    runs = [Run(model.Decoding(steps=n)) for n in (1, 2, 5)]
    SequenceGenerator(model, by_score, 40).decode(sources, runs)
    assert len(calls) > 1 and sum(calls) == 8  # each sentence once, in several batches
    assert [run.nfe for run in runs] == [8, 16, 40]


def test_solvers_are_told_apart() -> None:
    model, sources = make_model("difformer"), random_sentences(4)
    memory = model.encode(*pad(sources, VOCAB.pad))

    def scores(solver: str, steps: int) -> list[float]:
        options = model.Decoding(solver=solver, steps=steps)
        return [h[0].score for h in model.decode(memory, torch.arange(4), options)]

    assert len({tuple(scores(solver, 4)) for solver in ("ddpm", "ddim", "dpm-solver++")}) == 3
    assert scores("ddpm", 1) == scores("ddim", 1)  # one step has no move to make


def test_more_lengths_than_there_are_is_refused() -> None:
    model, sources = make_model("difformer", max_length_offset=3), random_sentences(2)
    memory = model.encode(*pad(sources, VOCAB.pad))
    assert len(model.decode(memory, torch.arange(2), model.Decoding(length_beam=4))[0]) == 4
    with pytest.raises(FastdissError, match=r"length_beam 5: .* at most 4 lengths"):
        model.decode(memory, torch.arange(2), model.Decoding(length_beam=5))


def test_the_most_likely_lengths_are_tried() -> None:
    """Offsets from -3 to 3, the largest the likeliest; none leads to a length below 1."""
    model, sources = make_model("difformer", max_length_offset=3), [[5, 2], [5, 6, 7, 8, 2]]
    model.length_head.weight.zero_()
    model.length_head.bias.copy_(torch.tensor([6.0, 5, 0, 1, 2, 3, 7]))
    model.embedding.bias[VOCAB.eos] = -100
    memory = model.encode(*pad(sources, VOCAB.pad))
    short, long = model.decode(memory, torch.arange(2), model.Decoding(length_beam=4))
    assert {len(h.tokens) for h in short} == {2 + 3, 2 + 2, 2 + 1, 2 + 0}
    assert {len(h.tokens) for h in long} == {5 + 3, 5 - 3, 5 - 2, 5 + 2}
    short, long = model.decode(memory, torch.arange(2), model.Decoding())
    assert (len(short[0].tokens), len(long[0].tokens)) == (5, 8)


def test_a_temperature_is_of_ddpm() -> None:
    model, sources = make_model("fastdiss"), random_sentences(4)
    memory = model.encode(*pad(sources, VOCAB.pad))

    def scores(**options: Any) -> list[float]:
        options = model.Decoding(steps=4, **options)
        return [h[0].score for h in model.decode(memory, torch.arange(4), options)]

    assert len({tuple(scores(temperature=t)) for t in (0.0, 0.25, 1.0)}) == 3
    assert scores() == scores(temperature=TEMPERATURE)
    assert model.Decoding(solver="ddim").temperature == 0
    assert model.Decoding(solver="ddim", temperature=0.0) == model.Decoding(solver="ddim")
    with pytest.raises(FastdissError, match="temperature must be 0 with dpm-solver"):
        model.Decoding(solver="dpm-solver++", temperature=1.0)
    with pytest.raises(FastdissError, match=r"temperature must be in \[0, 1\], not 1.5"):
        model.Decoding(temperature=1.5)


def test_beams_give_that_many_candidates_best_first() -> None:
    model, sources = make_model("difformer"), random_sentences(3)
    memory = model.encode(*pad(sources, VOCAB.pad))
    options = model.Decoding(length_beam=3, noise_beam=2)
    for candidates in model.decode(memory, torch.arange(3), options):
        scores = [h.score for h in candidates]
        assert len(candidates) == options.candidates == 6
        assert scores == sorted(scores, reverse=True)
        assert len(set(scores)) == 6
        for h in candidates:
            assert VOCAB.pad not in h.tokens and VOCAB.eos not in h.tokens
            assert h.score == pytest.approx(sum(h.token_scores) / len(h.token_scores), abs=1e-5)


def test_history_has_a_frame_for_every_step_and_ends_in_the_answer() -> None:
    model, sources = make_model("difformer"), random_sentences(3)
    memory = model.encode(*pad(sources, VOCAB.pad))
    options = model.Decoding(steps=4, time_grid="uniform", history=True)
    for (h,) in model.decode(memory, torch.arange(3), options):
        assert [step.time for step in h.history] == [1, 0.75, 0.5, 0.25]
        assert h.history[-1].tokens == h.tokens


def test_gold_self_conditioning_uses_the_gold_length() -> None:
    model, sources = make_model("difformer"), random_sentences(3)
    memory = model.encode(*pad(sources, VOCAB.pad))
    gold = [[5, 6, 2], [7, 2], [8, 9, 10, 11, 2]]
    told, right = [], model.denoise
    model.denoise = lambda z, t, self_cond, *more: (
        told.append(self_cond),
        right(z, t, self_cond, *more),
    )[1]
    options = model.Decoding(self_cond="gold", noise_beam=2)
    found = model.decode(memory, torch.arange(3), options, gold)
    tokens, layout = pad([tokens for tokens in gold for _ in range(2)], VOCAB.pad)
    mask = layout.pad_mask
    assert len(told) == 5
    for self_cond in told:
        assert torch.equal(self_cond[~mask], model.embedding(tokens)[~mask])
    for row, wanted in zip(found, gold, strict=True):
        assert len(row) == 2 and all(len(h.token_scores) <= len(wanted) for h in row)


# the autoregressive reference


def test_cached_decoding_is_teacher_forcing() -> None:
    model, sentences = make_model("transformer"), random_sentences(4)
    tokens, own = pad(sentences, VOCAB.pad)
    memory = model.encode(tokens, own)
    layout = Layout.of(torch.zeros_like(tokens) > 0)
    full = layout.padded(model.logits(memory, tokens, layout))
    caches = [Cache(), Cache()]
    given = torch.cat([torch.full((4, 1), VOCAB.eos), tokens[:, :-1]], dim=1)
    for position in range(tokens.shape[1]):
        x = model.embed(given[:, position : position + 1], position).squeeze(1)
        one = Layout.of(torch.zeros(4, 1) > 0)
        logits = model.output(model.decoder(x, one, memory, caches=caches))
        torch.testing.assert_close(logits, full[:, position], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lenpen", [0.0, 1.0])
def test_the_nfe_of_beam_search_is_how_long_it_searched(
    lenpen: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("transformer")
    for p in model.parameters():
        p.mul_(1.5)  # less uniform than at initialisation: answers of several lengths
    calls: list[int] = []
    right = model.embed
    monkeypatch.setattr(model, "embed", lambda *given: [calls.append(1), right(*given)][1])
    options = model.Decoding(beam=5, lenpen=lenpen, max_len_b=12, min_len=0)
    (row,) = model.decode(model.encode(*pad([[4, 5, 2]], VOCAB.pad)), torch.arange(1), options)
    assert {h.nfe for h in row} == {len(calls)} and len({len(h.tokens) for h in row}) > 1


@pytest.mark.parametrize("lenpen", [0.0, 0.5, 1.0, 2.0])
def test_wide_beam_search_finds_the_best_of_all_answers(lenpen: float) -> None:
    """With a beam as wide as the space, the answer is the brute-force optimum."""
    vocab = Vocabulary(size=6, bos=0, pad=1, eos=2)
    arch = architecture("transformer_tiny")
    torch.manual_seed(3)
    model = arch.family(arch.config(SMALL), vocab, vocab).eval()
    for p in model.parameters():
        p.mul_(1.5)  # less uniform than at initialisation
    options = model.Decoding(beam=64, max_len_b=3, min_len=0, lenpen=lenpen)
    memory = model.encode(*pad([[4, 5, 2]], VOCAB.pad))
    ((best, *_),) = model.decode(memory, torch.arange(1), options)
    words = (3, 4, 5)
    every = [list(w) for n in range(4) for w in itertools.product(words, repeat=n)]

    def score(answer: list[int]) -> float:
        tokens = torch.tensor([[*answer, vocab.eos]])
        logits = model.logits(memory, tokens, Layout.of(tokens < 0))
        logits[..., [vocab.pad, vocab.bos]] = float("-inf")
        log_probs = logits.log_softmax(-1)
        return log_probs.gather(-1, tokens.T).sum().item() / tokens.shape[1] ** lenpen

    scores = {tuple(answer): score(answer) for answer in every}
    assert tuple(best.tokens) == max(scores, key=scores.__getitem__)
    assert best.score == pytest.approx(max(scores.values()), abs=1e-4)


def test_greedy_search_follows_the_most_likely_token() -> None:
    model, sources = make_model("transformer"), random_sentences(5)
    memory = model.encode(*pad(sources, VOCAB.pad))
    found = model.decode(memory, torch.arange(5), model.Decoding(beam=1, min_len=0, max_len_b=12))
    for b, (h,) in enumerate(found):
        tokens = torch.tensor([[*h.tokens, VOCAB.eos]])
        logits = model.logits(memory.select(torch.tensor([b])), tokens, Layout.of(tokens < 0))
        logits[..., [VOCAB.pad, VOCAB.bos]] = float("-inf")
        free = len(h.tokens) < 12  # at the limit eos is forced
        assert logits.argmax(-1).tolist()[: len(h.tokens) + free] == [
            *h.tokens,
            *([VOCAB.eos] if free else []),
        ]


def test_lengths_are_bounded_as_told() -> None:
    model, sources = make_model("transformer"), random_sentences(6)
    memory = model.encode(*pad(sources, VOCAB.pad))
    for low, high in ((1, 3), (4, 4), (2, 7)):
        options = model.Decoding(beam=3, min_len=low, max_len_b=high)
        found = model.decode(memory, torch.arange(6), options)
        assert all(low <= len(h.tokens) <= high for row in found for h in row)
    options = model.Decoding(beam=3, min_len=100, max_len_a=0.5, max_len_b=2)  # eos when forced
    for source, row in zip(sources, model.decode(memory, torch.arange(6), options), strict=True):
        assert {len(h.tokens) for h in row} == {len(source) // 2 + 2}


def test_log_likelihood_is_the_score_of_beam_search() -> None:
    model, sources = make_model("transformer"), random_sentences(4)
    memory = model.encode(*pad(sources, VOCAB.pad))
    found = model.decode(memory, torch.arange(4), model.Decoding(beam=3, max_len_b=12))
    likelihood = model.log_likelihood(memory, [h.tokens for row in found for h in row])
    scores = torch.tensor([h.score for row in found for h in row])
    # beam search cannot choose bos or pad, whose small share of the probability it spreads
    torch.testing.assert_close(likelihood, scores, rtol=0.1, atol=0.1)


# the registry


def test_every_architecture_is_built_from_its_name() -> None:
    names = architectures()
    for family in FAMILIES:
        assert {f"{family}_{size}" for size in ("tiny", "small", "iwslt_de_en", "base")} <= set(
            names
        )
    config = names["fastdiss_iwslt_de_en"].config({})
    assert (config.model_dim, config.ffn_dim, config.heads, config.latent_dim) == (
        512,
        1024,
        4,
        128,
    )
    assert (config.encoder_layers, config.decoder_layers) == (6, 6)


def test_an_unknown_architecture_suggests_the_closest() -> None:
    with pytest.raises(FastdissError, match="did you mean 'fastdiss_tiny'"):
        architecture("fastdis_tiny")


def test_an_unknown_option_suggests_the_closest() -> None:
    with pytest.raises(
        FastdissError, match=r"model.nois_factor is no option; did you mean 'noise_factor'"
    ):
        architecture("difformer_tiny").config({"nois_factor": 3})


def test_options_are_checked() -> None:
    family = architecture("fastdiss_tiny").family
    for wrong in (
        {"noise_factor": 0},
        {"heads": 5},
        {"scp_coupling": "no"},
        {"mans_anchors": [1, 1]},
        {"dropout": "much"},
    ):
        with pytest.raises(FastdissError):
            build(family.Config, wrong, "model")


def test_an_estimate_is_told_raw_nearest_or_expected() -> None:
    z0_hat = torch.randn(2, 3, 16)
    z0_hat[1, 2] = 0
    layout = Layout.of(torch.tensor([[False] * 3, [False, False, True]]))
    sources = pad(random_sentences(2), VOCAB.pad)
    for form in ("raw", "nearest", "expected"):
        model = make_model("fastdiss", self_cond_form=form)
        denoiser = Denoiser(model, model.encode(*sources), layout)
        told = denoiser.tell(z0_hat)
        assert torch.equal(told, denoiser.project(z0_hat, form))
        logits = model.embedding.logits(z0_hat)
        rows = model.embedding(torch.arange(VOCAB.size))
        wanted = {
            "raw": z0_hat,
            "nearest": rows[logits.argmax(-1)],
            "expected": torch.einsum("btv,vd->btd", logits.softmax(-1), rows),
        }[form]
        assert not told[1, 2].any()  # padding
        torch.testing.assert_close(layout.flat(told), layout.flat(wanted))


def test_a_learned_scale_scales_embeddings_and_logits() -> None:
    model, plain = (make_model("difformer", embedding_scale=scaled) for scaled in (True, False))
    model.embedding.scale.fill_(3.0)
    model.embedding.table.weight.copy_(plain.embedding.table.weight)
    tokens, z0_hat = torch.arange(VOCAB.size), torch.randn(4, 16)
    torch.testing.assert_close(model.embedding(tokens), 3 * plain.embedding(tokens))
    torch.testing.assert_close(model.embedding.logits(z0_hat), 3 * plain.embedding.logits(z0_hat))


def test_who_was_never_told_anything_is_told_nothing() -> None:
    model, sources = make_model("difformer", self_cond_rate=0.0), random_sentences(5)
    memory = model.encode(*pad(sources, VOCAB.pad))
    modes = [
        model.decode(memory, torch.arange(5), model.Decoding(steps=3, self_cond=mode))
        for mode in ("none", "reuse", "recompute")
    ]
    for (first,), *others in zip(*modes, strict=True):
        assert all(h.tokens == first.tokens and h.nfe == 3 for (h,) in others)


def test_a_diagnosis_measures_the_gap_to_a_fresh_estimate() -> None:
    """An estimate that was told a fresh one has no gap; a stale one has."""
    model, sources = make_model("difformer"), random_sentences(5)
    memory = model.encode(*pad(sources, VOCAB.pad))
    for mode, exact in (("recompute", True), ("reuse", False)):
        options = model.Decoding(steps=3, self_cond=mode, diagnose=True)
        for (h,) in model.decode(memory, torch.arange(5), options):
            assert h.nfe == (6 if exact else 3) and len(h.history) == 3
            assert all((step.gap < 1e-9) == exact and step.norm > 0 for step in h.history)
    silent = make_model("difformer", self_cond_rate=0.0)
    options = silent.Decoding(steps=2, diagnose=True)
    for (h,) in silent.decode(silent.encode(*pad(sources, VOCAB.pad)), torch.arange(5), options):
        assert all(math.isnan(step.gap) for step in h.history)


def test_losses_at_a_time_are_those_of_training() -> None:
    """Told nothing at a fixed time, the losses are those of `loss` there."""
    model, sentences = make_model("difformer", self_cond_rate=0.0), random_sentences(6)
    batch = make_batch(sentences, sentences[::-1])
    at = torch.full((6,), 0.3)
    torch.manual_seed(1)
    mse, anchor = model.losses_at(batch, 0.3, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastdiss_cli.models.difformer.draw_times", lambda *_: at)
        torch.manual_seed(1)
        parts = model.loss(batch, update=1).parts
    torch.testing.assert_close((mse, anchor), (parts["mse"], parts["anchor"]))
    told = model.losses_at(batch, 0.3, 0.2)[0]
    torch.manual_seed(1)
    assert model.losses_at(batch, 0.3, None)[0] == mse != told


def test_training_runs_on_what_was_chosen() -> None:
    """z_t of the unrolled sentences is what the condition says, that of others the noised z_0."""
    model, sentences = make_model("fastdiss", scp_unroll=0.5), random_sentences(40)
    chosen, seen = [], []
    condition, denoise = model.condition, model.denoise
    model.condition = lambda *given: chosen.append(condition(*given)) or chosen[0]
    model.denoise = lambda *given: seen.append(given) or denoise(*given)
    model.loss(make_batch(sentences, sentences), update=1)
    z_t, t, self_cond, *_ = seen[-1]
    assert t is chosen[0].told_t and self_cond is chosen[0].self_cond
    sampled, which = chosen[0].unrolled
    rows = (z_t == sampled).all(-1).all(-1)
    assert torch.equal(rows, which[:, 0, 0]) and 5 < rows.sum() < 35


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_losses_by_time_compare_like_with_like(rate: float) -> None:
    """Each batch has one noise, whatever is told, and nothing stands for what cannot be told."""
    model = make_model("difformer", self_cond_rate=rate)
    batches = [make_batch(some, some) for some in (random_sentences(3), random_sentences(2))]
    drawn: dict[tuple[float, float | None], list[float]] = {}

    def losses_at(batch: Batch, t: float, gap: float | None) -> tuple[torch.Tensor, torch.Tensor]:
        drawn.setdefault((t, gap), []).append(float(torch.rand(())))
        torch.rand(3 if gap else 1)  # as a stale estimate draws more than none
        return torch.ones(()), torch.ones(())

    model.losses_at = losses_at
    batcher = SimpleNamespace(epoch=lambda epoch: [0, 1], collate=batches.__getitem__)
    rows = by_time(model, batcher, 4, torch.float32)
    for t in {t for t, _ in drawn}:
        ways = [noise for (time, _), noise in drawn.items() if time == t]
        assert all(noise == ways[0] for noise in ways) and len(set(ways[0])) == 2
    fresh, stale = ([f"mse_{told}" in row for row in rows] for told in ("fresh", "stale"))
    assert fresh == [rate > 0] * 10
    assert stale == [rate > 0 and row["t"] + 0.25 <= 1 for row in rows]


def test_pairs_of_very_different_length_are_told() -> None:
    model = make_model("difformer", max_length_offset=5)
    src, tgt = np.array([3, 9, 20, 4]), np.array([8, 3, 3, 10], dtype=np.uint16)
    said = model.misfits(src, tgt)
    assert "3 of 4 pairs" in said and "max_length_offset = 5" in said
    assert model.misfits(src[:1], tgt[:1]) is None
    assert make_model("transformer").misfits(src, tgt) is None


def test_only_one_and_the_same_vocabulary_is_shared() -> None:
    arch = architecture("transformer_tiny")
    sides = [Vocabulary(12, 0, 1, 2, hash=name) for name in ("one", "other")]
    for src in sides:
        model = arch.family(arch.config(SMALL), src, sides[0])
        assert (model.encoder.embedding is model.embedding) == (src is sides[0])


@pytest.mark.parametrize("self_cond", ["reuse", "gold"])
def test_an_early_exit_stops_sentences_that_do_not_change(self_cond: str) -> None:
    """What goes on is as without it; what stops has the tokens of the step before."""
    model, sources = make_model("difformer"), random_sentences(24)
    model.embedding.bias.normal_(std=4)  # else an untrained model changes its mind in every step
    memory = model.encode(*pad(sources, VOCAB.pad))
    ways = {"steps": 8, "history": True, "self_cond": self_cond, "early_exit": False}
    ways["length_beam"] = 1 if self_cond == "gold" else 2
    every, early = (
        model.decode(memory, torch.arange(24), model.Decoding(**ways | more), sources[::-1])
        for more in ({}, {"early_exit": True})
    )
    costs = set()
    for full, short in zip(every, early, strict=True):
        by_length = {len(h.history[0].confidences): h for h in full}
        (cost,) = {h.nfe for h in short}
        costs.add(cost)
        for h in short:
            same = by_length[len(h.history[0].confidences)]
            assert [x.tokens for x in h.history] == [x.tokens for x in same.history[:cost]]
            assert len(h.history) == cost and h.tokens == h.history[-1].tokens
            if cost < 8:
                assert h.history[-1].tokens == h.history[-2].tokens
    assert min(costs) < max(costs) <= 8


@pytest.mark.parametrize("solver", ["ddim", "dpm-solver++"])
def test_an_early_exit_with_every_solver(solver: str) -> None:
    model, sources = make_model("difformer"), random_sentences(24)
    model.embedding.bias.normal_(std=4)
    memory = model.encode(*pad(sources, VOCAB.pad))
    options = model.Decoding(steps=12, solver=solver, early_exit=True)
    assert len({h.nfe for (h,) in model.decode(memory, torch.arange(24), options)}) > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_frozen_model_decodes_as_the_trained_one(family: str) -> None:
    model, sources = make_model(family), random_sentences(32)
    for p in model.parameters():
        p.add_(0.05 * torch.randn_like(p))  # biases begin as zeros
    wanted = answers(model, sources, 200)
    freeze(model, torch.float32)
    assert not any(isinstance(m, torch.nn.Linear) for m in model.modules())
    assert answers(model, sources, 200) == wanted


def test_where_layers_cannot_be_packed_they_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sources = make_model("difformer"), random_sentences(8)
    wanted = answers(model, sources, 200)

    def refuse(*_: object) -> torch.Tensor:
        raise RuntimeError("not here")

    monkeypatch.setattr("fastdiss_cli.models.frozen.PackedLinear.forward", refuse)
    can_pack.cache_clear()
    freeze(model, torch.float32)
    can_pack.cache_clear()
    assert any(isinstance(m, torch.nn.Linear) for m in model.modules())
    assert answers(model, sources, 200) == wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_a_frozen_model_computes_in_bfloat16(family: str) -> None:
    model, sources = make_model(family), random_sentences(32)
    wanted = model.encode(*pad(sources, VOCAB.pad)).hidden
    freeze(model, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.encode(*pad(sources, VOCAB.pad)).hidden
    assert not torch.equal(found, wanted)
    torch.testing.assert_close(found.float(), wanted, rtol=0.05, atol=0.05)
    run = Run(model.Decoding(**({"max_len_b": 12} if family == "transformer" else {})))
    SequenceGenerator(model, by_score, 200, torch.bfloat16).decode(sources, [run])
    assert all(math.isfinite(h.score) for h in run.best)


@pytest.mark.parametrize("smoothing", [0.1, 0.3])
def test_a_perfect_estimate_is_as_sure_as_smoothed_labels_are(smoothing: float) -> None:
    """Where the embeddings are at right angles to each other."""
    V = D = 32
    embedding = LatentEmbedding(V, D, "matched", smoothing, learn_scale=False)
    embedding.rows = lambda: torch.eye(V) * D**0.5
    probabilities = embedding.logits(embedding.rows()).softmax(-1)
    wanted = torch.full((V, V), smoothing / V).fill_diagonal_(1 - smoothing + smoothing / V)
    torch.testing.assert_close(probabilities, wanted)
