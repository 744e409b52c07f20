"""From a corpus to fairseq's lines: window by window, in corpus order, over all ranks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TextIO

from fastdiss_cli import logs
from fastdiss_cli.data.binarized import BinarizedDataset, TokenFile
from fastdiss_cli.data.text import ComingLines, count_lines, decode_lines, read_lines
from fastdiss_cli.data.tokenizer import Tokenizer, check_same
from fastdiss_cli.decoding.generation import Run, SequenceGenerator
from fastdiss_cli.decoding.output import format_lines, hypothesis_text
from fastdiss_cli.distributed import Processes
from fastdiss_cli.errors import FastdissError
from fastdiss_cli.models.registry import Hypothesis
from fastdiss_cli.signals import Stop, Stopped

WINDOW = 4096  # sentences that are sorted by length together, and held in memory

Pair = tuple[list[int], "list[int] | None"]  # ids of a source, and of its reference if it has one


@dataclass
class Input:
    """What is to be translated.

    Attributes:
        windows: lists of pairs, each decoded together before the next is asked for.
        total: how many pairs, if that is known.
        split: the two sides of a dataset's split, if it is one.
    """

    windows: Iterator[list[Pair]]
    total: int | None = None
    split: dict[str, TokenFile] | None = None


def dataset_input(
    dataset: BinarizedDataset, split: str, src: Tokenizer, tgt: Tokenizer, window: int
) -> Input:
    """Return a split of a dataset, whose bytes are checked.

    Args:
        window: pairs of a window; 0: all of them.

    Raises:
        FastdissError: it is damaged, or was made with other tokenizers than the checkpoint's.
    """
    where, remedy = str(dataset.folder), "use a dataset made with the same --tokenizer, or --input"
    check_same("source", src, dataset.src_tokenizer, where, remedy)
    check_same("target", tgt, dataset.tgt_tokenizer, where, remedy)
    files = dataset[split]
    dataset.verify(split)
    pairs = zip(files["src"], files["tgt"], strict=True)
    ids = ((s.tolist(), t.tolist()) for s, t in pairs)
    return Input(_windows(ids, window or len(files["src"])), len(files["src"]), files)


def text_input(input: str, src: Tokenizer, window: int) -> Input:
    """Return the lines of a file, or of stdin for ``-``, read as they are needed.

    Args:
        window: lines of a window; 0: `WINDOW` of a file, and of stdin what waits there.
    """
    if input != "-":
        path = Path(input)
        total = count_lines(path) if path.is_file() else None  # a named pipe can be read once
        if total == 0:
            logs.warn(f"{path} is empty")
        return Input(_windows(_ids(read_lines(path), src), window or WINDOW), total)
    if window:
        lines = decode_lines(sys.stdin.buffer, "stdin")
        return Input(_windows(_ids(lines, src), window))
    coming = ComingLines(sys.stdin.buffer)
    return Input(_as_they_come(coming, _ids(decode_lines(coming, "stdin"), src)))


def _ids(lines: Iterable[str], src: Tokenizer) -> Iterator[Pair]:
    """Yield the ids of each line; at the end, warn of tokens that the model does not know."""
    tokens = unknown = 0
    for line in lines:
        ids = src.encode(line)
        tokens += len(ids) - 1
        unknown += ids.count(src.unk)
        yield ids, None
    if unknown:
        logs.warn(
            f"{unknown:,} of {tokens:,} source tokens are unknown to the model: "
            "prepare the input as its training text was"
        )


def _windows(pairs: Iterator[Pair], size: int) -> Iterator[list[Pair]]:
    return iter(lambda: list(islice(pairs, size)), [])


def _as_they_come(coming: ComingLines, pairs: Iterator[Pair]) -> Iterator[list[Pair]]:
    """Yield what waits, but at most twice as many pairs as last time, and a single one at first.

    So a line is answered at once, a pipe full of lines is decoded in large batches soon, and the
    first of them do not wait for all.
    """
    most = 1
    for pair in pairs:
        window = [pair]
        try:
            window.extend(islice(pairs, min(coming.waiting, most - 1)))
        except FastdissError:  # in a line that is no text: those before it have their answers
            yield window
            raise
        yield window
        most = min(2 * len(window), WINDOW)


def check_direction(languages: tuple[str, str], dataset: BinarizedDataset) -> None:
    """Refuse a dataset in the other direction, which a joined tokenizer cannot tell.

    Of other languages a warning is enough: names differ, as in en and en-GB.
    """
    source, target = languages
    theirs = dataset.summary["source"], dataset.summary["target"]
    if source != target and theirs == (target, source):
        raise FastdissError(
            f"the checkpoint goes from {source} to {target}, {dataset.folder} from {target} to "
            f"{source}: give -s {source} -t {target} (a dataset of fairseq), or preprocess again"
        )
    if source and theirs != languages:
        logs.warn(
            f"the checkpoint was trained to go from {source} to {target}, "
            f"and {dataset.folder} goes from {theirs[0]} to {theirs[1]}"
        )


@dataclass
class Output:
    """Where the lines of one run go: stdout, or a file that takes its name when it is complete."""

    file: TextIO
    path: Path | None = None

    def write(self, text: str) -> None:
        """Write and flush.

        Raises:
            FastdissError: the file cannot take it.
        """
        try:
            self.file.write(text)
            self.file.flush()
        except OSError as error:
            if self.path is None:
                raise
            raise FastdissError(f"{self.path}: cannot write: {error.strerror}") from None

    def keep(self) -> Path:
        """Keep the lines of a run that a signal has ended, and return where."""
        assert self.path is not None
        part = self.path.with_name(f"{self.path.name}.part")
        os.replace(self.file.name, part)
        return part

    def finish(self) -> None:
        assert self.path is not None
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.file.name, self.path)
        self.path.with_name(f"{self.path.name}.part").unlink(missing_ok=True)


def open_outputs(stack: ExitStack, runs: list[Run], folder: Path | None, name: str) -> list[Output]:
    """Open a file for each run in a folder, or stdout where there is none."""
    if folder is None:
        return [Output(sys.stdout)]
    if folder.is_file():
        raise FastdissError(f"--results-path {folder} is a file")
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise FastdissError(f"--results-path {folder} cannot be written: see its permissions")
    outputs = []
    for run in runs:
        steps = f".steps{run.options.steps}" if len(runs) > 1 else ""
        path = folder / f"generate-{name}{steps}.txt"
        if path.exists():
            logs.warn(f"{path} is there already, and will be replaced")
        aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        stack.callback(aside.unlink, missing_ok=True)
        file = stack.enter_context(aside.open("w", encoding="utf-8", newline="\n"))
        outputs.append(Output(file, path))
    return outputs


@dataclass
class Translation:
    """What became of a corpus.

    Attributes:
        texts: the hypotheses of each run, if they are kept.
        references: the target side, if there is one and texts are kept.
        sentences: how many are done.
        signal: what came before all were done, or 0.
    """

    texts: list[list[str]]
    references: list[str] = field(default_factory=list)
    sentences: int = 0
    signal: int = 0


def translate(
    generator: SequenceGenerator,
    tokenizers: tuple[Tokenizer, Tokenizer],
    corpus: Input,
    runs: list[Run],
    outputs: list[Output],
    *,
    gold: bool,
    keep: bool,
    plain: bool,
    processes: Processes,
    stop: Stop,
) -> Translation:
    """Decode a corpus window by window, writing the lines of each run in corpus order.

    The first rank reads and writes; all of them decode. Memory is that of a window, unless the
    texts are kept.

    Args:
        generator, runs: as in `SequenceGenerator.decode`.
        tokenizers: of the source and the target.
        corpus: what is decoded.
        outputs: of the runs, on the first rank; nothing on the others.
        gold: tell the model the right answers.
        keep: keep texts and references, for scores; the first rank does.
        plain: write the text of the hypotheses alone.
        processes: this process among the others.
        stop: after a signal the batch at hand is the last.
    """
    src, tgt = tokenizers
    first_rank = processes.rank == 0
    to_terminal = any(output.file is sys.stdout for output in outputs) and logs.stdout_is_terminal()
    colour = to_terminal and logs.wants_colour()
    # readers of a stream, or of lines without numbers, rely on their order
    gapless = plain or any(output.path is None for output in outputs)
    so_far = Translation([[] for _ in runs])
    with (
        _kept_if_it_fails(so_far, outputs),
        logs.progress("generating", corpus.total, hidden=to_terminal) as bar,
    ):
        while not so_far.signal:
            window: list[Pair] = []
            with processes.attempt("reading") as tried:
                if first_rank:
                    window = _read(corpus, stop)
            so_far.signal = processes.agree(tried, stop)
            pairs = processes.gather(window)
            if not pairs:
                break
            sources, targets = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
            first = so_far.sentences
            answers = targets if gold else None
            if first == 0 and len(pairs) > 1:  # thread and memory pools fill outside the clock
                options = runs[0].options
                quick = replace(options, steps=1) if hasattr(options, "steps") else options
                with processes.attempt("decoding") as tried:
                    generator.decode(sources[:16], [Run(quick)], 0, answers)
                processes.agree(tried, stop)
            so_far.signal = generator.decode_together(
                sources, runs, processes, stop, first, answers, done=bar.advance
            )
            answered = _answered(runs[0].best, gapless)
            with processes.attempt("writing") as tried:
                lines: list[list[str]] = [[] for _ in outputs]
                for i in answered if first_rank else ():
                    source, target = pairs[i]
                    source_text = src.decode(source)
                    reference = None if target is None else tgt.decode(target)
                    if keep and reference is not None:
                        so_far.references.append(reference)
                    for n, run in enumerate(runs):
                        best = run.best[i]
                        if keep:
                            so_far.texts[n].append(hypothesis_text(best, tgt))
                        if plain:
                            lines[n].append(hypothesis_text(best, tgt) + "\n")
                        else:
                            shown = (first + i, source_text, best, tgt, reference, colour)
                            lines[n].append(format_lines(*shown))
                for output, written in zip(outputs, lines, strict=True):
                    output.write("".join(written))
            so_far.signal = processes.agree(tried, stop)
            so_far.sentences += len(answered)
    return so_far


def _answered(best: list[Hypothesis | None], gapless: bool) -> list[int]:
    """Return the numbers of the sentences of a window that have an answer.

    Where a signal came it is not all of them, and of a window the longest are decoded first.

    Args:
        gapless: only those before the first that has none.
    """
    found = [i for i, hypothesis in enumerate(best) if hypothesis is not None]
    return [i for place, i in enumerate(found) if i == place] if gapless else found


@contextmanager
def _kept_if_it_fails(so_far: Translation, outputs: list[Output]) -> Iterator[None]:
    """Keep the lines that are written where what comes behind them fails, and say where."""
    try:
        yield
    except Exception:
        kept = [str(output.keep()) for output in outputs if output.path and so_far.sentences]
        if kept:
            done = logs.counted(so_far.sentences, "sentence")
            logs.warn(f"what was done before, {done}, is in {', '.join(kept)}")
        raise


def _read(corpus: Input, stop: Stop) -> list[Pair]:
    """Return the next window; nothing where the corpus ends or a signal comes."""
    stop.waiting = True
    try:
        return [] if stop.signal else next(corpus.windows, [])
    except Stopped:
        return []
    finally:
        stop.waiting = False
