"""The output layer fused with its cross-entropy, without holding all logits at once."""
# P tokens of a batch, D inputs of the output layer, V vocabulary

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiss_cli.device import compute_dtype

# logits per chunk: on a CPU as many as fit its cache, on a GPU enough to keep launches few
_CHUNK = {"cpu": 2**21, "cuda": 2**26}


def linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy of ``softmax(x weight^T + bias)`` with smoothed labels.

    It equals ``F.cross_entropy`` of ``F.linear``, but computes the gradient along with the value,
    one chunk of tokens at a time, so that [P, V] is never in memory as a whole and is read and
    written less often (as in Hsu et al. 2024, Liger kernel).

    Args:
        x: float [P, D].
        weight, bias: float [V, D] and [V], or None.
        targets: int64 [P].
        label_smoothing: the probability mass that is spread over all V, in [0, 1).

    Returns:
        The loss, and the loss without smoothing, which has no gradient (both 0-d).
    """
    if not torch.is_grad_enabled():  # parameters would still require a gradient
        x, weight = x.detach(), weight.detach()
        bias = None if bias is None else bias.detach()
    return _LinearCrossEntropy.apply(x, weight, bias, targets, label_smoothing)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, smoothing: float
    ) -> tuple[Tensor, Tensor]:
        kind, (P, V) = x.device.type, (len(x), len(weight))
        dtype = compute_dtype(x)
        inputs = x, weight, bias
        grads = [
            torch.zeros_like(tensor) if needed else None
            for tensor, needed in zip(inputs, ctx.needs_input_grad, strict=False)
        ]
        losses = x.new_zeros(2, dtype=torch.float32)
        rows = max(1, _CHUNK.get(kind, 2**26) // V)
        with torch.autocast(kind, enabled=False):
            x, weight = x.to(dtype), weight.to(dtype)
            for start in range(0, P, rows):
                here = slice(start, start + rows)
                gold = targets[here, None]
                logits = F.linear(x[here], weight).float()
                if bias is not None:
                    logits += bias
                highest = logits.amax(1, keepdim=True)
                of_gold, mean = logits.gather(1, gold), logits.mean(1, keepdim=True)
                probs = logits.sub_(highest).exp_()
                total = probs.sum(1, keepdim=True)
                norm = highest + total.log()
                losses[0] += (norm - (1 - smoothing) * of_gold - smoothing * mean).sum()
                losses[1] += (norm - of_gold).sum()
                if not any(ctx.needs_input_grad):
                    continue
                grad = probs.div_(total * P).sub_(smoothing / V / P)
                grad.scatter_add_(1, gold, grad.new_full(gold.shape, -(1 - smoothing) / P))
                if grads[2] is not None:
                    grads[2] += grad.sum(0)
                grad = grad.to(dtype)
                if grads[0] is not None:
                    grads[0][here] = grad @ weight
                if grads[1] is not None:
                    grads[1] += grad.T @ x[here]
        ctx.save_for_backward(*grads)
        loss, nll = losses[0] / P, losses[1] / P  # no views, of which FSDP warns
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (None if made is None else made * grad for made in ctx.saved_tensors)
        return *scaled, None, None
