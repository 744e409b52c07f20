"""Counter-based draws: known answers, independence of shape, and normality."""

from __future__ import annotations

import math

import pytest
import torch

from fastdiss_cli.randomness import (
    counter_normal,
    counter_seed,
    draw_keys,
    philox,
    round_keys,
    seed_everything,
)

# from the kat_vectors file of Random123, for philox4x32 with 10 rounds
KNOWN = [
    ([0] * 6, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 6, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
]


@pytest.mark.parametrize(("words", "expected"), KNOWN)
def test_philox_gives_the_published_answers(words: list[int], expected: list[int]) -> None:
    keys, counter = round_keys(torch.tensor(words[:2])), torch.tensor(words[2:])[:, None]
    assert [int(word) for word in philox(keys, tuple(counter))] == expected


def noise(sentences: list[int], candidates: list[int], **other: int) -> torch.Tensor:
    options = {"seed": 1, "step": 0, "length": 7, "dim": 10, **other}
    keys = draw_keys(options["seed"], options["step"] + 1)[..., options["step"] :]
    rows = torch.tensor(sentences), torch.tensor(candidates)
    return counter_normal(keys, *rows, options["length"], options["dim"])[0]


def test_noise_depends_on_nothing_but_its_counters() -> None:
    alone = noise([5], [2])
    among = noise([9, 5, 5], [0, 2, 1])
    assert torch.equal(alone[0], among[1])
    assert torch.equal(alone[0, :3], noise([5], [2], length=3)[0])


def test_draws_made_together_are_those_made_alone() -> None:
    sentences, candidates = torch.tensor([5, 2**40]), torch.tensor([0, 3])
    keys = draw_keys(1, 5)
    together = counter_normal(keys, sentences, candidates, length=7, dim=10)
    for k, draw in enumerate(together):
        alone = counter_normal(keys[..., [k]], sentences, candidates, 7, 10)[0]
        assert torch.equal(draw, alone)


def test_every_counter_matters() -> None:
    draws = [
        noise([5], [2]), noise([6], [2]), noise([5], [3]), noise([5 + 2**32], [2]),
        noise([5], [2], seed=2), noise([5], [2], step=1),
    ]  # fmt: skip
    for i, a in enumerate(draws):
        for b in draws[:i]:
            assert not torch.isclose(a, b).any()


@pytest.mark.parametrize("dim", [1, 6, 64])
def test_noise_is_standard_normal(dim: int) -> None:
    z = noise(list(range(2000)), [0] * 2000, length=10, dim=dim)
    assert z.shape == (2000, 10, dim) and z.dtype == torch.float32
    assert abs(z.mean().item()) < 0.03 and abs(z.std().item() - 1) < 0.03
    assert (z**4).mean().item() == pytest.approx(3, abs=0.25)  # the kurtosis of a normal
    within = (z.abs() < 1.96).float().mean().item()
    assert within == pytest.approx(math.erf(1.96 / math.sqrt(2)), abs=0.01)


def test_coordinates_are_uncorrelated() -> None:
    z = noise(list(range(5000)), [0] * 5000, length=2, dim=6).flatten(1)
    off_diagonal = torch.corrcoef(z.T) - torch.eye(12)
    assert off_diagonal.abs().max() < 0.06


def test_seeds_do_not_run_together() -> None:
    assert counter_seed(1, 23) != counter_seed(12, 3)
    assert counter_seed(1, "train", 2) == counter_seed(1, "train", 2) < 2**63
    seed_everything(1, "train", 2)
    first = torch.rand(3)
    seed_everything(1, "train", 2)
    assert torch.equal(first, torch.rand(3))
