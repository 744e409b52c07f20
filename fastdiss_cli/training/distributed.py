"""Several processes under torchrun: who am I, and sums and lists over all ranks."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastdiss_cli import logs


class Processes:
    """The process group; with one process every call is the identity.

    Under torchrun (which sets RANK, WORLD_SIZE and LOCAL_RANK) the group is made on entry: nccl
    on GPUs, gloo on CPUs. Ranks other than 0 are quiet.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.device = device
        if device.type == "cuda" and self.world_size > 1:
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)

    def __enter__(self) -> Processes:
        if self.world_size > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
            if self.rank:
                logs.quiet()
        return self

    def __exit__(self, *_: object) -> None:
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def sum(self, values: list[float]) -> list[float]:
        """Add up numbers over all ranks."""
        if self.world_size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Add up gradients over all ranks, in one message; a missing gradient counts as 0."""
        if self.world_size == 1:
            return
        grads = []
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            grads.append(p.grad)
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        summed = flat.split([grad.numel() for grad in grads])
        for grad, total in zip(grads, summed, strict=True):
            grad.copy_(total.view_as(grad))

    def gather(self, items: list[Any]) -> list[Any]:
        """Concatenate lists over all ranks, on every rank."""
        if self.world_size == 1:
            return items
        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        if self.world_size > 1:
            dist.barrier()
