"""The optimizer: training against AdamW, clipping, schedule and average written by hand."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from runs import metrics, start
from torch import Tensor, nn

from fastdiss_cli.config import TrainConfig
from fastdiss_cli.errors import FastdissError
from fastdiss_cli.training import loop
from fastdiss_cli.training.optimizer import EMA, learning_rate


def test_learning_rates() -> None:
    config = TrainConfig(lr=1.0, warmup_updates=10, max_update=110)
    assert [learning_rate(u, config, 110) for u in (1, 5, 10, 40)] == [0.1, 0.5, 1.0, 0.5]
    cosine = dataclasses.replace(config, lr_scheduler="cosine")
    assert [learning_rate(u, cosine, 110) for u in (5, 10, 60, 110)] == pytest.approx(
        [0.5, 1, 0.5, 0]
    )
    without = dataclasses.replace(cosine, warmup_updates=0)
    assert [learning_rate(u, without, 110) for u in (0, 55, 110)] == pytest.approx([1, 0.5, 0])


def test_a_cosine_ends_with_the_epochs(data_bin: Path, tmp_path: Path) -> None:
    options = {"lr_scheduler": "cosine", "max_update": 10_000, "max_epoch": 2}
    training = start(data_bin, tmp_path, **options)
    training.run()
    end, rates = (
        training.progress.update,
        [line["lr"] for line in metrics(tmp_path) if "lr" in line],
    )
    config = training.config
    assert rates == [learning_rate(n, config, end) for n in range(1, end + 1)]
    assert end < 100 and max(rates) == config.lr and rates[-1] == 0
    with pytest.raises(
        FastdissError, match=r"train.max_epoch was 2 and is now 3 \(where the cosine"
    ):
        start(data_bin, tmp_path, **options | {"max_epoch": 3})


def test_the_average_follows_the_weights() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 0.0)
    ema = EMA(model, 0.5)
    nn.init.constant_(model.weight, 1.0)
    ema.update(model, updates=1)  # early: decay (1 + 1) / (10 + 1)
    assert ema.weights["weight"].item() == pytest.approx(1 - 2 / 11)
    ema.update(model, updates=1000)
    assert ema.weights["weight"].item() == pytest.approx(1 - 1 / 11)
    ema.swap(model)
    assert (model.weight.item(), ema.weights["weight"].item()) == pytest.approx((1 - 1 / 11, 1))


def test_accumulated_micro_batches_are_one_large_batch(data_bin: Path, tmp_path: Path) -> None:
    """The gradient is that of the mean over all tokens, however they are cut into batches."""
    training = start(data_bin, tmp_path, "transformer_tiny", seed=3)
    training.model.eval()
    training.model.train = lambda mode=True: training.model  # dropout stays off
    sentences = training.batcher.epoch(1)[0]
    grads = []
    for batches in ([sentences], [sentences[:2], sentences[2:]]):
        training.progress.update = 0
        training.config = dataclasses.replace(training.config, clip_norm=0.0)
        training._update(batches, training.batcher.num_tgt_tokens(sentences), rate=1e-12)
        grads.append([p.grad.clone() for p in training.model.parameters()])
    for whole, cut in zip(*grads, strict=True):
        torch.testing.assert_close(whole, cut, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"lr_scheduler": "cosine", "clip_norm": 0.7, "weight_decay": 0.3},
        {"adam_betas": [0.6, 0.8], "clip_norm": 0.0, "update_freq": 2},
    ],
)
def test_an_update_is_the_one_of_the_formula(
    data_bin: Path, tmp_path: Path, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the gradients of each update: Loshchilov & Hutter 2019, algorithm 2."""
    training = start(data_bin, tmp_path, lr=0.01, max_update=8, ema_decay=0.4, **options)
    config, named = training.config, dict(training.model.named_parameters())
    weights = {name: p.detach().double().clone() for name, p in named.items()}
    average = {name: p.clone() for name, p in weights.items()}
    gradients: list[dict[str, Tensor]] = []
    norms, right = [], loop.sum_and_clip

    def watched(model, *more):
        gradients.append({name: p.grad.double().clone() for name, p in named.items()})
        norms.append(right(model, *more).item())
        return torch.tensor(norms[-1])

    monkeypatch.setattr(loop, "sum_and_clip", watched)
    training.run()
    assert len(gradients) == 8
    first = {name: torch.zeros_like(p) for name, p in weights.items()}
    second = {name: torch.zeros_like(p) for name, p in weights.items()}
    beta, gamma = config.adam_betas
    for n, gradient in enumerate(gradients, 1):
        norm = math.sqrt(sum(g.square().sum().item() for g in gradient.values()))
        assert norms[n - 1] == pytest.approx(norm, rel=1e-4)
        share = min(config.clip_norm / norm, 1) if config.clip_norm else 1
        assert config.clip_norm == 0 or share < 1  # it is clipped
        lr = learning_rate(n, config, 8)
        for name, g in gradient.items():
            first[name] = beta * first[name] + (1 - beta) * share * g
            second[name] = gamma * second[name] + (1 - gamma) * (share * g).square()
            step = first[name] / (1 - beta**n)
            step = step / ((second[name] / (1 - gamma**n)).sqrt() + 1e-8)
            decay = config.weight_decay if weights[name].dim() >= 2 else 0
            weights[name] = weights[name] - lr * (step + decay * weights[name])
            kept = min(0.4, (1 + n) / (10 + n))
            average[name] = kept * average[name] + (1 - kept) * weights[name]
    for name, p in named.items():
        torch.testing.assert_close(p.double(), weights[name], rtol=1e-3, atol=2e-5)
        found = training.state.ema.weights[name].double()
        torch.testing.assert_close(found, average[name], rtol=1e-3, atol=2e-5)
