"""fastdiss card: describe a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def card(
    checkpoint: Annotated[
        Path,
        typer.Argument(metavar="[CHECKPOINT]", help="A release, a checkpoint or its folder."),
    ] = Path("checkpoints"),
) -> None:
    """Describe a checkpoint: architecture, sizes, data, training, licence.

    The output is Markdown with YAML front matter, as model hubs expect it.
    """
    from fastdiss_cli.checkpoints.checkpoint import Checkpoint
    from fastdiss_cli.checkpoints.folder import best_of
    from fastdiss_cli.checkpoints.release import card_as_text, model_card

    text = card_as_text(model_card(Checkpoint.load(best_of(checkpoint))))
    typer.echo(text, nl=not text.endswith("\n"))
