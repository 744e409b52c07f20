"""How a diffusion model decodes: candidates, options of sampling, early exits, replayed graphs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from networks import VOCAB, answers, make_batch, make_model, random_sentences

from fastdiss_cli.data.batching import pad
from fastdiss_cli.data.layout import Layout
from fastdiss_cli.decoding.generation import Run, SequenceGenerator
from fastdiss_cli.decoding.selection import by_score
from fastdiss_cli.diffusion.solvers import SOLVERS
from fastdiss_cli.errors import FastdissError
from fastdiss_cli.models.candidates import Candidates
from fastdiss_cli.models.denoiser import Denoiser
from fastdiss_cli.models.diffusion_decoding import TEMPERATURE, DiffusionDecoding
from fastdiss_cli.models.graphs import GraphCache
from fastdiss_cli.models.layers import Memory
from fastdiss_cli.models.registry import Hypothesis, Seq2SeqModel


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class Replayed(GraphCache):
    """Runs, from the first call, what a GPU would capture as a graph."""

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
    answers(model, sources[:1], 1, seed=2, **options)
    assert model.graphs.runs[-1][0] in keys  # the noise is given, not captured
    before = len(model.graphs.runs)
    answers(model, sources, 150, early_exit=True)  # it depends on the answers what comes next
    answers(model, sources[:2], 150, steps=100)
    answers(model, [[5] * 1500 + [VOCAB.eos]], 2000, steps=1)  # too large to be kept
    assert len(model.graphs.runs) == before


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("self_cond", ["reuse", "none", "recompute"])
def test_what_a_gpu_replays_never_waits_for_it(
    solver: str, self_cond: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the device `meta`, which has no values, whatever reads one fails."""
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


