"""The gradient of one batch, and what is said if it cannot be computed."""
# B batch, S source length, T target length

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdiss_cli.config import TrainConfig
from fastdiss_cli.data.batching import Batch
from fastdiss_cli.device import autocast
from fastdiss_cli.distributed import Attempt, Processes
from fastdiss_cli.models.registry import Seq2SeqModel
from fastdiss_cli.training import sharding


def update_attempt(processes: Processes, config: TrainConfig) -> Attempt:
    """Return an attempt of this rank at its batches of an update."""
    remedy = (
        f"lower --max-tokens (now {config.max_tokens}) and raise --update-freq as much; "
        "a run that has begun takes the change with --accept-changes"
    )
    return processes.attempt("an update", remedy, alone=config.shard)


def describe_batch(update: int, batch: Batch) -> str:
    """Say what is being computed, for the message if it fails."""
    (B, S), T = batch.src_tokens.shape, batch.tgt_tokens.shape[1]
    return (
        f"update {update}, in a batch of {B} sentences padded to {S} source x {T} target positions"
    )


def add_gradient(
    model: Seq2SeqModel, batch: Batch, update: int, share: float, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Add the gradient of a batch to that of the model.

    Args:
        model: in training mode.
        update: the number of the update.
        share: what the batch weighs in the update.
        dtype: bfloat16 computes under autocast.

    Returns:
        The loss and its parts, weighted.
    """
    device = next(model.parameters()).device
    with autocast(device, dtype):
        loss = model.loss(batch.to(device), update)
    (loss.total * share).backward()
    losses = {"loss": loss.total, **loss.parts}
    return {name: value.detach() * share for name, value in losses.items()}


def sum_and_clip(
    model: Seq2SeqModel, config: TrainConfig, processes: Processes, tried: Attempt
) -> Tensor:
    """Add up the gradients over all ranks and clip the sum; return its norm before that.

    Raises:
        CommonError: a rank has failed in its ``tried``.
    """
    max_norm = config.clip_norm or math.inf
    if sharding.is_sharded(model):
        return sharding.sum_and_clip(model, max_norm, processes)
    if tried.failure:
        model.zero_grad(set_to_none=True)  # the others wait for this rank's message
    failed = processes.sum_gradients(model.parameters(), bool(tried.failure))
    processes.fail_together(tried, failed)
    return torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
