"""fastdiss score: hypotheses + references -> metrics."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastdiss_cli import logs
from fastdiss_cli.commands.options import choice, drawable
from fastdiss_cli.errors import FastdissError, OptionError, suggest

if TYPE_CHECKING:
    from sacrebleu.significance import Result as SignificanceResult

    from fastdiss_cli.decoding.systems import Figures, Generated

# listed here, because --help must not wait for sacreBLEU's import
AGAINST_REFERENCES = ("bleu", "chrf", "ter", "rouge1", "rouge2", "rougeL")
AGAINST_REFERENCES += ("bertscore", "wer", "ser")
SUMS = (*AGAINST_REFERENCES, "repetition")  # over sentences, with sacreBLEU's interface
DIVERSITY = ("distinct1", "distinct2", "sentence-distinct", "self-bleu")
GROUPS = {"rouge": ("rouge1", "rouge2", "rougeL"), "distinct": ("distinct1", "distinct2")}
NAMES = (*SUMS, *DIVERSITY, *GROUPS)
COUNTED = ("wer", "ser", "repetition")
TESTS = {"bs": "paired bootstrap", "ar": "approximate randomisation"}


@dataclass(frozen=True)
class Result:
    """The score of a system by one metric.

    Attributes:
        line: sacreBLEU's output line.
        details: its fields in sacreBLEU's JSON.
        p_value: that of the test against the baseline, if there was one.
    """

    name: str
    score: float
    signature: str
    line: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    p_value: float | None = None


def score(
    systems: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FILE|DIR|-]...",
            help="More hypotheses, for shell wildcards. (default: stdin, unless it is a terminal)",
        ),
    ] = None,
    sys: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE|DIR|-",
            help="Hypotheses: plain text or a generate file; a folder: its generate files; -: "
            "stdin. Repeatable: a table.",
        ),
    ] = None,
    ref: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="References: plain text, or .tsv with alternatives on a line. Repeatable. "
            "(default: the T- lines of a generate file)",
        ),
    ] = None,
    metrics: Annotated[
        str,
        typer.Option(
            help="Comma-separated: bleu, chrf, ter; rouge (or rouge1, rouge2, rougeL); bertscore; "
            "wer, ser (share of wrong words and sentences; for pronunciations: of phonemes and "
            "words), repetition (share of words that equal the word before them); distinct (or "
            "distinct1, distinct2), sentence-distinct, self-bleu (over the candidates of "
            "`generate --nbest`)."
        ),
    ] = "bleu,chrf,ter",
    tokenize: Annotated[
        str | None,
        typer.Option(
            "--tokenize",
            "-tok",
            metavar="NAME",
            help="sacreBLEU's tokenizer of BLEU: 13a, intl, zh, ja-mecab, ko-mecab, char, none "
            "(for text that is tokenized) and others. (default: 13a)",
        ),
    ] = None,
    lowercase: Annotated[
        bool, typer.Option("--lowercase", "-lc", help="Lower-case the text for BLEU.")
    ] = False,
    bertscore_model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FOLDER",
            help="The model of BERTScore; English needs no other. (default: roberta-large)",
        ),
    ] = None,
    paired: Annotated[
        Path | None,
        typer.Option(metavar="BASELINE", help="Test whether the systems differ from this one."),
    ] = None,
    paired_test: Annotated[
        str | None,
        choice(tuple(TESTS), "{}: paired bootstrap, or approximate randomisation. (default: bs)"),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png|svg|pdf",
            callback=drawable,
            help="Plot the first metric against steps and against sentences/s.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score hypotheses with sacreBLEU and others; every score comes with its signature."""
    from fastdiss_cli.decoding.systems import STDIN, by_steps, generate_files, read_system, shown

    named = [*(sys or []), *(systems or [])]
    if not named and not logs.stdin_is_terminal():
        named = [STDIN]
    paths = by_steps([file for path in named for file in generate_files(path)])
    if not paths:
        raise typer.BadParameter("give --sys FILE, or several files")
    if paths.count(STDIN) > 1:
        raise typer.BadParameter("-: stdin can be read only once")
    spelt = {name.lower() for name in NAMES}
    if apart := [str(p) for p in paths if str(p).lower().strip(",") in spelt and not p.exists()]:
        raise typer.BadParameter(
            f"{' '.join(apart)}: no such file; metrics are one word, as in --metrics bleu,chrf"
        )
    wanted = _names(metrics)
    if paired is not None and paired.is_dir():
        paired, *others = generate_files(paired)
        if others:
            raise typer.BadParameter(f"--paired {paired.parent}: it has several: name one file")
    if paired is not None and not paired.exists():
        raise typer.BadParameter(
            f"--paired {paired}: no such file; the baseline is a file of hypotheses, too"
        )
    if paired_test is not None and paired is None:
        raise typer.BadParameter("--paired-test needs --paired BASELINE")
    options: dict[str, dict[str, Any]] = {}
    for flag, value, metric, name in (
        ("--tokenize", tokenize, "bleu", "tokenize"),
        ("--lowercase", lowercase or None, "bleu", "lowercase"),
        ("--bertscore-model", bertscore_model, "bertscore", "model"),
    ):
        if value is not None:
            if metric not in wanted:
                raise typer.BadParameter(f"{flag} applies to --metrics {metric}")
            options.setdefault(metric, {})[name] = value
    test = (paired_test or "bs") if paired else None
    if paired is not None:
        if not set(wanted) & set(SUMS):
            raise typer.BadParameter(
                f"--paired: there is no test for --metrics {metrics}, which are not sums over "
                "sentences"
            )
        paths = [paired, *(path for path in paths if not _is_same(path, paired))]
        if len(paths) == 1:
            raise typer.BadParameter("--paired needs another system than the baseline itself")
    if counted := [name for name in wanted if test == "ar" and name in COUNTED]:
        logs.warn(
            f"--paired-test ar: sacreBLEU counts ties as evidence, so that the p-values of "
            f"{', '.join(counted)}, which count errors, are too small if few sentences differ: "
            "use bs"
        )

    read = [read_system(path) for path in paths]
    paths = list(map(shown, paths))
    for path, system in zip(paths, read, strict=True):
        if len(system.candidates) != len(read[0].candidates):
            raise FastdissError(
                f"{path} has {len(system.candidates):,} sentences and {paths[0]} "
                f"{len(read[0].candidates):,}: give systems on the same text"
            )
        if system.sources and read[0].sources:
            pairs = zip(system.sources, read[0].sources, strict=True)
            if others := sum(one != other for one, other in pairs):
                logs.warn(
                    f"{path} and {paths[0]} differ in {logs.counted(others, 'source')} (S- lines): "
                    "scores of different texts do not compare"
                )
        if "bleu" in wanted and tokenize != "none":
            _warn_of_tokenized(path, system)
    needed = any(name in AGAINST_REFERENCES for name in wanted)
    if ref and not needed:
        raise typer.BadParameter(f"--metrics {metrics} uses no references: leave out --ref")
    streams = _streams(paths, read, ref) if needed else [[""] * len(read[0].hypotheses)]
    if plot is not None:
        figures = [_figures(path, system) for path, system in zip(paths, read, strict=True)]
    with _gc_paused():
        rows = _score(read, streams, wanted, options, test)
    if plot is not None:  # first, because the reader of the output may stop early
        _plot(plot, paths, figures, [results[0] for results in rows], wanted[0])
    _print(paths, rows, test, as_json)


