"""fastdiss models: list the registered architectures."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastdiss_cli.commands.options import UserModule, complete_architecture
from fastdiss_cli.errors import OptionError

if TYPE_CHECKING:
    from fastdiss_cli.models.registry import Architecture


def models(
    arch: Annotated[
        str | None,
        typer.Argument(
            help="Print all options of this one, as a recipe for `train --config`.",
            autocompletion=complete_architecture,
        ),
    ] = None,
    user_module: UserModule = None,
) -> None:
    """List the architectures: name, sizes, and one line each; or all options of one."""
    from fastdiss_cli.models.registry import architecture, architectures

    if arch is None:
        lines = _table(architectures(user_module).values())
    else:
        try:
            lines = _recipe(architecture(arch, user_module))
        except OptionError as error:
            raise typer.BadParameter(error.reason) from None
    for line in lines:
        typer.echo(line)


def _table(archs: Iterable[Architecture]) -> Iterator[str]:
    rows = [("name", "model", "ffn", "heads", "layers", "latent", "description")]
    for arch in archs:
        config = vars(arch.config({}))
        layers = f"{config.get('encoder_layers', '-')}+{config.get('decoder_layers', '-')}"
        sizes = [config.get(key, "-") for key in ("model_dim", "ffn_dim", "heads")]
        latent = config.get("latent_dim", "-")
        rows.append((arch.name, *map(str, sizes), layers, str(latent), arch.description))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()


def _recipe(arch: Architecture) -> Iterator[str]:
    """Yield a recipe of all options with their defaults and meanings."""
    import yaml

    from fastdiss_cli.config import TrainConfig

    def section(config: Any) -> Iterator[str]:
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            value = list(value) if isinstance(value, tuple) else value
            setting = f"  {field.name}: {yaml.safe_dump([value], default_flow_style=True)[1:-2]}"
            meaning = field.metadata.get("meaning")  # a user's own option may have none
            yield f"{setting:<40}  # {meaning}" if meaning else setting

    yield f"# {arch.name}: {arch.description}"
    yield "model:"
    yield from section(arch.config({}))
    yield "train:"
    yield from section(TrainConfig(arch=arch.name))
