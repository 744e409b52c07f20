"""The one exception that means: the user can mend this."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FastdissError(Exception):
    """An expected failure, told to the user in one line: what, where, and how to mend it."""

    def __str__(self) -> str:  # what it quotes, such as the name of a file, may hold line breaks
        return " ".join(super().__str__().splitlines())


def suggest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
