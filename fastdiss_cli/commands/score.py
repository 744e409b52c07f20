"""fastdiss score: hypotheses + references -> metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fastdiss_cli.errors import FastdissError, suggest

METRICS = ("bleu", "chrf", "ter", "wer", "ser", "repetition")
TESTS = ("bs", "ar")


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
        str,
        typer.Option(
            help=f"Comma-separated: {', '.join(METRICS)}. wer and ser are the share of wrong words "
            "and sentences (for pronunciations: of phonemes and words)."
        ),
    ] = "bleu,chrf,ter",
    paired: Annotated[
        Path | None,
        typer.Option(metavar="BASELINE", help="Test whether --sys differs from this system."),
    ] = None,
    paired_test: Annotated[
        str, typer.Option(help="bs (paired bootstrap) or ar (approximate randomisation).")
    ] = "bs",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score hypotheses with sacreBLEU; every score comes with its signature."""
    wanted = metrics.split(",")
    for name in wanted:
        if name not in METRICS:
            raise typer.BadParameter(
                f"--metrics {name}: choose from {', '.join(METRICS)}{suggest(name, METRICS)}"
            )
    if paired_test not in TESTS:
        raise typer.BadParameter(f"--paired-test {paired_test}: choose from {', '.join(TESTS)}")

    from fastdiss_cli.decoding.output import read_all_references, read_system, reference_streams

    system = read_system(sys)
    if ref:
        references = read_all_references(ref, len(system.hypotheses))
    elif system.references is not None:
        references = [[line] for line in system.references]
    else:
        raise FastdissError(f"{sys} holds no references (T- lines): give --ref")
    streams = reference_streams(references)
    if paired:
        baseline = read_system(paired).hypotheses
        if len(baseline) != len(system.hypotheses):
            raise FastdissError(
                f"{paired} has {len(baseline):,} sentences and {sys} {len(system.hypotheses):,}: "
                "a paired test needs the same ones"
            )
        _compare(baseline, system.hypotheses, streams, wanted, paired_test, as_json)
    else:
        _score(system.hypotheses, streams, wanted, as_json)


def _score(
    hypotheses: list[str], streams: list[list[str | None]], wanted: list[str], as_json: bool
) -> None:
    from fastdiss_cli.metrics import METRICS

    results = []
    for name in wanted:
        metric = METRICS[name]()
        result = metric.corpus_score(hypotheses, streams)
        signature = metric.get_signature().format()
        if as_json:
            results.append(json.loads(result.format(signature=signature, is_json=True)))
        else:
            print(result.format(signature=signature))
    if as_json:
        print(json.dumps(results, indent=1))


def _compare(
    baseline: list[str],
    system: list[str],
    streams: list[list[str | None]],
    wanted: list[str],
    test: str,
    as_json: bool,
) -> None:
    from fastdiss_cli.metrics import paired_test

    rows = paired_test(baseline, system, streams, wanted, test)
    if as_json:
        keys = ("name", "baseline", "system", "p_value", "signature")
        print(json.dumps([dict(zip(keys, row, strict=True)) for row in rows], indent=1))
        return
    print(f"{'metric':<10}  {'baseline':>8}  {'system':>8}  {'p':>7}  signature")
    for name, before, after, p_value, signature in rows:
        print(f"{name:<10}  {before:>8.2f}  {after:>8.2f}  {p_value:>7.4f}  {signature}")
