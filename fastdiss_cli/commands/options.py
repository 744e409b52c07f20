"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
