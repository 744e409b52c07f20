"""fastdiss models: what the registry holds."""

from __future__ import annotations

import typer

from fastdiss_cli.commands.options import UserModule


def models(user_module: UserModule = None) -> None:
    """List the architectures: name, sizes, and one line each."""
    from fastdiss_cli.models.registry import architectures

    rows = [("name", "model", "ffn", "heads", "layers", "latent", "description")]
    for arch in architectures(user_module).values():
        config = vars(arch.config({}))
        layers = f"{config.get('encoder_layers', '-')}+{config.get('decoder_layers', '-')}"
        sizes = [config.get(key, "-") for key in ("model_dim", "ffn_dim", "heads")]
        latent = config.get("latent_dim", "-")
        rows.append((arch.name, *map(str, sizes), layers, str(latent), arch.description))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        typer.echo("  ".join(cells).rstrip())