def test_a_graph_is_captured_where_the_model_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for torch.cuda, with the first device current, record where a capture begins."""
    current, captured = ["cuda:0"], []

    class Stream:
        def __init__(self, device: str = "") -> None:
            self.device = device or current[0]

        def wait_stream(self, other: Stream) -> None:
            assert other.device == self.device

    @contextmanager
    def on(device: str) -> Iterator[None]:
        before, current[0] = current[0], device
        yield
        current[0] = before

    @contextmanager
    def capture(graph: object, pool: object, stream: Stream, **_: Any) -> Iterator[None]:
        captured.append((pool, stream, stream.device, current[0]))
        yield

    class Input:  # a tensor there
        device = "cuda:1"

        def clone(self) -> Input:
            return self

    cuda = SimpleNamespace(
        Stream=Stream,
        device=on,
        stream=lambda stream: on(stream.device),
        current_stream=Stream,
        CUDAGraph=lambda: SimpleNamespace(replay=lambda: None),
        graph=capture,
        graph_pool_handle=object,
    )
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(torch, "_foreach_copy_", lambda *_: None)
    graphs = GraphCache()
    for key in ("a", "b", "a"):
        graphs.run(key, lambda x: (x,), [Input()])
    assert len(captured) == graphs.captured == 2
    assert len({(pool, stream) for pool, stream, *_ in captured}) == 1  # they share their memory
    assert {where for *_, where in captured} == {"cuda:1"} == {c[2] for c in captured}
    assert current == ["cuda:0"]


def test_other_sentences_and_seeds_draw_other_noise() -> None:
    model, sources = make_model("difformer"), random_sentences(4)
    memory = model.encode(*pad(sources, VOCAB.pad))
    first, other, reseeded = (
        [h[0].score for h in model.decode(memory, torch.arange(4) + n, model.Decoding(seed=seed))]
        for n, seed in ((0, 1), (4, 1), (0, 2))
    )
    assert len({tuple(first), tuple(other), tuple(reseeded)}) == 3


def test_solvers_are_told_apart() -> None:
    model, sources = make_model("difformer"), random_sentences(4)
    memory = model.encode(*pad(sources, VOCAB.pad))

    def scores(solver: str, steps: int) -> list[float]:
        options = model.Decoding(solver=solver, steps=steps)
        return [h[0].score for h in model.decode(memory, torch.arange(4), options)]

    assert len({tuple(scores(solver, 4)) for solver in ("ddpm", "ddim", "dpm-solver++")}) == 3
    assert scores("ddpm", 1) == scores("ddim", 1)  # a single step makes no move


def test_what_is_read_are_the_best_tokens_and_their_log_probabilities() -> None:
    model = make_model("difformer")
    layout = Layout.of(torch.tensor([[False, False, True], [False, False, False]]))
    z0_hat = torch.randn(2, 3, model.config.latent_dim)
    scores, tokens = model.read(z0_hat, layout)
    logits = model.embedding.logits(z0_hat)
    logits[..., [VOCAB.bos, VOCAB.pad]] = -math.inf
    best = logits.log_softmax(-1).max(-1)
    own = ~layout.pad_mask
    torch.testing.assert_close(scores[own], best.values[own])
    assert torch.equal(tokens[own], best.indices[own]) and not scores[0, 2]


def test_more_lengths_than_there_are_is_refused() -> None:
    model, sources = make_model("difformer", max_length_offset=3), random_sentences(2)
    memory = model.encode(*pad(sources, VOCAB.pad))
    assert len(model.decode(memory, torch.arange(2), model.Decoding(length_beam=4))[0]) == 4
    model.check_decoding(model.Decoding(length_beam=4))
    with pytest.raises(FastdissError, match=r"length_beam must be at most 4, .* not 5"):
        model.check_decoding(model.Decoding(length_beam=5))


def test_the_most_likely_lengths_are_tried() -> None:
    """Offsets from -3 to 3, the largest the most likely; none gives a length below 1."""
    model, sources = make_model("difformer", max_length_offset=3), [[5, 2], [5, 6, 7, 8, 2]]
    model.length_head.weight.zero_()
    model.length_head.bias.copy_(torch.tensor([6.0, 5, 0, 1, 2, 3, 7]))
    model.embedding.bias[VOCAB.eos] = -100
    memory = model.encode(*pad(sources, VOCAB.pad))
    short, long = model.decode(memory, torch.arange(2), model.Decoding(length_beam=4))
    assert {len(h.tokens) for h in short} == {2 + 3, 2 + 2, 2 + 1, 2 + 0}
    assert {len(h.tokens) for h in long} == {5 + 3, 5 - 3, 5 - 2, 5 + 2}
    total = sum(map(math.exp, (6, 5, 0, 1, 2, 3, 7)))
    weights = {len(h.tokens): h.weight for h in long}
    assert weights == pytest.approx({8: math.exp(7) / total, 2: math.exp(6) / total,
                                     3: math.exp(5) / total, 7: math.exp(3) / total})  # fmt: skip
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
    estimates, right = [], model.denoise
    model.denoise = lambda z, t, self_cond, *more: (
        estimates.append(self_cond),
        right(z, t, self_cond, *more),
    )[1]
    options = model.Decoding(self_cond="gold", noise_beam=2)
    found = model.decode(memory, torch.arange(3), options, gold)
    tokens, layout = pad([tokens for tokens in gold for _ in range(2)], VOCAB.pad)
    mask = layout.pad_mask
    assert len(estimates) == 5
    for self_cond in estimates:
        assert torch.equal(self_cond[~mask], model.embedding(tokens)[~mask])
    for row, wanted in zip(found, gold, strict=True):
        assert len(row) == 2 and all(len(h.token_scores) <= len(wanted) for h in row)


def test_a_model_without_self_conditioning_gets_no_estimate() -> None:
    model, sources = make_model("difformer", self_cond_rate=0.0), random_sentences(5)
    memory = model.encode(*pad(sources, VOCAB.pad))
    modes = [
        model.decode(memory, torch.arange(5), model.Decoding(steps=3, self_cond=mode))
        for mode in ("none", "reuse", "recompute")
    ]
    for (first,), *others in zip(*modes, strict=True):
        assert all(h.tokens == first.tokens and h.nfe == 3 for (h,) in others)


def test_what_is_the_same_in_all_steps_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sources = make_model("fastdiss"), random_sentences(4)
    calls, right = [], model.sketch
    monkeypatch.setattr(model, "sketch", lambda *of: (calls.append(1), right(*of))[1])
    model.decode(model.encode(*pad(sources, VOCAB.pad)), torch.arange(4), model.Decoding(steps=5))
    assert len(calls) == 1
    model.train().loss(make_batch(sources, sources), update=1)
    assert len(calls) == 2


@pytest.mark.parametrize("self_cond", ["reuse", "gold"])
def test_an_early_exit_stops_sentences_that_do_not_change(self_cond: str) -> None:
    """Other sentences are unaffected; one that stops has the tokens of the step before."""
    model, sources = make_model("difformer"), random_sentences(24)
    model.embedding.bias.normal_(
        std=4
    )  # otherwise an untrained model changes its answer in every step
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


@pytest.mark.parametrize(("probability", "cost"), [(0.51, 2), (0.49, 6)])
def test_an_early_exit_waits_until_the_network_is_sure(probability: float, cost: int) -> None:
    model, sources = make_model("difformer"), random_sentences(5)
    model.latent_out.weight.zero_()
    model.latent_out.bias.zero_()  # all estimates are 0, so that only the bias tells tokens apart
    others = VOCAB.size - 1
    model.embedding.bias.zero_()
    model.embedding.bias[7] = math.log(others * probability / (1 - probability))
    memory = model.encode(*pad(sources, VOCAB.pad))
    options = model.Decoding(steps=6, early_exit=True)
    found = [h for (h,) in model.decode(memory, torch.arange(5), options)]
    assert {h.nfe for h in found} == {cost} and {t for h in found for t in h.tokens} == {7}


def test_a_sentence_is_settled_when_all_its_candidates_are() -> None:
    """Two candidates each: the same tokens in two steps, confident both times."""
    before = torch.arange(10)[:, None].expand(10, 3)
    sure_before = torch.tensor([1, 1, 1, 1, 0, 1, 1, 1, 1, 1]).bool()
    tokens, sure = before.clone(), torch.tensor([1, 1, 1, 1, 1, 1, 0, 1, 1, 1]).bool()
    tokens[3, 2] = 22
    memory = Memory(torch.zeros(5, 2, 32), Layout.of(torch.zeros(5, 2) > 0), [])
    denoiser = Denoiser(make_model("difformer"), memory, Layout.of(torch.zeros(10, 3) > 0))
    rows = torch.arange(10)
    options = DiffusionDecoding(early_exit=True)
    running = Candidates(denoiser, options, rows // 2, rows % 2, torch.zeros(10, 2, 0))
    running.best = before, sure_before
    assert running.drop() is None
    running.best = tokens, sure
    assert running.drop().tolist() == [2, 3, 4, 5, 6, 7]
    assert running.seeds.tolist() == [1, 1, 2, 2, 3, 3] and len(denoiser.memory.hidden) == 3
    running.best = tokens[2:8], torch.ones(6).bool()
    assert running.drop().tolist() == [4, 5]  # was not sure before


@pytest.mark.parametrize("solver", ["ddim", "dpm-solver++"])
def test_an_early_exit_with_every_solver(solver: str) -> None:
    model, sources = make_model("difformer"), random_sentences(24)
    model.embedding.bias.normal_(std=4)
    memory = model.encode(*pad(sources, VOCAB.pad))
    options = model.Decoding(steps=12, solver=solver, early_exit=True)
    assert len({h.nfe for (h,) in model.decode(memory, torch.arange(24), options)}) > 1


def decided(length_offset: int = 0) -> Seq2SeqModel:
    """Return an untrained model that is confident of some words, and of the answers' lengths."""
    model = make_model("difformer", max_length_offset=3)
    model.embedding.bias.normal_(std=4)
    model.length_head.weight.zero_()
    model.length_head.bias.zero_()[3 + length_offset] = 9
    return model


