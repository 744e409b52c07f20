"""Optional packages, which only some commands need."""

from __future__ import annotations

import importlib
from types import ModuleType

from fastdiss_cli.errors import FastdissError


def load_extra(module: str, extra: str, what: str) -> ModuleType:
    """Import an optional package.

    Args:
        module: the module to import.
        extra: the extra of fastdiss that installs it.
        what: the feature that needs it, for the message.

    Raises:
        FastdissError: it or one of its dependencies is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise FastdissError(
            f"{what} needs {error.name or module}: pip install 'fastdiss[{extra}]'"
        ) from None
    except ValueError as error:  # e.g. an unknown MPLBACKEND
        raise FastdissError(f"{what}: {' '.join(str(error).split())}") from None
