"""The output layer with its loss: value and gradient are those of torch's two functions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastdiss_cli.models import cross_entropy
from fastdiss_cli.models.cross_entropy import linear_cross_entropy

P, D, V = 53, 8, 31


@pytest.fixture(params=[1, 7, 100])
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tokens per chunk: one, some with a remainder, all."""
    monkeypatch.setattr(cross_entropy, "_CHUNK", {"cpu": request.param * V})
    return request.param


def inputs(bias: bool) -> tuple[list[torch.Tensor], torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(P, D), (V, D), (V,)][: 2 + bias]
    return [torch.randn(s, requires_grad=True) for s in shapes], torch.randint(V, (P,))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_value_and_gradient_are_those_of_torch(rows: int, bias: bool, smoothing: float) -> None:
    given, targets = inputs(bias)
    logits = F.linear(*given)
    wanted = F.cross_entropy(logits, targets, label_smoothing=smoothing)
    loss, nll = linear_cross_entropy(*given, *([] if bias else [None]), targets, smoothing)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(nll, F.cross_entropy(logits, targets).detach())
    assert not nll.requires_grad
    grads = [torch.autograd.grad(3 * value, given) for value in (wanted, loss)]
    for theirs, ours in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_large_logits_neither_overflow_nor_vanish() -> None:
    (x, weight), targets = inputs(bias=False)
    loss, _ = linear_cross_entropy(1000 * x, weight, None, targets, 0.1)
    torch.testing.assert_close(
        loss, F.cross_entropy(F.linear(1000 * x, weight), targets, label_smoothing=0.1)
    )
    assert torch.autograd.grad(loss, x)[0].isfinite().all()


def test_autocast_computes_the_products_in_bfloat16() -> None:
    (x, weight, bias), targets = inputs(bias=True)
    exact, _ = linear_cross_entropy(x, weight, bias, targets, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = linear_cross_entropy(x, weight, bias, targets, 0.1)
    assert loss.dtype == torch.float32 and loss != exact
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)
    for a, b in zip(torch.autograd.grad(loss, (x, weight, bias)), (x, weight, bias), strict=True):
        assert a.dtype == b.dtype == torch.float32


def test_no_gradient_is_made_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    given, targets = inputs(bias=True)
    monkeypatch.setattr(torch, "zeros_like", lambda *_: pytest.fail("made for a gradient"))
    with torch.no_grad():
        loss, _ = linear_cross_entropy(*given, targets, 0.1)
    assert not loss.requires_grad
