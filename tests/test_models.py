"""The networks: what padding, batches, caches and candidates must not change."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from networks import SMALL, VOCAB, answers, make_batch, make_model, random_sentences

from fastdiss_cli.config import build
from fastdiss_cli.data.batching import Batch, pad
from fastdiss_cli.data.layout import Layout
from fastdiss_cli.decoding import generation
from fastdiss_cli.decoding.diagnosis import by_time, mean_losses
from fastdiss_cli.decoding.generation import Run, SequenceGenerator
from fastdiss_cli.decoding.selection import by_score
from fastdiss_cli.errors import FastdissError
from fastdiss_cli.models import embedding
from fastdiss_cli.models.denoiser import Denoiser
from fastdiss_cli.models.embedding import LatentEmbedding
from fastdiss_cli.models.frozen import can_pack, freeze
from fastdiss_cli.models.registry import Vocabulary, architecture, architectures
from fastdiss_cli.models.source_copy import source_copy

FAMILIES = ("transformer", "difformer", "fastdiss")


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_tokens", [1, 64, 150])
def test_a_hypothesis_does_not_depend_on_its_batch(family: str, max_tokens: int) -> None:
    model, sources = make_model(family), random_sentences(64)
    assert answers(model, sources, max_tokens) == answers(model, sources, 10 * 64)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hypothesis_does_not_depend_on_its_place_in_the_corpus(family: str) -> None:
    model, sources = make_model(family), random_sentences(12)
    whole = answers(model, sources, 100)
    assert answers(model, sources[::-1], 100) == whole[::-1]
    assert answers(model, sources[7:], 100) == whole[7:]


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

    # the narrow batch gets a part of the wide noise, and both draw the same times
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
    """The device meta stands in for a GPU: it has no values, and rejects other devices' tensors."""
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
    narrow = Denoiser(model, memory, layout)(z[:, :T], t, z[:, :T] * 0.5)
    wide = Denoiser(model, memory, Layout.of(wide_mask))(z, t, z * 0.5)[:, :T]
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
    """At pure noise, two targets of one source differ only by where they attend, if at all."""
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
            Denoiser(model, memory, which)(zeros, torch.tensor(1.0), zeros)
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
    folded = Denoiser(model, memory, layout)(z, t, z)
    repeated = Denoiser(model, memory.select(torch.arange(3).repeat_interleave(2)), layout)(z, t, z)
    torch.testing.assert_close(folded, repeated, rtol=1e-4, atol=1e-5)


def test_times_of_tokens_and_of_sentences_agree() -> None:
    model, sentences = make_model("difformer"), random_sentences(3)
    memory = model.encode(*pad(sentences, VOCAB.pad))
    z, t, layout = torch.randn(3, 5, 16), torch.rand(()), Layout.of(torch.zeros(3, 5) > 0)
    estimate = Denoiser(model, memory, layout)(z, t, z)
    for shape in ((3, 1), (3, 5)):
        torch.testing.assert_close(Denoiser(model, memory, layout)(z, t.expand(shape), z), estimate)


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


def test_the_time_of_the_encoder_counts_in_every_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sources, clock = make_model("difformer"), random_sentences(8), [0.0]
    monkeypatch.setattr(generation, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def taking(seconds: float, work: Callable[..., Any]) -> Callable[..., Any]:
        def slow(*given: Any) -> Any:
            clock[0] += seconds
            return work(*given)

        return slow

    monkeypatch.setattr(model, "encode", taking(10, model.encode))
    monkeypatch.setattr(model, "decode", taking(3, model.decode))
    choose = taking(1, by_score)
    runs = [Run(model.Decoding(steps=n)) for n in (1, 5)]
    SequenceGenerator(model, choose, 1000).decode(sources, runs)
    assert [run.seconds for run in runs] == [14, 14]


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
        FastdissError,
        match=r"model.nois_factor is not an option of difformer_tiny; did you mean 'noise_factor'",
    ):
        architecture("difformer_tiny").config({"nois_factor": 3})
    with pytest.raises(
        FastdissError,
        match=r"noise_factor is not an option of transformer_tiny; `fastdiss models transformer_",
    ):
        architecture("transformer_tiny").config({"noise_factor": 3})


def test_options_are_checked() -> None:
    family = architecture("fastdiss_tiny").family
    by_probability = {"mans_confidence": "probability"}
    build(family.Config, {"mans_anchors": [0.2, 1]}, "model")
    build(family.Config, by_probability | {"mans_anchors": [0.8, 0.2]}, "model")
    for wrong in (
        {"noise_factor": 0},
        {"heads": 5},
        {"scp_coupling": "no"},
        {"mans_anchors": [1, 1]},
        {"mans_anchors": [1, 0.2]},  # hard tokens would get more noise
        by_probability | {"mans_anchors": [0.2, 0.8]},
        {"dropout": "much"},
    ):
        with pytest.raises(FastdissError):
            build(family.Config, wrong, "model")


