"""Options that several commands share."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
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


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise typer.BadParameter(f"{name!r} is not one of auto, cpu, cuda and cuda:N")
    return name


Device = Annotated[
    str,
    typer.Option(
        help="auto, cpu, cuda or cuda:N.",
        callback=_device,
        autocompletion=lambda incomplete: completed(("auto", "cpu", "cuda"), incomplete),
        rich_help_panel="Machine",
    ),
]
UserModule = Annotated[
    Path | None,
    typer.Option(metavar="FILE.py", help="A Python file that registers your own models."),
]


def choice(
    words: Sequence[str],
    help: str,
    panel: Mapping[str, str] = MappingProxyType({}),
    checked: bool = True,
) -> Any:
    """Return an option that takes one of the given words, with shell completion.

    Args:
        words: the words, at least two.
        help: the help text; ``{}`` in it is replaced by the words.
        panel: the panel of the help.
        checked: reject other words at once; False if a user's module may add more.
    """
    listed = f"{', '.join(words[:-1])} or {words[-1]}"

    def check(value: str | None) -> str | None:
        if checked and value is not None and value not in words:
            raise typer.BadParameter(
                f"{value!r} is not one of {', '.join(words)}{suggest(value, words)}"
            )
        return value

    return typer.Option(
        help=help.format(listed),
        autocompletion=lambda incomplete: completed(words, incomplete),
        callback=check,
        **panel,
    )


def complete_architecture(incomplete: str) -> list[str]:
    """Complete the name of an architecture; those of user modules are not known here."""
    return completed([f"{family}_{size}" for family in FAMILIES for size in SIZES], incomplete)


def completed(words: Sequence[str], incomplete: str) -> list[str]:
    """Return the words that start with ``incomplete``."""
    return [word for word in words if word.startswith(incomplete)]


def drawable(path: Path | None) -> Path | None:
    """Check, before any work is done, that a plot can be written.

    Raises:
        BadParameter: the suffix is not one of `PICTURE_FORMATS`.
        FastdissError: matplotlib is not installed.
    """
    if path is None:
        return None
    if path.suffix not in PICTURE_FORMATS:
        raise typer.BadParameter(f"{path}: the name must end in {', '.join(PICTURE_FORMATS)}")
    from fastdiss_cli.extras import load_extra

    load_extra("matplotlib", "plot", "a plot")
    return path
