"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import typer

from fastdiss_cli.errors import suggest
from fastdiss_cli.models import FAMILIES, SIZES

PICTURE_FORMATS = (".png", ".svg", ".pdf")

SourceLang = Annotated[
    str | None,
    typer.Option(
        "--source-lang",
        "-s",
        help="Source language, for a fairseq data-bin that serves both directions.",
    ),
]
TargetLang = Annotated[
    str | None,
    typer.Option(
        "--target-lang",
        "-t",
        help="Target language, for a fairseq data-bin that serves both directions.",
    ),
]
UserModule = Annotated[
    Path | None,
    typer.Option(metavar="FILE.py", help="A Python file that registers models of your own."),
]


def choice(
    words: Sequence[str],
    help: str,
    panel: Mapping[str, str] = MappingProxyType({}),
    checked: bool = True,
) -> Any:
    """Return an option that takes one of some words, which a shell completes.

    Args:
        words: at least two.
        help: ``{}`` in it names them.
        panel: of the help.
        checked: refuse other words at once; False where a user's own module may bring more.
    """
    named = f"{', '.join(words[:-1])} or {words[-1]}"

    def check(value: str | None) -> str | None:
        if checked and value is not None and value not in words:
            raise typer.BadParameter(
                f"{value!r} is none of {', '.join(words)}{suggest(value, words)}"
            )
        return value

    completed = {"autocompletion": _completer(words), "callback": check}
    return typer.Option(help=help.format(named), **completed, **panel)


def complete_architecture(incomplete: str) -> list[str]:
    """Complete the name of an architecture; a user's own are not known here."""
    return _completer([f"{family}_{size}" for family in FAMILIES for size in SIZES])(incomplete)


def _completer(words: Sequence[str]) -> Callable[[str], list[str]]:
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]


def drawable(path: Path | None) -> Path | None:
    """Check, before any work is done, that a picture can be drawn.

    Raises:
        FastdissError: matplotlib is not installed.
    """
    if path is None:
        return None
    if path.suffix not in PICTURE_FORMATS:
        raise typer.BadParameter(f"{path}: the name must end in {', '.join(PICTURE_FORMATS)}")
    from fastdiss_cli.extras import load_extra

    load_extra("matplotlib", "plot", "a plot")
    return path
