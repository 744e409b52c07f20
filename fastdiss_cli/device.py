"""Where to compute and in which type."""

from __future__ import annotations

import ctypes
import platform
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Lock

import torch

from fastdiss_cli.config import DTYPES
from fastdiss_cli.errors import OptionError, suggest

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # of <malloc.h>
# what torch's CPU allocator, cuBLAS and cuDNN say
_OUT_OF_MEMORY = (
    "can't allocate memory", "not enough memory", "out of memory", "STATUS_ALLOC_FAILED",
)  # fmt: skip


def keep_freed_memory() -> None:
    """Tell glibc to keep the memory of freed tensors, instead of returning it after every use.

    For a process of our own: it is a setting of the whole process, which an importing program has
    not asked for. Without it a fifth of a small model's training on a CPU is the kernel clearing
    fresh pages. Other C libraries go on as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the largest value that glibc takes
    mallopt(_M_TRIM_THRESHOLD, 1 << 30)
    mallopt(_M_TOP_PAD, 64 << 20)


def pick_device(name: str | torch.device) -> torch.device:
    """Return the device of a ``--device`` value; ``auto`` is a GPU where there is one.

    Raises:
        OptionError: no such device.
    """
    name = str(name)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    # asked for, not tried out: that would take memory of a GPU that another process has
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    is_gpu = device is not None and device.type == "cuda" and (device.index or 0) < there
    if name != "cpu" and not is_gpu:
        others = "cpu, cuda or auto" if torch.cuda.is_available() else "cpu or auto"
        raise OptionError("device", f"{name}: no such device here; use {others}")
    return device


def pick_dtype(name: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Return the autocast type of ``--dtype``; ``auto`` is bfloat16 on GPUs that have it.

    Raises:
        OptionError: no such type.
    """
    name = str(name).removeprefix("torch.")
    if name not in DTYPES:
        known = ", ".join(DTYPES)
        raise OptionError("dtype", f"must be one of {known}, not {name!r}{suggest(name, DTYPES)}")
    if name == "auto":
        has_it = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bfloat16" if has_it else "float32"
    return getattr(torch, name)


def machine(device: torch.device) -> str:
    """Name what computes, for a report: the processor or the GPU, threads, torch."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    model = found[1] if found else platform.processor() or platform.machine()
    return f"{model}, {torch.get_num_threads()} threads, torch {torch.__version__}"


@contextmanager
def autocast(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Open the context in which a model computes in ``dtype``.

    On a GPU attention goes without cuDNN, which makes a plan for every shape that a batch has and
    takes up to half a second for it.
    """
    with ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(_without_cudnn)
        stack.enter_context(
            torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
        )
        yield


class _WithoutCudnn:
    """Attention without cuDNN while any thread is inside.

    The flag is one for the whole process, whatever thread sets it: the first to come notes what it
    was, and the last to leave restores that.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._before = Lock(), 0, True

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = torch.backends.cuda.cudnn_sdp_enabled()
                torch.backends.cuda.enable_cudnn_sdp(False)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                torch.backends.cuda.enable_cudnn_sdp(self._before)


_without_cudnn = _WithoutCudnn()


def out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception means that memory ran out, on a GPU or off it."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    said = str(error)
    return isinstance(error, RuntimeError) and any(sign in said for sign in _OUT_OF_MEMORY)
