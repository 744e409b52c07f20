"""Device and number type of the computation."""

from __future__ import annotations

import ctypes
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from threading import Lock

import torch

from fastdiss_cli import logs
from fastdiss_cli.config import DTYPES
from fastdiss_cli.errors import OptionError, suggest

CPUINFO = Path("/proc/cpuinfo")
_BFLOAT16 = re.compile(r"\b(avx512_bf16|amx_bf16|bf16)\b")  # x86 and ARM
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # of <malloc.h>
# from the messages of torch's CPU allocator, cuBLAS and cuDNN
_OUT_OF_MEMORY = (
    "can't allocate memory", "not enough memory", "out of memory", "STATUS_ALLOC_FAILED",
)  # fmt: skip


def keep_freed_memory() -> None:
    """Make glibc keep the memory of freed tensors instead of returning it to the kernel.

    Otherwise the kernel's clearing of fresh pages takes a fifth of a small model's training time
    on a CPU. For the commands only: the setting is process-wide, and a program that imports this
    package has not asked for it. Other C libraries are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the largest value that glibc accepts
    mallopt(_M_TRIM_THRESHOLD, 1 << 30)
    mallopt(_M_TOP_PAD, 64 << 20)


def pick_device(name: str | torch.device) -> torch.device:
    """Return the device for a ``--device`` value; ``auto`` is a GPU if there is one.

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
    # counted, not tried out: that would take memory on a GPU that another process may be using
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    is_gpu = device is not None and device.type == "cuda" and (device.index or 0) < count
    is_cpu = device is not None and device.type == "cpu" and not device.index
    if not is_cpu and not is_gpu:
        others = "cpu, cuda or auto" if torch.cuda.is_available() else "cpu or auto"
        raise OptionError("device", f"{name}: no such device here; use {others}")
    return device


def pick_dtype(name: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Return the type for a ``--dtype`` value; ``auto`` is bfloat16 on GPUs that support it.

    bfloat16 on a CPU that has no instructions for it gives a warning.

    Raises:
        OptionError: no such type.
    """
    name = str(name).removeprefix("torch.")
    if name not in DTYPES:
        known = ", ".join(DTYPES)
        raise OptionError("dtype", f"must be one of {known}, not {name!r}{suggest(name, DTYPES)}")
    if name == "auto":
        name = "float32"
        if device.type == "cuda":
            with torch.cuda.device(-1 if device.index is None else device.index):  # GPUs may differ
                if torch.cuda.is_bf16_supported(including_emulation=False):
                    name = "bfloat16"
    on_cpu = device.type == "cpu" and CPUINFO.exists()
    if name == "bfloat16" and on_cpu and not _BFLOAT16.search(CPUINFO.read_text()):
        logs.warn("this CPU has no instructions for bfloat16: float32 may be much faster")
    return getattr(torch, name)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a type, as `pick_dtype` takes it."""
    return str(dtype).removeprefix("torch.")


def machine(device: torch.device) -> str:
    """Describe the machine for a report: CPU and threads or GPU, and the version of torch."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    found = re.search(r"model name\s*: (.*)", CPUINFO.read_text()) if CPUINFO.exists() else None
    model = found[1] if found else platform.processor() or platform.machine()
    return f"{model}, {torch.get_num_threads()} threads, torch {torch.__version__}"


@contextmanager
def autocast(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Enter the context in which a model computes in ``dtype``.

    On a GPU it disables cuDNN attention, which spends up to half a second on a plan for every new
    batch shape.
    """
    without_cudnn = _without_cudnn if device.type == "cuda" else nullcontext()
    bfloat16 = dtype == torch.bfloat16
    with without_cudnn, torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
        yield


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the type that a matrix product of x has here: that of autocast, or its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _WithoutCudnn:
    """Disable cuDNN attention while any thread is inside.

    The flag is process-wide: the first thread to enter saves its value, and the last one to leave
    restores it.
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
    """Return whether an exception means that memory ran out, on a GPU or a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    message = str(error)
    return isinstance(error, RuntimeError) and any(part in message for part in _OUT_OF_MEMORY)