def _warn_of_tokenized(path: Path, system: Generated) -> None:
    """Warn of text that looks tokenized, in the cases where sacreBLEU does."""
    count = sum(text.endswith(" .") for text in system.hypotheses)
    if count >= 100:
        logs.warn(
            f"{path}: {count:,} lines end in a tokenized full stop (' .'): detokenize the text, or "
            "BLEU is not comparable with that of others"
        )


def _is_same(path: Path, other: Path) -> bool:
    return path == other or (path.exists() and path.samefile(other))


def _names(metrics: str) -> list[str]:
    """Return the names of the metrics, with groups expanded."""
    names: list[str] = []
    spelt = {name.lower(): name for name in NAMES}  # accept BLEU and chrF
    for given in map(str.strip, metrics.split(",")):
        name = spelt.get(given.lower(), given)
        if name not in NAMES:
            raise typer.BadParameter(
                f"--metrics {name}: choose from {', '.join(NAMES)}{suggest(name, NAMES)}"
            )
        names += GROUPS.get(name, [name])
    return list(dict.fromkeys(names))


def _streams(
    paths: list[Path], systems: list[Generated], ref: list[Path] | None
) -> list[list[str | None]]:
    """Return sacreBLEU's reference streams, from files or from the T- lines of the systems."""
    from fastdiss_cli.decoding.systems import read_all_references, reference_streams

    if ref:
        return reference_streams(read_all_references(ref, len(systems[0].candidates)))
    found = [(p, s.references) for p, s in zip(paths, systems, strict=True) if s.references]
    if not found:
        raise FastdissError(f"{paths[0]} holds no references (T- lines): give --ref")
    for path, references in found:
        if references != found[0][1]:
            raise FastdissError(f"{path} and {found[0][0]} hold different references: give --ref")
    pairs = zip(paths, systems, strict=True)
    several = [path for path, system in pairs if re.search(r"\|nrefs:(?!1\|)", system.summary)]
    if several:
        more = f" and {len(several) - 1} more" if len(several) > 1 else ""
        logs.warn(
            f"{several[0]}{more}: the last line has BLEU against several references a sentence, "
            "but T- lines hold only the first: to score against all, give --ref"
        )
    return [list(found[0][1])]


