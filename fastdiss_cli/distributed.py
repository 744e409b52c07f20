"""Processes under torchrun: ranks, collectives, and failures that all ranks share."""

from __future__ import annotations

import atexit
import os
import re
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastdiss_cli import logs
from fastdiss_cli.device import out_of_memory
from fastdiss_cli.errors import FastdissError, describe_bug
from fastdiss_cli.signals import BROKEN_PIPE, Stop, elected


class CommonError(FastdissError):
    """A failure of one rank that every rank raises and rank 0 reports."""


class Attempt:
    """Work of one rank whose failure is held back until all ranks can learn of it.

    Attributes:
        what: the work and its size, for the message.
        remedy: what to do if memory runs out.
        failure: the message, once the work has failed.

    Args:
        alone: raise a failure at once. The other ranks are inside collectives that this rank will
            never join, so they cannot be informed; they notice when it exits.
    """

    def __init__(self, what: str, remedy: str, where: str = "", alone: bool = False) -> None:
        self.what, self.remedy, self._where, self._alone = what, remedy, where, alone
        self.failure: str | None = None

    def __enter__(self) -> Attempt:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        _: TracebackType | None,
    ) -> bool:
        # no failure, a request to exit, or a reader of the output that is gone
        if not isinstance(error, Exception) or isinstance(error, BrokenPipeError):
            return False
        if isinstance(error, FastdissError):
            self.failure = f"{self._where}{error}"
        elif isinstance(error, OSError):
            self.failure = f"{self._where}{error.filename or self.what}: {error.strerror or error}"
        elif out_of_memory(error):
            self.failure = f"{self._where}out of memory in {self.what}: {self.remedy}"
        elif isinstance(error, dist.DistError) or "/gloo/" in str(error):
            self.failure = f"{self._where}{_gone(error)}"
        else:
            self.failure = f"{self._where}{self.what}: {describe_bug(error)}"
        if self._alone:
            raise FastdissError(self.failure) from None
        return True