def test_an_estimate_is_given_raw_nearest_or_expected() -> None:
    z0_hat = torch.randn(2, 3, 16)
    z0_hat[1, 2] = 0
    layout = Layout.of(torch.tensor([[False] * 3, [False, False, True]]))
    sources = pad(random_sentences(2), VOCAB.pad)
    for form in ("raw", "nearest", "expected"):
        model = make_model("fastdiss", self_cond_form=form)
        denoiser = Denoiser(model, model.encode(*sources), layout)
        self_cond = denoiser.to_self_cond(z0_hat)
        assert torch.equal(self_cond, denoiser.project(z0_hat, form))
        logits = model.embedding.logits(z0_hat)
        rows = model.embedding(torch.arange(VOCAB.size))
        wanted = {
            "raw": z0_hat,
            "nearest": rows[logits.argmax(-1)],
            "expected": torch.einsum("btv,vd->btd", logits.softmax(-1), rows),
        }[form]
        assert not self_cond[1, 2].any()  # padding
        torch.testing.assert_close(layout.flat(self_cond), layout.flat(wanted))


def test_many_estimates_are_averaged_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, z0_hat = make_model("difformer").embedding, torch.randn(7, 16)
    with torch.autocast("cpu", torch.bfloat16):
        whole = model.project(z0_hat, "expected")
        monkeypatch.setattr(embedding, "_SCORES", 3 * VOCAB.size)
        torch.testing.assert_close(model.project(z0_hat, "expected"), whole, rtol=1e-2, atol=1e-2)
    exact = model.logits(z0_hat).softmax(-1) @ model.rows()
    torch.testing.assert_close(whole, exact, rtol=0.1, atol=0.05)


