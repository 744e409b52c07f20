"""fastdiss: few-step continuous diffusion for sequence-to-sequence text.

The Python API is one function: ``fastdiss_cli.load(path).generate(["ein Hund ."], steps=5)``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastdiss_cli.api import load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> object:
    # torch takes seconds to import: `fastdiss --help` must not wait for it
    if name == "load":
        from fastdiss_cli.api import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
