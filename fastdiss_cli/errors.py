"""Exceptions for failures that the user can fix."""

from __future__ import annotations

import difflib
import os
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path

LONGEST = 400  # characters of an unexpected exception that are shown
USER_MODULE = "fastdiss_user_module:"  # before the path: the name of a --user-module in sys.modules


class FastdissError(Exception):
    """An expected failure, reported to the user in one line: what, where and how to fix it."""

    def __str__(self) -> str:  # quoted text, such as a file name, may contain line breaks
        return " ".join(super().__str__().splitlines())


class OptionError(FastdissError):
    """An option with an invalid value; commands report the flag that it was given by.

    Attributes:
        option: the option's name, with ``section.`` in front if it has a section.
        reason: the rest of the message, such as ``must be at least 1, not 0``.
    """

    def __init__(self, option: str, reason: str) -> None:
        super().__init__(f"{option} {reason}")
        self.option, self.reason = option, reason

    def __reduce__(self) -> tuple[type[OptionError], tuple[str, str]]:  # pickled between processes
        return type(self), (self.option, self.reason)


def suggest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def describe_bug(error: BaseException) -> str:
    """Describe an unexpected exception in one line: what was raised, and where.

    That is a line of the user's module if one was being executed, else the last one outside torch.
    If FASTDISS_TRACEBACK is set in the environment, print the full traceback first.
    """
    if os.environ.get("FASTDISS_TRACEBACK"):
        traceback.print_exception(error)
    frames = traceback.extract_tb(error.__traceback__)
    users = [name.removeprefix(USER_MODULE) for name in sys.modules if name.startswith(USER_MODULE)]
    torchs = f"{os.sep}torch{os.sep}"
    own = [f for f in frames if torchs not in f.filename and not f.filename.startswith("<")]
    of_user = [frame for frame in own if frame.filename in users]
    at = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in (of_user or own)[-1:]]
    if users and not of_user:
        at.append(f"with --user-module {', '.join(users)}")
    message = " ".join(str(error).split())
    if len(message) > LONGEST:  # a failed compilation has all that the compiler wrote
        message = f"{message[:LONGEST]}... (all of it with FASTDISS_TRACEBACK=1)"
    what = f"{type(error).__name__}: {message}"
    return what if isinstance(error, SyntaxError) else f"{what} ({', '.join(at)})"
