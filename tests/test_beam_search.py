"""The autoregressive reference: beam search, its cache, and the likelihood of given answers."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from networks import SMALL, VOCAB, make_model, random_sentences
from torch import Tensor

from fastdiss_cli.data.batching import pad
from fastdiss_cli.data.layout import Layout
from fastdiss_cli.models.beam_search import BeamDecoding, beam_search
from fastdiss_cli.models.layers import Cache
from fastdiss_cli.models.registry import Hypothesis, Vocabulary, architecture


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


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
    """With a beam as wide as the search space, the answer is the brute-force optimum."""
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


def test_lengths_are_bounded_as_configured() -> None:
    model, sources = make_model("transformer"), random_sentences(6)
    memory = model.encode(*pad(sources, VOCAB.pad))
    for low, high in ((1, 3), (4, 4), (2, 7)):
        options = model.Decoding(beam=3, min_len=low, max_len_b=high)
        found = model.decode(memory, torch.arange(6), options)
        assert all(low <= len(h.tokens) <= high for row in found for h in row)
    found = []
    for low in (0, 5, 100):  # the minimum counts, even above what the source allows
        options = model.Decoding(beam=3, min_len=low, max_len_a=0.5, max_len_b=2)
        for source, row in zip(
            sources, model.decode(memory, torch.arange(6), options), strict=True
        ):
            found += [len(h.tokens) for h in row]
            limit = max(low, len(source) // 2 + 2)
            assert low <= min(found[-3:]) and max(found[-3:]) <= limit
    assert {len(source) // 2 + 2 for source in sources} & {*found[:36]}  # eos is forced there
    assert {*found[36:]} == {100}


def test_log_likelihood_is_the_score_of_beam_search() -> None:
    model, sources = make_model("transformer"), random_sentences(4)
    memory = model.encode(*pad(sources, VOCAB.pad))
    found = model.decode(memory, torch.arange(4), model.Decoding(beam=3, max_len_b=12))
    likelihood = model.log_likelihood(memory, [h.tokens for row in found for h in row])
    scores = torch.tensor([h.score for row in found for h in row])
    # beam search cannot choose bos or pad, whose small share of the probability it spreads
    torch.testing.assert_close(likelihood, scores, rtol=0.1, atol=0.1)


# beam search against a plain one, on scores that are a function of the prefix

WORDS, EOS = 7, 2


def scores_after(prefix: tuple[int, ...], sentence: int) -> Tensor:
    """Return arbitrary but fixed scores of the next token, [WORDS]."""
    digest = hashlib.sha256(repr((prefix, sentence)).encode()).digest()
    draw = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
    return (2 * torch.randn(WORDS, generator=draw)).index_fill(0, torch.arange(2), -math.inf)


@dataclass
class Sources:
    """A stand-in for the memory: the number and the length of each sentence."""

    numbers: Tensor
    lengths: Tensor

    @property
    def hidden(self) -> Tensor:
        return self.numbers

    @property
    def layout(self) -> SimpleNamespace:
        return SimpleNamespace(lengths=self.lengths)

    def select(self, rows: Tensor) -> Sources:
        return Sources(self.numbers[rows], self.lengths[rows])


class Prefixes:
    """A stand-in for the cache: the tokens of each row so far."""

    def __init__(self, rows: int) -> None:
        self.rows: list[tuple[int, ...]] = [()] * rows

    def select(self, order: Tensor) -> None:
        self.rows = [self.rows[i] for i in order.tolist()]


def plain_search(sentence: int, length: int, options: BeamDecoding) -> list[Hypothesis]:
    """Search as fairseq does: one sentence and one hypothesis at a time, without a cache."""
    K, limit = options.beam, int(options.max_len_a * length + options.max_len_b)
    beams: list[tuple[tuple[int, ...], list[float]]] = [((), [])]
    ended: list[tuple[float, tuple[int, ...], list[float]]] = []
    for position in range(limit + 1):
        continued = []
        for prefix, parts in beams:
            log_probs = scores_after(prefix, sentence).log_softmax(0).tolist()
            for token, log_prob in enumerate(log_probs):
                forced = position == limit and token != EOS
                early = position < min(options.min_len, limit) and token == EOS
                if math.isfinite(log_prob) and not forced and not early:
                    continued.append((sum(parts) + log_prob, prefix, [*parts, log_prob], token))
        continued.sort(key=lambda x: -x[0])
        for total, prefix, parts, token in continued[:K]:
            if token == EOS and len(ended) < K:
                ended.append((total / (position + 1) ** options.lenpen, prefix, parts))
        if len(ended) == K:
            break
        going_on = [x for x in continued[: 2 * K] if x[3] != EOS]
        beams = [((*prefix, token), parts) for _, prefix, parts, token in going_on[:K]]
    ended.sort(key=lambda x: -x[0])
    return [Hypothesis(list(ids), score, parts, position + 1) for score, ids, parts in ended]


@pytest.mark.parametrize("beam", [1, 2, 3, 5])
@pytest.mark.parametrize("lenpen", [0.0, 0.6, 2.0])
@pytest.mark.parametrize(("a", "b", "least"), [(0, 2, 1), (1, 1, 0), (0.5, 4, 1), (0, 8, 3)])
def test_batched_search_finds_what_plain_search_does(
    beam: int, lenpen: float, a: float, b: int, least: int
) -> None:
    options = BeamDecoding(beam=beam, lenpen=lenpen, max_len_a=a, max_len_b=b, min_len=least)
    numbers, lengths = torch.arange(5), torch.tensor([3, 1, 6, 2, 6])
    prefixes = Prefixes(5 * beam)

    def step(tokens: Tensor, position: int, memory: Any) -> Tensor:
        if position:
            newest = tokens.flatten().tolist()
            prefixes.rows = [(*row, t) for row, t in zip(prefixes.rows, newest, strict=True)]
        sentences = memory.numbers.repeat_interleave(beam).tolist()
        pairs = zip(prefixes.rows, sentences, strict=True)
        return torch.stack([scores_after(row, sentence) for row, sentence in pairs])

    found = beam_search(step, [prefixes], Sources(numbers, lengths), EOS, options)
    for number, hypotheses in enumerate(found):
        wanted = plain_search(number, int(lengths[number]), options)
        assert [h.tokens for h in hypotheses] == [h.tokens for h in wanted]
        for h, other in zip(hypotheses, wanted, strict=True):
            assert h.nfe == other.nfe and h.score == pytest.approx(other.score, abs=1e-4)
            assert h.token_scores == pytest.approx(other.token_scores, abs=1e-4)
