"""fastdiss: few-step continuous diffusion for sequence-to-sequence text.

The Python API: ``load(path).generate(["ein Hund ."], steps=5)``, and ``score``; see `docs/api.md`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastdiss_cli.api import load, score

__version__ = "0.1.0"
__all__ = ["__version__", "load", "score"]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> object:
    # importing torch takes seconds: `fastdiss --help` must not wait for it
    if name in ("load", "score"):
        from fastdiss_cli import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
