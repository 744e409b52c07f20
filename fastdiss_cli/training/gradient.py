"""The gradient of one batch, and the message if it cannot be computed."""
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
        f"lower --max-tokens (now {config.max_tokens}) and raise --update-freq by the same factor; "
        "to resume with this change, give --accept-changes"
    )
    return processes.attempt("an update", remedy, alone=config.shard)


def describe_batch(update: int, batch: Batch) -> str:
    """Describe what is being computed, for the message if it fails."""
    (B, S), T = batch.src_tokens.shape, batch.tgt_tokens.shape[1]
    return (
        f"update {update}, in a batch of {B} sentences padded to {S} source x {T} target positions"
    )


def add_gradient(
    model: Seq2SeqModel, batch: Batch, update: int, share: float, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Add the gradient of a batch to the model's.

    Args:
        model: the model, in training mode.
        update: the number of the update, from 1.
        share: the weight of the batch in the update.
        dtype: float32, or bfloat16 for autocast.

    Returns:
        The loss and its parts, weighted.
    """
    device = model.device
    with autocast(device, dtype):
        loss = model.loss(batch.to(device), update)
    (loss.total * share).backward()
    losses = {"loss": loss.total, **loss.parts}
    return {name: value.detach() * share for name, value in losses.items()}


def sum_and_clip(
    model: Seq2SeqModel, config: TrainConfig, processes: Processes, attempt: Attempt
) -> Tensor:
    """Sum the gradients over all ranks and clip the sum; return its norm before clipping.

    Raises:
        CommonError: the ``attempt`` of a rank failed.
    """
    max_norm = config.clip_norm or math.inf
    if sharding.is_sharded(model):
        return sharding.sum_and_clip(model, max_norm, processes)
    if attempt.failure:
        model.zero_grad(set_to_none=True)  # still take part: the other ranks wait for this one
    failed = processes.sum_gradients(model.parameters(), bool(attempt.failure))
    processes.fail_together(attempt, failed)
    return torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
