"""Batches: every sentence exactly once an epoch, within the budget, the same on every run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastdiss_cli.data.batching import TokenBatcher, batches_by_tokens, pad
from fastdiss_cli.errors import FastdissError

SRC_PAD, TGT_PAD = 1, 300
Lengths = list[tuple[int, int]]  # source and target length of each pair

length_lists = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=3, max_size=60)
bounded = settings(max_examples=80, derandomize=True, deadline=None)


class Side:
    """A stand-in for `TokenFile`: sentence ``i`` repeats the id ``first_id + i``."""

    stem = Path("x.src")

    def __init__(self, lengths: list[int], first_id: int) -> None:
        self.sizes = np.array(lengths, np.int32)
        self.first_id = first_id

    def gather(self, sentences: np.ndarray) -> np.ndarray:
        return np.repeat(self.first_id + sentences, self.sizes[sentences])


def batchers(
    lengths: Lengths,
    ranks: int = 1,
    max_tokens: int = 100,
    max_positions: int = 512,
    seed: int = 1,
) -> list[TokenBatcher]:
    """Return the batcher of each rank."""
    src = Side([length for length, _ in lengths], 1000)
    tgt = Side([length for _, length in lengths], 5000)
    fixed = (src, tgt, SRC_PAD, TGT_PAD, max_tokens, max_positions, seed)
    return [TokenBatcher(*fixed, rank, ranks) for rank in range(ranks)]


def schedule(batcher: TokenBatcher, epoch: int) -> list[list[int]]:
    return [batch.tolist() for batch in batcher.epoch(epoch)]


def some_lengths(count: int, seed: int = 0) -> Lengths:
    return np.random.default_rng(seed).integers(1, 30, (count, 2)).tolist()


@pytest.mark.parametrize("ranks", [1, 2, 3])
@bounded
@given(lengths=length_lists, max_tokens=st.integers(1, 300), epoch=st.integers(0, 5))
@example(lengths=[(9, 9)] * 4, max_tokens=9, epoch=1)  # four batches, which 3 ranks cannot share
@example(lengths=[(9, 9)] * 5, max_tokens=9, epoch=1)
@example(lengths=[(9, 9)] * 3, max_tokens=100, epoch=1)
def test_every_sentence_once_an_epoch(
    ranks: int, lengths: Lengths, max_tokens: int, epoch: int
) -> None:
    schedules = [schedule(batcher, epoch) for batcher in batchers(lengths, ranks, max_tokens)]
    assert len({len(batches) for batches in schedules}) == 1
    batches = [batch for of_rank in schedules for batch in of_rank]
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(batches)
    over_budget = [
        batch
        for batch in batches
        if len(batch) > 1 and len(batch) * max(max(lengths[i]) for i in batch) > max_tokens
    ]
    # only if there are too few sentences to give every rank another batch
    assert len(over_budget) < ranks
    assert not over_budget or len(batches) + ranks > len(lengths)


@bounded
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60), max_tokens=st.integers(1, 200)
)
def test_runs_stay_within_the_budget(lengths: list[int], max_tokens: int) -> None:
    order = np.argsort(lengths, kind="stable")
    batches = batches_by_tokens(order, np.array(lengths, int), max_tokens)
    assert [i for batch in batches for i in batch] == order.tolist()
    for batch, after in zip(batches, [*batches[1:], None], strict=True):
        longest = max(lengths[i] for i in batch)
        assert len(batch) == 1 or len(batch) * longest <= max_tokens
        if after is not None:  # and no batch is cut too early
            assert (len(batch) + 1) * max(longest, lengths[after[0]]) > max_tokens


def test_batches_are_filled() -> None:
    lengths = some_lengths(2000)
    (batcher,) = batchers(lengths, max_tokens=400)
    area = sum(len(batch) * max(max(lengths[i]) for i in batch) for batch in batcher.epoch(1))
    assert area > 0.9 * 400 * len(batcher.epoch(1))


@pytest.mark.parametrize("max_tokens", [1000, 4000, 8000])
def test_little_is_padding(max_tokens: int) -> None:
    """At most six percent, with lengths like those of 29,000 captions and their translations."""
    draw = np.random.default_rng(0)
    target = 6 + draw.gamma(4.0, 2.5, 29_000)
    source = np.maximum(target + draw.normal(0, 3.5, target.shape), 3)
    (batcher,) = batchers(np.stack([source, target], 1).astype(int).tolist(), 1, max_tokens)
    batches = batcher.epoch(1)
    for sizes in (batcher.src.sizes, batcher.tgt.sizes):
        assert sizes.sum() > 0.93 * sum(len(batch) * sizes[batch].max() for batch in batches)


def test_an_epoch_is_a_function_of_seed_and_number() -> None:
    lengths = some_lengths(300)
    (one,), (again,) = batchers(lengths), batchers(lengths)
    (other,) = batchers(lengths, seed=2)
    third = schedule(one, 3)
    assert schedule(one, 3) == schedule(again, 3) == third
    assert len({str(schedule(one, epoch)) for epoch in range(6)}) == 6
    assert schedule(other, 3) != third
    # the batches differ in their sentences, too, not only in their order
    assert {frozenset(batch) for batch in third} != {frozenset(b) for b in schedule(one, 4)}


def test_long_and_short_sentences_are_mixed_over_the_epoch() -> None:
    lengths = some_lengths(1000)
    (batcher,) = batchers(lengths)
    longest = [max(max(lengths[i]) for i in batch) for batch in batcher.epoch(1)]
    half = len(longest) // 2
    assert longest != sorted(longest)
    assert abs(np.mean(longest[:half]) - np.mean(longest[half:])) < 3


@bounded
@given(rows=st.lists(st.lists(st.integers(2, 99), max_size=9), min_size=1, max_size=9))
def test_padding(rows: list[list[int]]) -> None:
    tokens, layout = pad(rows, 1)
    mask = layout.pad_mask
    assert tokens.dtype == torch.int64 and mask.dtype == torch.bool
    assert tokens.shape == mask.shape == (len(rows), max(map(len, rows)))
    for row, padded, hidden in zip(rows, tokens.tolist(), mask.tolist(), strict=True):
        assert padded == row + [1] * (len(padded) - len(row))
        assert hidden == [False] * len(row) + [True] * (len(padded) - len(row))


def test_collate_reads_both_sides() -> None:
    lengths = [(3, 1), (1, 4), (2, 2)]
    (batcher,) = batchers(lengths)
    batch = batcher.collate(np.array([2, 0]))
    assert batch.src_tokens.tolist() == [[1002, 1002, SRC_PAD], [1000, 1000, 1000]]
    assert batch.tgt_tokens.tolist() == [[5002, 5002], [5000, TGT_PAD]]
    assert torch.equal(batch.src_layout.pad_mask, batch.src_tokens == SRC_PAD)
    assert torch.equal(batch.tgt_layout.pad_mask, batch.tgt_tokens == TGT_PAD)
    assert batch.num_tgt_tokens == 3
    assert {t.dtype for t in (batch.src_tokens, batch.tgt_tokens)} == {torch.int64}
    moved = batch.to(torch.device("cpu"))
    assert torch.equal(moved.src_tokens, batch.src_tokens) and moved.num_tgt_tokens == 3


def test_longer_sentences_are_left_out_and_counted() -> None:
    lengths = [(5, 5), (11, 5), (5, 11), (10, 10), (1, 1), (40, 40)]
    (batcher,) = batchers(lengths, max_positions=10)
    assert batcher.left_out == 3
    assert sorted(i for batch in schedule(batcher, 1) for i in batch) == [0, 3, 4]
    (batcher,) = batchers(lengths)
    assert batcher.left_out == 0


def test_too_few_sentences_for_the_processes() -> None:
    with pytest.raises(FastdissError, match="1 of 2 sentences have at most 10 tokens, too few"):
        batchers([(5, 5), (5, 11)], ranks=2, max_positions=10)
    with pytest.raises(FastdissError, match=r"0 of 1 sentences .* raise train.max_positions"):
        batchers([(5, 5)], max_positions=4)
    with pytest.raises(FastdissError, match=r"1 sentences, too few for 2 .*: start fewer"):
        batchers([(5, 5)], ranks=2)