def test_a_diagnosis_measures_the_gap_to_a_fresh_estimate() -> None:
    """An estimate conditioned on a fresh one has no gap; one conditioned on a stale one has."""
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
    """Without conditioning, at a fixed time, they are the losses of `loss`."""
    model, sentences = make_model("difformer", self_cond_rate=0.0), random_sentences(6)
    batch = make_batch(sentences, sentences[::-1])
    at = torch.full((6, 1), 0.3)
    torch.manual_seed(1)
    mse, anchor = model.losses_at(batch, 0.3, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastdiss_cli.models.difformer.draw_times", lambda *_: at)
        torch.manual_seed(1)
        parts = model.loss(batch, update=1).parts
    torch.testing.assert_close((mse, anchor), (parts["mse"], parts["anchor"]))
    stale = model.losses_at(batch, 0.3, 0.5)[0]
    torch.manual_seed(1)
    assert model.losses_at(batch, 0.3, None)[0] == mse != stale


def test_a_stale_estimate_is_made_at_the_later_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sentences = make_model("difformer", self_cond_form="nearest"), random_sentences(6)
    calls: list[tuple[float, torch.Tensor, torch.Tensor]] = []
    right = model.denoise

    def denoise(z_t: torch.Tensor, t: torch.Tensor, self_cond: torch.Tensor, *more: Any):
        calls.append((float(t), self_cond, right(z_t, t, self_cond, *more)))
        return calls[-1][2]

    monkeypatch.setattr(model, "denoise", denoise)
    batch = make_batch(sentences, sentences[::-1])
    model.losses_at(batch, 0.3, 0.5)
    (first, nothing, estimate), (second, self_cond, _) = calls
    assert (first, second) == (pytest.approx(0.5), pytest.approx(0.3)) and not nothing.any()
    denoiser = Denoiser(model, model.encode(batch.src_tokens, batch.src_layout), batch.tgt_layout)
    assert torch.equal(self_cond, denoiser.to_self_cond(estimate)) and not torch.equal(
        self_cond, estimate
    )


@pytest.mark.parametrize("measure", ["distance", "probability"])
def test_confidence_is_of_the_right_token(measure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("fastdiss", mans_strength=0.5, mans_confidence=measure)
    batch = make_batch([[5, 2]] * 2, [[6, 7, 2], [8, 2]])
    taken: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(
            "fastdiss_cli.models.fastdiss.perturbed_self_conditioning",
            lambda denoise, tell, confidence, *rest, **named: taken.append(confidence),
        )
        denoiser = Denoiser(
            model, model.encode(batch.src_tokens, batch.src_layout), batch.tgt_layout
        )
        z_0 = model.embedding(batch.tgt_tokens)
        model.condition(denoiser, z_0, torch.randn_like(z_0), batch.tgt_tokens, update=1)
    estimate = torch.randn_like(z_0)
    found = taken[0](estimate)
    for row, column in ((0, 0), (0, 2), (1, 1)):
        right, z0_hat = int(batch.tgt_tokens[row, column]), estimate[row, column]
        probability = model.embedding.logits(z0_hat[None])[0].softmax(0)[right]
        distance = (z0_hat - z_0[row, column]).square().mean()
        wanted = distance if measure == "distance" else probability
        torch.testing.assert_close(found[row, column], wanted)


def test_training_runs_on_what_was_chosen() -> None:
    """z_t of unrolled sentences is that of the condition, z_t of others is the noised z_0."""
    model, sentences = make_model("fastdiss", scp_unroll=0.5), random_sentences(40)
    chosen, seen = [], []
    condition, denoise = model.condition, model.denoise
    model.condition = lambda *given: chosen.append(condition(*given)) or chosen[0]
    model.denoise = lambda *given: seen.append(given) or denoise(*given)
    model.loss(make_batch(sentences, sentences), update=1)
    z_t, t, self_cond, *_ = seen[-1]
    assert t is chosen[0].network_t and self_cond is chosen[0].self_cond
    sampled, which = chosen[0].unrolled
    rows = (z_t == sampled).all(-1).all(-1)
    assert torch.equal(rows, which[:, 0, 0]) and 5 < rows.sum() < 35


@pytest.mark.parametrize("grid", ["uniform", "log-snr"])
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_losses_by_time_compare_like_with_like(rate: float, grid: str) -> None:
    """A batch has the same noise for every condition, and impossible conditions have no row."""
    model = make_model("difformer", self_cond_rate=rate)
    batches = [make_batch(some, some) for some in (random_sentences(3), random_sentences(2))]
    drawn: dict[tuple[float, float | None], list[float]] = {}

    def losses_at(batch: Batch, t: float, later: float | None) -> tuple[torch.Tensor, torch.Tensor]:
        drawn.setdefault((t, later), []).append(float(torch.rand(())))
        torch.rand(3 if later else 1)  # as an estimate draws more than none
        return torch.ones(()), torch.ones(())

    model.losses_at = losses_at
    batcher = SimpleNamespace(epoch=lambda epoch: [0, 1], collate=batches.__getitem__)
    options = model.Decoding(steps=4, time_grid=grid)
    rows = by_time(model, options, partial(mean_losses, model, batcher, torch.float32))
    for t in {t for t, _ in drawn}:
        ways = [noise for (time, _), noise in drawn.items() if time == t]
        assert all(noise == ways[0] for noise in ways) and len(set(ways[0])) == 2
    fresh, stale = ([f"mse_{condition}" in row for row in rows] for condition in ("fresh", "stale"))
    assert fresh == [rate > 0] * 10
    assert stale == [rate > 0 and row["t"] < (0.76 if grid == "uniform" else 0.98) for row in rows]

    def place(t: float) -> float:
        """The coordinate that the steps of the grid divide evenly, from 0 to 1."""
        if grid == "uniform":
            return t
        high, here, low = (
            math.log(model.schedule.alpha(at) / model.schedule.sigma(at))
            for at in torch.tensor([0.001, t, 0.999])
        )
        return (high - here) / (high - low)

    for t, later in drawn:
        if later not in (None, t):
            assert place(later) - place(t) == pytest.approx(0.25, abs=1e-3)


def test_pairs_of_very_different_length_are_reported() -> None:
    model = make_model("difformer", max_length_offset=5)
    src, tgt = np.array([3, 9, 20, 4]), np.array([8, 3, 3, 10], dtype=np.uint16)
    output = model.misfits(src, tgt)
    assert "3 of 4 pairs" in output and "max_length_offset = 5" in output
    assert model.misfits(src[:1], tgt[:1]) is None
    assert make_model("transformer").misfits(src, tgt) is None


def test_only_one_and_the_same_vocabulary_is_shared() -> None:
    arch = architecture("transformer_tiny")
    sides = [Vocabulary(12, 0, 1, 2, hash=name) for name in ("one", "other")]
    for src in sides:
        model = arch.family(arch.config(SMALL), src, sides[0])
        assert (model.encoder.embedding is model.embedding) == (src is sides[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_frozen_model_decodes_as_the_trained_one(family: str) -> None:
    model, sources = make_model(family), random_sentences(32)
    for p in model.parameters():
        p.add_(0.05 * torch.randn_like(p))  # biases start as zeros
    wanted = answers(model, sources, 200)
    freeze(model, torch.float32)
    assert not any(isinstance(m, torch.nn.Linear) for m in model.modules())
    assert answers(model, sources, 200) == wanted


def test_a_linear_layer_of_ones_own_stays() -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = torch.nn.Sequential(torch.nn.Linear(4, 4), Doubled(4, 4)).eval()
    x = torch.randn(3, 4)
    wanted = model(x)
    freeze(model, torch.float32)
    torch.testing.assert_close(model(x), wanted)


def test_a_module_prepares_itself_for_decoding() -> None:
    """Diffusion models normalise their table once, not in every step."""
    model = make_model("difformer")
    assert model.embedding.rows() is not model.embedding.rows()
    freeze(model, torch.float32)
    assert model.embedding.rows() is model.embedding.rows()


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
    """If the embeddings are orthogonal."""
    V = D = 32
    embedding = LatentEmbedding(V, D, "matched", smoothing)
    embedding.rows = lambda: torch.eye(V) * D**0.5
    probabilities = embedding.logits(embedding.rows()).softmax(-1)
    wanted = torch.full((V, V), smoothing / V).fill_diagonal_(1 - smoothing + smoothing / V)
    torch.testing.assert_close(probabilities, wanted)
