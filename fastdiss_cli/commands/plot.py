"""fastdiss plot: metrics.jsonl -> training curves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastdiss_cli import logs
from fastdiss_cli.commands.options import drawable
from fastdiss_cli.errors import FastdissError

if TYPE_CHECKING:
    from fastdiss_cli.plots import Curves


def plot(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of `fastdiss train`, or their metrics.jsonl.")
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE.png|svg|pdf",
            callback=drawable,
            help="The image to write.",
        ),
    ] = Path("curves.png"),
) -> None:
    """Plot training curves: losses, BLEU, gradient norm, learning rate and speed by update.

    Quality against steps and speed is plotted by `fastdiss score --plot`.
    """
    from fastdiss_cli.plots import plot_training

    plot_training(output, [read_curves(path) for path in dict.fromkeys(runs)])
    logs.info(f"wrote {output}")


def read_curves(path: Path) -> Curves:
    """Read ``metrics.jsonl``.

    Args:
        path: the file, or its folder.

    Raises:
        FastdissError: it is missing or empty, or a line is not a record of it, except an
            incomplete last line.
    """
    from fastdiss_cli.data.text import read_lines
    from fastdiss_cli.plots import Curves

    if path.is_dir() and not (path / "metrics.jsonl").exists():
        below = sorted(str(file.parent) for file in path.glob("*/metrics.jsonl"))
        hint = "; `fastdiss train` writes it into --save-dir, every train.log_interval updates"
        if below:
            hint = f"; there is one in {', '.join(below[:4])}"
        raise FastdissError(f"{path}: no metrics.jsonl{hint}")
    if path.suffix == ".safetensors":
        raise FastdissError(f"{path} is a checkpoint: give the folder of the training")
    path = path / "metrics.jsonl" if path.is_dir() else path
    rows = []
    lines = list(read_lines(path))
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            known = isinstance(row["update"], int) and row["split"] in ("train", "valid")
            for value in row.values():
                if isinstance(value, int):
                    float(value)  # a larger one cannot be plotted
        except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
            if isinstance(error, json.JSONDecodeError) and rows and number == len(lines):
                logs.warn(f"{path}: ignoring the last line, which is incomplete")
                break
            known = False
        if not known:
            raise FastdissError(
                f"{path}: line {number} is not a record of metrics.jsonl; for generate files, use "
                "`fastdiss score --plot`"
            )
        rows.append(row)
    if not rows:
        raise FastdissError(f"{path} is empty: the training has logged nothing yet")
    return Curves(path, rows)