class Processes:
    """The process group; with one process every collective is the identity.

    Under torchrun (which sets RANK, WORLD_SIZE and LOCAL_RANK) the group is created on entry: nccl
    on GPUs, gloo on CPUs. Ranks other than 0 log nothing.

    Args:
        device: where to compute; if there are several GPUs, each rank uses its own.
        patience: how long collectives wait for a live but unresponsive rank; None: torch's
            default, 10 or 30 minutes.
    """

    def __init__(self, device: torch.device, patience: timedelta | None = None) -> None:
        self._patience = patience
        self.rank = _from_environment("RANK", 0)
        self.world_size = _from_environment("WORLD_SIZE", 1)
        if self.rank >= self.world_size:
            raise FastdissError(
                f"RANK is {self.rank} but WORLD_SIZE is {self.world_size}: start the processes "
                "with torchrun, or unset both"
            )
        self.device = device
        if device.type == "cuda" and self.world_size > 1:
            local, count = _from_environment("LOCAL_RANK", 0), torch.cuda.device_count()
            if local >= count:
                raise FastdissError(
                    f"local rank {local}: this machine has {count} GPU(s), for one process each; "
                    f"start torchrun with --nproc-per-node {count}, or set LOCAL_RANK=0 where a "
                    "process sees only its own GPU"
                )
            self.device = torch.device("cuda", local)
            torch.cuda.set_device(self.device)
        if self.rank:
            logs.quiet()

    def __enter__(self) -> Processes:
        if self.world_size > 1:
            with self.reporting_lost_peers():
                try:
                    on_gpu = self.device.type == "cuda"
                    dist.init_process_group(
                        "nccl" if on_gpu else "gloo",
                        timeout=self._patience,
                        device_id=self.device if on_gpu else None,
                    )
                except ValueError as error:
                    raise FastdissError(
                        f"WORLD_SIZE is {self.world_size}, but the processes cannot connect "
                        f"({' '.join(str(error).split())}): start them with torchrun, or unset it"
                    ) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        common = isinstance(error, CommonError)
        if self.world_size == 1:
            return
        if error is not None and not common:
            # a rank that fails alone does not wait for the others, which notice by themselves, and
            # skips torch's shutdown, in which a thread without its peer may abort the interpreter
            codes = {KeyboardInterrupt: 130, BrokenPipeError: BROKEN_PIPE}
            code = codes.get(type(error), getattr(error, "code", 1))
            # torchrun ends the others with it, maybe before the error is reported
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            atexit.register(_leave, code)
            return
        if common and self.rank == 0:
            logs.error(str(error))
        self.barrier()  # torchrun kills the others as soon as one rank has exited
        dist.destroy_process_group()
        if common:
            raise SystemExit(1)

    def sum(self, values: list[float]) -> list[float]:
        """Return the element-wise sum of the values over all ranks."""
        if self.world_size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        with self.reporting_lost_peers():
            dist.all_reduce(total)
        return total.tolist()

    def sum_gradients(self, parameters: Iterable[Tensor], failed: bool) -> float:
        """Sum gradients over all ranks in one all-reduce.

        A missing gradient counts as 0; one that no rank has stays missing, as in one process.

        Args:
            parameters: their gradients are replaced by the sum.
            failed: whether this rank failed to compute its own; sent in the same all-reduce.

        Returns:
            The number of ranks that failed.
        """
        if self.world_size == 1:
            return float(failed)
        weights = list(parameters)
        counts = [float(failed), *(float(p.grad is not None) for p in weights)]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in weights]
        flat = torch.cat([*(grad.flatten() for grad in grads), grads[0].new_tensor(counts)])
        with self.reporting_lost_peers():
            dist.all_reduce(flat)
        *summed, counts_everywhere = flat.split([*(p.numel() for p in weights), len(counts)])
        failures, *present = counts_everywhere.tolist()
        for p, total, ranks in zip(weights, summed, present, strict=True):
            p.grad = total.view_as(p) if ranks else None
        return failures

    def gather(self, items: list[Any]) -> list[Any]:
        """Concatenate lists over all ranks, on every rank."""
        if self.world_size == 1:
            return items
        parts: list[Any] = [None] * self.world_size
        with self.reporting_lost_peers():
            dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            with self.reporting_lost_peers():
                dist.barrier()

    def attempt(
        self, what: str, remedy: str = "lower --max-tokens", alone: bool = False
    ) -> Attempt:
        """Return an `Attempt` of this rank."""
        return Attempt(what, remedy, f"rank {self.rank}: " if self.world_size > 1 else "", alone)

    def agree(self, attempt: Attempt, stop: Stop) -> int:
        """Exchange failures and signals; all ranks must call this at the same point.

        Returns:
            The signal that any rank received, or 0.

        Raises:
            CommonError: the attempt of any rank failed.
        """
        *votes, failed = self.sum([*stop.votes, float(attempt.failure is not None)])
        self.fail_together(attempt, failed)
        return elected(votes)

    def fail_together(self, attempt: Attempt, failed: float) -> None:
        """Raise the failure of the lowest failed rank on all ranks, if ``failed`` is not 0."""
        if failed:
            raise CommonError(self.gather([attempt.failure] if attempt.failure else [])[0])

    @contextmanager
    def reporting_lost_peers(self) -> Iterator[None]:
        """Report in one line that another process is gone, whatever the transport's message."""
        try:
            yield
        except RuntimeError as error:
            if out_of_memory(error) or "CUDA error" in str(error):  # this rank's own, raised late
                raise
            raise FastdissError(f"rank {self.rank} of {self.world_size}: {_gone(error)}") from None


def _from_environment(name: str, default: int) -> int:
    """Return a variable that torchrun sets, or the default if it is not set."""
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise FastdissError(f"{name} is {value!r}, not a number: use torchrun, or unset it")
    return int(value)


def _gone(error: BaseException) -> str:
    # strip torch's source location before the reason and its advice after it
    reason = re.sub(r"^\[[^]]*] *", "", str(error).strip()).split("\n")[0].split(". ")[0]
    return (
        f"another process has ended or cannot be reached ({reason}); see its output, then run "
        "the same command again"
    )


def _leave(code: int) -> None:
    """Exit at once, after flushing stdout and stderr."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
