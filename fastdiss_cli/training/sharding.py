"""Sharding: weights, gradients, moments and average divided among the ranks, by torch's FSDP2.

A rank owns a part of every tensor, cut along its first dimension. A group of weights is gathered
where a batch first needs it, and given back as soon as its gradient is known, which goes to the
ranks that own it. Weights stay gathered in between, although FSDP could drop them after each use:
self-conditioning lets ranks pass through the network different numbers of times, and who gathers
oftener than the others would wait for ever. So the weights must fit as a whole into one process,
as they must for `generate`, and nothing else must.
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
    """Divide a model's weights among the ranks; its only use from then on is ``loss``.

    Args:
        model: the same on all ranks; changed in place.
        processes: this process among the others; with one there is nothing to divide.

    Raises:
        FastdissError: this torch or this model cannot be sharded.
    """
    if processes.world_size == 1:
        logs.warn("train.shard divides a model among processes, and there is one: see torchrun")
        return
    if processes.device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        raise FastdissError(f"train.shard on a CPU needs a newer torch than {torch.__version__}")
    layers = [module for module in model.modules() if isinstance(module, Layer)]
    if not layers:
        raise FastdissError(
            "train.shard divides the layers of fastdiss_cli.models.layers, and this model has none"
        )
    for name, p in model.named_parameters():
        if p.dim() == 0:
            raise FastdissError(f"train.shard cannot divide {name}, which has no dimension")
    # keys and values are projected before the layers that they belong to are called
    early = [m.key_value for m in model.modules() if isinstance(m, CrossAttention)]
    with processes.naming_the_lost():
        mesh = init_device_mesh(processes.device.type, (processes.world_size,))
        model.gradient_factor = _gradient_factor(mesh)
    for module in [*early, *layers, model]:
        # a weight goes to the first module given that contains it, so inner modules come first
        fully_shard(module, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(model, "loss")


def _gradient_factor(mesh: DeviceMesh) -> float:
    """Return what makes FSDP's gradients the sum over the ranks.

    It means to leave the mean, but gloo in torch 2.7 takes a mean for a sum: so it is tried out.
    """
    probe = nn.Linear(1, mesh.size(), bias=False, device=mesh.device_type)  # a weight for each
    fully_shard(probe, mesh=mesh)
    probe(torch.ones(1, 1, device=mesh.device_type)).sum().backward()
    return mesh.size() / float(probe.weight.grad.to_local())


@torch.no_grad()
def sum_and_clip(model: nn.Module, max_norm: float, processes: Processes) -> Tensor:
    """Turn what FSDP has left of the ranks' gradients into their sum, and clip it.

    Args:
        model: a sharded one, after its backward passes.
        max_norm: to which the gradient is clipped.
        processes: this process among the others.

    Returns:
        The norm before clipping, of the gradient as a whole.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    own = [p.grad.to_local() for p in parameters]
    torch._foreach_mul_(own, model.gradient_factor)
    (square,) = processes.sum([float(torch.nn.utils.get_total_norm(own)) ** 2])
    norm = torch.tensor(math.sqrt(square), device=processes.device)
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def divide(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Cut the tensors of a checkpoint as the weights that they belong to are cut.

    Args:
        tensors: by the names that `Checkpoint` gives them; those of no weight stay whole.
        model: where it is not sharded they all stay as they are.
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
    """Put tensors together that are divided: on the first rank, in its host's memory.

    The other ranks help, with one whole tensor at a time in memory, and get nothing.
    """
    gathered = {}
    for name, tensor in tensors.items():
        whole = _whole(tensor, processes)
        if processes.rank == 0:
            gathered[name] = whole if whole is tensor else whole.cpu()
    return gathered


@torch.no_grad()
def gather_into(model: M, weights: dict[str, Tensor], processes: Processes) -> M:
    """Copy divided weights, by name, into a model that every rank holds as a whole; return it."""
    for name, p in model.named_parameters():
        p.copy_(_whole(weights[name], processes))
    return model


def _whole(tensor: Tensor, processes: Processes) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    with processes.naming_the_lost():
        return tensor.full_tensor()


def is_sharded(model: nn.Module) -> bool:
    """Tell whether `shard` has divided a model."""
    return isinstance(model, FSDPModule)
