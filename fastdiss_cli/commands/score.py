"""fastdiss score: hypotheses + references -> metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fastdiss_cli.errors import FastdissError, suggest

METRICS = ("bleu", "chrf", "ter")


def score(
    sys: Annotated[
        Path, typer.Option(metavar="FILE", help="Hypotheses: plain text or a generate file.")
    ],
    ref: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="References: plain text, or .tsv with alternatives on a line. Repeatable. "
            "Left out: the T- lines of a generate file.",
        ),
    ] = None,
    metrics: Annotated[
        str, typer.Option(help=f"Comma-separated: {', '.join(METRICS)}.")
    ] = "bleu,chrf,ter",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score hypotheses with sacreBLEU; every score comes with its signature."""
    wanted = metrics.split(",")
    for name in wanted:
        if name not in METRICS:
            raise typer.BadParameter(
                f"--metrics {name}: choose from {', '.join(METRICS)}{suggest(name, METRICS)}"
            )

    from sacrebleu.metrics import BLEU, CHRF, TER

    from fastdiss_cli.decoding.output import (
        read_all_references,
        read_system,
        reference_streams,
    )

    system = read_system(sys)
    if ref:
        references = read_all_references(ref, len(system.hypotheses))
    elif system.references is not None:
        references = [[line] for line in system.references]
    else:
        raise FastdissError(f"{sys} holds no references (T- lines): give --ref")
    streams = reference_streams(references)
    results = []
    for name in wanted:
        metric = {"bleu": BLEU, "chrf": CHRF, "ter": TER}[name]()
        result = metric.corpus_score(system.hypotheses, streams)
        signature = metric.get_signature().format()
        if as_json:
            results.append(json.loads(result.format(signature=signature, is_json=True)))
        else:
            print(result.format(signature=signature))
    if as_json:
        print(json.dumps(results, indent=1))
