"""Translate a corpus into fairseq's output lines: window by window, in order, on all ranks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import TextIO

import numpy as np

from fastdiss_cli import logs
from fastdiss_cli.data.dataset import Dataset, TokenFile
from fastdiss_cli.data.text import IncomingLines, count_lines, decode_lines, read_lines
from fastdiss_cli.data.tokenizer import Tokenizer, check_same
from fastdiss_cli.decoding.generation import Run, SequenceGenerator
from fastdiss_cli.decoding.output import format_lines, hypothesis_text
from fastdiss_cli.decoding.report import CorpusBleu
from fastdiss_cli.distributed import Processes
from fastdiss_cli.errors import FastdissError
from fastdiss_cli.models.registry import Hypothesis
from fastdiss_cli.signals import Stop, Stopped

WINDOW = 4096  # sentences that are held in memory and sorted by length together
LONGEST = 10_000  # tokens of a line of text: one operation of the network takes seconds with it
WARM_UP = 16  # the first sentences, which are decoded once more beforehand if there are many

Pair = tuple[list[int], "list[int] | None"]  # ids of a source, and of its reference if it has one


@dataclass
class Input:
    """The text to translate.

    Attributes:
        windows: lists of pairs; each is decoded before the next one is read.
        total: the number of pairs, if known.
        split: the two sides of a dataset's split, if it comes from a dataset.
    """

    windows: Iterator[list[Pair]]
    total: int | None = None
    split: dict[str, TokenFile] | None = None


def dataset_input(
    dataset: Dataset, split: str, src: Tokenizer, tgt: Tokenizer, window: int
) -> Input:
    """Return a split of a dataset, after verifying its bytes.

    Args:
        window: pairs per window; 0: all pairs in one.

    Raises:
        FastdissError: it is damaged, or was made with other tokenizers than the checkpoint's.
    """
    where, remedy = str(dataset.folder), "use a dataset made with the same --tokenizer, or --input"
    check_same((src, tgt), dataset.tokenizers, where, remedy)
    files = dataset[split]
    dataset.verify(split)
    pairs = zip(files["src"], files["tgt"], strict=True)
    ids = ((s.tolist(), t.tolist()) for s, t in pairs)
    return Input(_windows(ids, window or len(files["src"])), len(files["src"]), files)


def text_input(input: str, src: Tokenizer, window: int) -> Input:
    """Return the lines of a file, or of stdin for ``-``, read lazily.

    Args:
        window: lines per window; 0: `WINDOW` for a file, and whatever is waiting on stdin.
    """
    if input != "-":
        path = Path(input)
        total = count_lines(path) if path.is_file() else None  # a pipe can be read only once
        if total == 0:
            logs.warn(f"{path} is empty")
        return Input(_windows(_ids(read_lines(path), src, input), window or WINDOW), total)
    if window:
        lines = decode_lines(sys.stdin.buffer, "stdin")
        return Input(_windows(_ids(lines, src, "stdin"), window))
    incoming = IncomingLines(sys.stdin.buffer)
    pairs = _ids(decode_lines(incoming, "stdin"), src, "stdin")
    return Input(_as_they_arrive(incoming, pairs))


def _ids(lines: Iterable[str], src: Tokenizer, name: str) -> Iterator[Pair]:
    """Yield the ids of each line; at the end, warn of tokens that are unknown to the model.

    Raises:
        FastdissError: a line is longer than `LONGEST`.
    """
    tokens = unknown = 0
    for number, line in enumerate(lines, start=1):
        ids = src.encode_source(line)
        if len(ids) > LONGEST:
            raise FastdissError(
                f"{name}: line {number} has {len(ids):,} tokens, and at most {LONGEST:,} are "
                "translated at once: split it"
            )
        tokens += len(ids) - 1
        unknown += ids.count(src.unk)
        yield ids, None
    if unknown:
        logs.warn(
            f"{unknown:,} of {tokens:,} source tokens are unknown to the model: "
            "preprocess the input like its training text"
        )


def _windows(pairs: Iterator[Pair], size: int) -> Iterator[list[Pair]]:
    return iter(lambda: list(islice(pairs, size)), [])


def _as_they_arrive(incoming: IncomingLines, pairs: Iterator[Pair]) -> Iterator[list[Pair]]:
    """Yield the waiting pairs: one at first, then at most twice as many as last time.

    So a single line is answered at once, and a full pipe is soon decoded in large batches, while
    its first lines do not wait for the last.
    """
    most = 1
    for pair in pairs:
        window = [pair]
        try:
            window.extend(islice(pairs, min(incoming.waiting, most - 1)))
        except FastdissError:  # a line is invalid: answer those before it first
            yield window
            raise
        yield window
        most = min(2 * len(window), WINDOW)


def warn_of_changed_references(dataset: Dataset, split: str) -> None:
    """Warn if the references of a dataset are not those of its text, which BLEU should be of."""
    targets, remedy = dataset[split]["tgt"], "give the text with --ref"
    if altered := dataset.altered_references(split):
        logs.warn(
            f"the tokenizer has changed {altered:,} of {len(targets):,} references (as T- lines "
            f"show), and BLEU is of these: {remedy}"
        )
    elif unknown := int(np.count_nonzero(targets.tokens == dataset.tgt_tokenizer.unk)):
        logs.warn(
            f"{unknown:,} of {len(targets.tokens):,} tokens of the references are unknown to the "
            f"dictionary, and BLEU counts <unk> as a word: {remedy}"
        )


def check_direction(languages: tuple[str, str], dataset: Dataset) -> None:
    """Refuse a dataset in the opposite direction, which a joined tokenizer does not reveal.

    For other languages a warning is enough: their names may differ, as in en and en-GB.
    """
    source, target = languages
    theirs = dataset.languages
    if source != target and theirs == (target, source):
        raise FastdissError(
            f"the checkpoint translates from {source} to {target}, {dataset.folder} goes from "
            f"{target} to {source}: give -s {source} -t {target} (for a dataset of fairseq), or "
            "preprocess again"
        )
    if source and theirs != languages:
        logs.warn(
            f"the checkpoint translates from {source} to {target}, "
            f"but {dataset.folder} goes from {theirs[0]} to {theirs[1]}"
        )


@dataclass
class Output:
    """Where the lines of a run go: stdout, or a file that gets its final name once complete."""

    file: TextIO
    path: Path | None = None

    def write(self, text: str) -> None:
        """Write and flush.

        Raises:
            FastdissError: the file cannot be written.
            BrokenPipeError: the reader of stdout is gone.
        """
        with self._naming_errors():
            self.file.write(text)
            self.file.flush()

    def keep(self) -> Path | None:
        """Keep the lines of an unfinished run in a ``.part`` file.

        Returns:
            Its path; None: nothing was written, or the file is complete, or it is stdout.
        """
        if self.path is None:
            return None
        with suppress(OSError):  # what is still buffered may find the disk full
            self.file.close()
        unfinished = Path(self.file.name)
        if not unfinished.exists() or not unfinished.stat().st_size:
            return None
        part = self.path.with_name(f"{self.path.name}.part")
        os.replace(unfinished, part)
        return part

    def finish(self) -> None:
        """Give the file its final name; errors as in `write`."""
        assert self.path is not None
        with self._naming_errors():
            os.fsync(self.file.fileno())
            self.file.close()
            os.replace(self.file.name, self.path)
        self.path.with_name(f"{self.path.name}.part").unlink(missing_ok=True)

    @contextmanager
    def _naming_errors(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            where = self.path or "stdout"
            raise FastdissError(f"{where}: cannot write: {error.strerror}") from None


@contextmanager
def open_outputs(runs: list[Run], folder: Path | None, name: str) -> Iterator[list[Output]]:
    """Open one file per run in a folder, or stdout if there is no folder.

    If a later step fails, what was written is kept, and logged where it is.
    """
    if folder is None:
        yield [Output(sys.stdout)]
        return
    if folder.exists() and not folder.is_dir():
        raise FastdissError(f"--results-path {folder} is a file")
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise FastdissError(f"--results-path {folder} is not writable: check its permissions")
    outputs = []
    with ExitStack() as stack:
        for run in runs:
            steps = f".steps{run.options.steps}" if len(runs) > 1 else ""
            path = folder / f"generate-{name}{steps}.txt"
            if path.exists():
                logs.warn(f"{path} already exists, and will be replaced")
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            stack.callback(temporary.unlink, missing_ok=True)
            file = stack.enter_context(temporary.open("w", encoding="utf-8", newline="\n"))
            outputs.append(Output(file, path))
        try:
            yield outputs
        except Exception:
            if kept := keep_all(outputs):
                logs.warn(f"the lines written before the failure are in {kept}")
            raise


def keep_all(outputs: list[Output]) -> str:
    """Keep the lines of all unfinished runs, and return where they are, for a message."""
    return ", ".join(str(part) for output in outputs if (part := output.keep()))


@dataclass
class Translation:
    """The translation of a corpus.

    Attributes:
        bleus: that of each run, over the sentences that have references.
        sentences: the number of translated sentences.
        signal: the signal that stopped it early, or 0.
    """

    bleus: list[CorpusBleu]
    sentences: int = 0
    signal: int = 0


def translate(
    generator: SequenceGenerator,
    tokenizers: tuple[Tokenizer, Tokenizer],
    corpus: Input,
    runs: list[Run],
    outputs: list[Output],
    *,
    references: list[list[str]] | None,
    gold: bool,
    plain: bool,
    processes: Processes,
    stop: Stop,
) -> Translation:
    """Decode a corpus window by window, writing the lines of each run in corpus order.

    The first rank reads and writes; all ranks decode, and score and format their share. Only one
    window is in memory.

    Args:
        generator, runs: as in `SequenceGenerator.decode`.
        tokenizers: those of the source and the target.
        corpus: the text to translate.
        outputs: one per run on the first rank; empty on the others.
        references: those of each sentence, instead of the corpus's own; the first one is shown. If
            there are too few, the last sentences have none.
        gold: give the corpus's references to the model.
        plain: write only the text of the hypotheses.
        processes: the process group.
        stop: after a signal, the current batch is the last one.
    """
    src, tgt = tokenizers
    first_rank = processes.rank == 0
    to_terminal = any(output.file is sys.stdout for output in outputs) and logs.stdout_is_terminal()
    # readers of a stream, or of lines without numbers, rely on their order
    gapless = plain or any(output.path is None for output in outputs)
    how = [(gapless, to_terminal and logs.wants_colour())] if first_rank else []
    ((gapless, colour),) = processes.gather(how)  # all ranks write for the outputs of the first
    so_far = Translation([CorpusBleu() for _ in runs])
    with logs.progress("generating", corpus.total, hidden=to_terminal) as bar:
        while not so_far.signal:
            window: list[Pair] = []
            with processes.attempt("reading") as attempt:
                if first_rank:
                    window = _read(corpus, stop)
            so_far.signal = processes.agree(attempt, stop)
            pairs = processes.gather(window)
            if not pairs:
                break
            targets = [target for _, target in pairs]
            texts = [src.decode(source) for source, _ in pairs]
            # a dataset has not been through `encode_source`
            sources = [
                [src.eos] if text.isspace() else source
                for text, (source, _) in zip(texts, pairs, strict=True)
            ]
            first = so_far.sentences
            answers = targets if gold else None
            if first == 0 and len(pairs) >= 10 * WARM_UP:
                # it fills the pools of threads and memory, is not timed, and takes a tenth at most
                options = runs[0].options
                quick = replace(options, steps=1) if hasattr(options, "steps") else options
                with processes.attempt("decoding") as attempt:
                    generator.decode(sources[:WARM_UP], [Run(quick)], 0, answers)
                processes.agree(attempt, stop)
            so_far.signal = generator.decode_together(
                sources, runs, processes, stop, first, answers, done=bar.advance
            )
            answered = _answered(runs[0].best, gapless)
            lines: list[list[str]] = [[] for _ in runs]
            with processes.attempt("scoring") as attempt:
                for i in answered[processes.rank :: processes.world_size]:
                    known = [] if targets[i] is None else [tgt.decode(targets[i])]
                    if references is not None:
                        known = references[first + i] if first + i < len(references) else []
                    for n, run in enumerate(runs):
                        best = run.best[i]
                        answer = hypothesis_text(best, tgt)
                        so_far.bleus[n].add(answer, known)
                        if plain:
                            lines[n].append(answer + "\n")
                        else:
                            shown = known[0] if known else None
                            lines[n].append(
                                format_lines(first + i, texts[i], best, tgt, shown, colour)
                            )
            processes.agree(attempt, stop)
            shares = processes.gather([lines])
            with processes.attempt("writing") as attempt:
                for output, parts in zip(outputs, zip(*shares, strict=True), strict=False):
                    in_order = chain.from_iterable(zip_longest(*parts, fillvalue=""))
                    output.write("".join(in_order))
            so_far.signal = processes.agree(attempt, stop)
            so_far.sentences += len(answered)
    shares = processes.gather([so_far.bleus])
    so_far.bleus = [CorpusBleu.total(parts) for parts in zip(*shares, strict=True)]
    return so_far


def _answered(best: list[Hypothesis | None], gapless: bool) -> list[int]:
    """Return the indices of the sentences of a window that have an answer.

    After a signal some have none, anywhere in the window: the longest are decoded first.

    Args:
        gapless: return only those before the first one without an answer.
    """
    found = [i for i, hypothesis in enumerate(best) if hypothesis is not None]
    return [i for place, i in enumerate(found) if i == place] if gapless else found


def _read(corpus: Input, stop: Stop) -> list[Pair]:
    """Return the next window; an empty one at the end of the corpus or after a signal."""
    try:
        stop.waiting = True
        try:
            return [] if stop.signal else next(corpus.windows, [])
        finally:
            stop.waiting = False
    except Stopped:  # also if the signal came just before the wait was over
        stop.waiting = False
        return []
