"""fastdiss export, or average: checkpoints -> one file for release."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from fastdiss_cli import logs
from fastdiss_cli.errors import FastdissError

_OF_TRAINING = re.compile(r"checkpoint_(last|best|\d+_\d+)\.safetensors")


def export(
    context: typer.Context,
    checkpoints: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[CHECKPOINT|DIR]...",
            help="A folder stands for its checkpoint_best. (default: checkpoints)",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="The file to write. (default: model.safetensors; averaged.safetensors by average)",
        ),
    ] = None,
    last: Annotated[
        int,
        typer.Option(
            min=0, metavar="N", help="Average the N newest numbered checkpoints of a folder."
        ),
    ] = 0,
    license: Annotated[
        str | None, typer.Option(help="For the model card, such as cc-by-4.0. (default: unknown)")
    ] = None,
    card: Annotated[
        Path | None, typer.Option(metavar="FILE.md", help="Text for the model card.")
    ] = None,
) -> None:
    """Write a checkpoint for release, or the average of several.

    It holds weights (those that generate would load, or their uniform mean), tokenizers and a card,
    which `fastdiss card` shows. It has no optimizer state, so training cannot resume from it.
    """
    given = checkpoints or [Path("checkpoints")]
    averages = context.info_name == "average"
    output = output or Path("averaged.safetensors" if averages else "model.safetensors")
    if last and not all(path.is_dir() for path in given):
        raise typer.BadParameter("--last needs a folder, not files")
    if averages and not last and len(given) == 1 and given[0].is_dir():
        raise typer.BadParameter(f"{given[0]} stands for one checkpoint: name several, or --last N")
    if _OF_TRAINING.fullmatch(output.name):
        raise typer.BadParameter(f"--output {output}: the name is reserved for `fastdiss train`")
    if output.is_dir():
        raise typer.BadParameter(f"--output {output} is a folder")
    if output.suffix != ".safetensors":
        raise typer.BadParameter(f"--output {output}: the name must end in .safetensors")
    text = None if card is None else _read(card)

    from fastdiss_cli.checkpoints.release import chosen_checkpoints, release

    paths = chosen_checkpoints(given, last)
    if output.exists() and any(path.exists() and path.samefile(output) for path in paths):
        raise typer.BadParameter(f"--output {output} is one of the checkpoints")
    if len(paths) > 1:
        logs.info(f"averaging {', '.join(map(str, paths))}")
    else:
        hint = "" if last else "; to average, name several, or a folder with --last N"
        logs.info(f"reading {paths[0]}{hint}")
    result = release(paths, license, text)
    if output.exists():
        logs.warn(f"{output} already exists, and is replaced")
    result.save(output)
    logs.info(f"wrote {output}: {result.arch}, {output.stat().st_size / 1e6:.1f} MB")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise FastdissError(f"--card {path} is not UTF-8 text") from None
