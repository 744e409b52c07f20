"""Sharding: weights, gradients, moments and average divided among the ranks, by torch's FSDP2.

A rank owns a slice of every tensor along its first dimension. A group of weights is gathered when
a batch first needs it, and freed as soon as its gradient is known and reduced to its owners.
Weights stay gathered in between, although FSDP could free them after each use: with
self-conditioning, ranks run the network different numbers of times, and a rank that gathers more
often than the others would wait forever. So only the weights must fit into each process as a
whole, as they must for `generate`.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from fastdiss_cli import logs
from fastdiss_cli.distributed import Processes
from fastdiss_cli.errors import FastdissError
from fastdiss_cli.models.layers import CrossAttention, Layer

M = TypeVar("M", bound=nn.Module)


def shard(model: nn.Module, processes: Processes) -> None:
    """Shard a model's weights across the ranks; only its ``loss`` can be used from then on.

    Args:
        model: the same on all ranks; changed in place.
        processes: the process group; with one process there is nothing to shard.

    Raises:
        FastdissError: this torch or this model cannot be sharded.
    """
    if processes.world_size == 1:
        logs.warn("train.shard has no effect in a single process: start several with torchrun")
        return
    if processes.device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        raise FastdissError(f"train.shard on a CPU needs a newer torch than {torch.__version__}")
    layers = [module for module in model.modules() if isinstance(module, Layer)]
    if not layers:
        raise FastdissError(
            "train.shard needs layers of fastdiss_cli.models.layers, and this model has none"
        )
    for name, p in model.named_parameters():
        if p.dim() == 0:
            raise FastdissError(f"train.shard cannot divide {name}, which is a scalar")
    # cross-attention projects keys and values before its layer is called
    early = [m.key_value for m in model.modules() if isinstance(m, CrossAttention)]
    with processes.reporting_lost_peers():
        mesh = init_device_mesh(processes.device.type, (processes.world_size,))
        model.gradient_factor = _gradient_factor(mesh)
    for module in [*early, *layers, model]:
        # FSDP assigns a weight to the first module that contains it, so inner modules come first
        fully_shard(module, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(model, "loss")


def _gradient_factor(mesh: DeviceMesh) -> float:
    """Return the factor that turns FSDP's gradients into the sum over the ranks.

    FSDP averages, but gloo in torch 2.7 sums where it is asked for a mean: so the factor is
    measured.
    """
    # one weight per rank
    probe = nn.Linear(1, mesh.size(), bias=False, device=mesh.device_type)
    fully_shard(probe, mesh=mesh)
    probe(torch.ones(1, 1, device=mesh.device_type)).sum().backward()
    return mesh.size() / float(probe.weight.grad.to_local())


@torch.no_grad()
def sum_and_clip(model: nn.Module, max_norm: float, processes: Processes) -> Tensor:
    """Turn FSDP's gradients into the sum over the ranks, and clip it.

    Args:
        model: a sharded model, after its backward passes.
        max_norm: the norm that the gradient is clipped to.
        processes: the process group.

    Returns:
        The norm of the whole gradient before clipping.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    own = [p.grad.to_local() for p in parameters]
    torch._foreach_mul_(own, model.gradient_factor)
    (square,) = processes.sum([float(torch.nn.utils.get_total_norm(own)) ** 2])
    norm = torch.tensor(math.sqrt(square), device=processes.device)
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def divide(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Shard the tensors of a checkpoint like the weights that they belong to.

    Args:
        tensors: by their names in `Checkpoint`; those that belong to no weight stay whole.
        model: if it is not sharded, all tensors stay whole.
    """
    weights = dict(model.named_parameters())

    def part(name: str, whole: Tensor) -> Tensor:
        weight = weights.get(name.partition(".")[2].partition("/")[0])
        if not isinstance(weight, DTensor) or whole.shape != weight.shape:
            return whole
        pieces = whole.chunk(weight.device_mesh.size())
        rank = weight.device_mesh.get_local_rank()
        own = (pieces[rank] if rank < len(pieces) else whole[:0]).to(weight.device)
        how = (weight.device_mesh, weight.placements)
        return DTensor.from_local(own, *how, shape=whole.shape, stride=whole.stride())

    return {name: part(name, whole) for name, whole in tensors.items()}


@torch.no_grad()
def gather(tensors: dict[str, Tensor], processes: Processes) -> dict[str, Tensor]:
    """Gather sharded tensors on the first rank, in CPU memory; the other ranks get nothing.

    Those only take part, with one whole tensor at a time in memory.
    """
    gathered = {}
    for name, tensor in tensors.items():
        whole = _whole(tensor, processes)
        if processes.rank == 0:
            gathered[name] = whole if whole is tensor else whole.cpu()
    return gathered


@torch.no_grad()
def gather_into(model: M, weights: dict[str, Tensor], processes: Processes) -> M:
    """Copy sharded weights, by name, into a model that every rank holds whole; return it."""
    for name, p in model.named_parameters():
        p.copy_(_whole(weights[name], processes))
    return model


def _whole(tensor: Tensor, processes: Processes) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    with processes.reporting_lost_peers():
        return tensor.full_tensor()


def is_sharded(model: nn.Module) -> bool:
    """Return whether `shard` has sharded a model."""
    return isinstance(model, FSDPModule)
