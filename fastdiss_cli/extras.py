"""Packages that only some commands need: the extras of the installation."""

from __future__ import annotations

import importlib
from types import ModuleType

from fastdiss_cli.errors import FastdissError


def load_extra(module: str, extra: str, what: str) -> ModuleType:
    """Import a package that is no requirement.

    Args:
        module: what to import.
        extra: the extra of this package that brings it.
        what: what needs it, for the message.

    Raises:
        FastdissError: it is not installed, or something that it needs is not.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise FastdissError(
            f"{what} needs {error.name or module}: pip install 'fastdiss[{extra}]'"
        ) from None
    except ValueError as error:  # as of MPLBACKEND with an unknown name
        raise FastdissError(f"{what}: {' '.join(str(error).split())}") from None
