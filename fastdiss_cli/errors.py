"""The exceptions that mean: the user can mend this."""

from __future__ import annotations

import difflib
import os
import traceback
from collections.abc import Iterable
from pathlib import Path


class FastdissError(Exception):
    """An expected failure, told to the user in one line: what, where, and how to mend it."""

    def __str__(self) -> str:  # what it quotes, such as the name of a file, may hold line breaks
        return " ".join(super().__str__().splitlines())


class OptionError(FastdissError):
    """An option that cannot have its value; a command says by which of its flags it was given.

    Attributes:
        option: its name, after its section and a dot where it has one.
        reason: what its value must be.
    """

    def __init__(self, option: str, reason: str) -> None:
        super().__init__(f"{option} {reason}")
        self.option, self.reason = option, reason

    def __reduce__(self) -> tuple[type[OptionError], tuple[str, str]]:  # between processes
        return type(self), (self.option, self.reason)


def suggest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def describe_bug(error: BaseException) -> str:
    """Say in one line what was raised and where, in code that may be a user's own.

    With FASTDISS_TRACEBACK in the environment, the whole stack is printed before.
    """
    if os.environ.get("FASTDISS_TRACEBACK"):
        traceback.print_exception(error)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if f"{os.sep}torch{os.sep}" not in frame.filename]
    at = f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{at}"