def test_the_nfe_of_a_run_is_what_its_sentences_took() -> None:
    model, sources = decided(), random_sentences(24)
    run = Run(model.Decoding(steps=8, early_exit=True))
    SequenceGenerator(model, by_score, 100).decode(sources, [run])
    costs = [h.nfe for h in run.best]
    assert run.nfe == sum(costs) and len(set(costs)) > 1


def test_what_the_solver_takes_for_an_estimate_matters() -> None:
    model, sources = make_model("difformer"), random_sentences(4)
    assert model.config.self_cond_form == "expected"
    plain = answers(model, sources, 100, steps=4)
    assert answers(model, sources, 100, steps=4, clamp="expected") == plain
    raw, nearest = (answers(model, sources, 100, steps=4, clamp=c) for c in ("raw", "nearest"))
    assert raw != plain and nearest != plain and raw != nearest


def test_an_answer_that_ends_early_has_a_score_for_its_eos() -> None:
    """As in fairseq: a sentence's P- line has a value for eos, and its score is their mean."""
    model, sources = decided(length_offset=3), random_sentences(40)
    model.embedding.bias[VOCAB.eos] = model.embedding.bias.max()
    memory = model.encode(*pad(sources, VOCAB.pad))
    found = [h for (h,) in model.decode(memory, torch.arange(40), model.Decoding(history=True))]
    ended = [len(h.tokens) < len(s) + 3 for h, s in zip(found, sources, strict=True)]
    assert any(ended) and not all(ended)
    for h, early in zip(found, ended, strict=True):
        assert len(h.token_scores) == len(h.tokens) + early
        assert h.score == pytest.approx(sum(h.token_scores) / len(h.token_scores))


def test_all_candidates_count_in_the_size_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sources = make_model("difformer"), random_sentences(40)
    sizes: list[tuple[int, int]] = []
    right = model.decode

    def decode(memory: Any, *given: Any) -> list[list[Hypothesis]]:
        sizes.append(memory.hidden.shape[:2])
        return right(memory, *given)

    monkeypatch.setattr(model, "decode", decode)
    run = Run(model.Decoding(steps=1, noise_beam=2, length_beam=2))
    SequenceGenerator(model, by_score, 80).decode(sources, [run])
    assert sum(count for count, _ in sizes) == 40
    assert max(4 * count * length for count, length in sizes) <= 80
    assert any(4 * (count + 1) * length > 80 and count > 1 for count, length in sizes)


def test_neighbouring_lengths_share_a_graph() -> None:
    model = decided()
    model.graphs = Replayed()
    for length in (9, 15, 17):
        answers(model, [[*range(4, 3 + length), VOCAB.eos]], 100)
    first, second, third = (key for key, *_ in model.graphs.runs)
    assert first == second != third
