"""AdamW, the learning-rate schedules and the moving average of the weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastdiss_cli.config import TrainConfig


def learning_rate(update: int, config: TrainConfig, end: int) -> float:
    """Return the learning rate of an update, counted from 1, in a training of ``end`` updates.

    Linear warm-up to ``lr``; then ``lr sqrt(warmup/update)`` (inverse_sqrt, as in fairseq) or half
    a cosine down to 0 at ``end`` (Loshchilov & Hutter 2017).
    """
    warmup = config.warmup_updates
    if update < warmup:
        return config.lr * update / warmup
    if config.lr_scheduler == "inverse_sqrt":
        return config.lr * math.sqrt(warmup / update)
    progress = (update - warmup) / max(end - warmup, 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(progress, 1)))


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW over a model's parameters, with weight decay on matrices only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.adam_betas, eps=1e-8, fused=True)


class EMA:
    """An exponential moving average of the weights.

    Early on, when there is little to average, the decay is lower: (1 + n) / (10 + n) after n
    updates, as in TensorFlow's ExponentialMovingAverage.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights: dict[str, Tensor] = {
            name: p.detach().clone() for name, p in model.named_parameters()
        }

    @torch.no_grad()
    def update(self, model: nn.Module, updates: int) -> None:
        """Move the average towards the model's weights after update number ``updates``."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        weights = [p.detach() for _, p in model.named_parameters()]
        torch._foreach_lerp_(list(self.weights.values()), weights, 1 - decay)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchange the average and the model's weights; a second call undoes the first."""
        for name, p in model.named_parameters():
            kept = p.detach().clone()
            p.copy_(self.weights[name])
            self.weights[name].copy_(kept)


def pack_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state as tensors named by weight and kind."""
    return {
        f"{name}/{kind}": value
        for name, p in model.named_parameters()
        for kind, value in optimizer.state.get(p, {}).items()
    }


def unpack_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, packed: dict[str, Tensor]
) -> None:
    """Restore what `pack_optimizer` returned."""
    own = dict(model.named_parameters())
    for key, value in packed.items():
        name, kind = key.rsplit("/", 1)
        # fused AdamW keeps its step counters on the device of the parameters
        optimizer.state[own[name]][kind] = value.clone().to(own[name].device)