@contextmanager
def _gc_paused() -> Iterator[None]:
    """Do not look for cycles among the counts of n-grams: that took a fifth of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _score(
    systems: list[Generated],
    streams: list[list[str | None]],
    wanted: list[str],
    options: dict[str, dict[str, Any]],
    test: str | None,
) -> list[list[Result]]:
    """Return the results of each system, in the order of the metrics.

    Args:
        options: the options of the metrics in `SUMS`, by metric.
    """
    from fastdiss_cli import metrics

    columns: dict[str, list[Result]] = {}
    try:
        used = {
            name: metrics.METRICS[name](**options.get(name, {})) for name in wanted if name in SUMS
        }
    except OptionError as error:
        raise typer.BadParameter(f"--{error}") from None
    for name in wanted:
        column = columns[name] = []
        if name in used:
            metrics.prepare(used[name], streams)
        for system in systems:
            if name in used:
                metric = used[name]
                found = metric.corpus_score(system.hypotheses, None)
            else:
                metric = metrics.DIVERSITY[name]()
                found = metric.corpus_score(system.candidates)
            signature = metric.get_signature().format()
            details = json.loads(found.format(signature=signature, is_json=True))
            line = found.format(signature=signature)
            column.append(Result(found.name, found.score, signature, line, details))
        if test is None:
            used.pop(name, None)  # and the n-grams of the references with it
    if test is not None and used:
        hypotheses = [system.hypotheses for system in systems]
        for name, tested in zip(
            used, metrics.paired_test(hypotheses, None, used, test), strict=True
        ):
            columns[name] = [
                _with_test(*pair, tested.signature)
                for pair in zip(columns[name], tested.results, strict=True)
            ]
    return [list(row) for row in zip(*(columns[name] for name in wanted), strict=True)]


def _with_test(result: Result, tested: SignificanceResult, signature: str) -> Result:
    details = dict(result.details)
    if tested.mean is not None:  # of the bootstrap
        # chrF and TER have numpy's numbers
        details |= {"mean": float(tested.mean), "ci": float(tested.ci)}
    return replace(result, signature=signature, details=details, p_value=tested.p_value)


def _print(paths: list[Path], rows: list[list[Result]], test: str | None, as_json: bool) -> None:
    if as_json:
        shown = []
        for path, results in zip(paths, rows, strict=True):
            for r in results:
                common = {"system": str(path), "name": r.name, "score": r.score}
                tested = {} if test is None else {"p_value": r.p_value}
                # sacreBLEU's own JSON rounds the score
                shown.append(r.details | common | {"signature": r.signature} | tested)
        print(json.dumps(shown, indent=1))
    elif len(rows) == 1:
        print("\n".join(result.line for result in rows[0]))
    else:
        print(_table(paths, rows, test))


def _table(paths: list[Path], rows: list[list[Result]], test: str | None) -> str:
    names = [str(path) for path in paths]
    width = max(map(len, ["system", *names]))
    header = [f"{'system':<{width}}"]
    for result in rows[-1]:
        header.append(f"{result.name:>{max(len(result.name), 6)}}")
        if result.p_value is not None:
            header.append(f"{'p':<7}")
    lines = ["  ".join(header).rstrip()]
    for name, results in zip(names, rows, strict=True):
        cells = [f"{name:<{width}}"]
        for result, last in zip(results, rows[-1], strict=True):
            cells.append(f"{result.score:>{max(len(result.name), 6)}.2f}")
            if result.p_value is not None:
                marked = result.p_value < 0.05
                cells.append(f"{result.p_value:.4f}{'*' if marked else ' '}")
            elif last.p_value is not None:
                cells.append(f"{'-':<7}")
        lines.append("  ".join(cells).rstrip())
    lines += [f"{result.name}|{result.signature}" for result in rows[0]]
    if test is not None:
        lines.append(f"* differs from the baseline, {names[0]}, with p < 0.05 ({TESTS[test]})")
    return "\n".join(lines)


def _figures(path: Path, system: Generated) -> Figures:
    """Return what `_plot` needs of a system besides its score."""
    from fastdiss_cli.decoding.systems import parse_summary

    figures = parse_summary(system.summary)
    if figures is None:
        raise FastdissError(
            f"{path} does not end with the summary of `fastdiss generate`, from which --plot "
            "takes steps and sentences/s"
        )
    return figures


def _plot(
    plot: Path, paths: list[Path], figures: list[Figures], results: list[Result], metric: str
) -> None:
    from fastdiss_cli.metrics import LOWER_IS_BETTER
    from fastdiss_cli.plots import Point, plot_quality

    scores = [result.score for result in results]
    points = [Point(*of_system) for of_system in zip(paths, figures, scores, strict=True)]
    label = results[0].name + (" (lower is better)" if metric in LOWER_IS_BETTER else "")
    plot_quality(plot, points, label)
    logs.info(f"wrote {plot}")
