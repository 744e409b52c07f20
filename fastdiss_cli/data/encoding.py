"""Encode the text of a split in parallel, in order and in bounded memory."""

from __future__ import annotations

import gc
import os
import signal
from array import array
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from multiprocessing import get_context, parent_process, resource_tracker
from threading import Thread

import numpy as np

from fastdiss_cli.data.text import Block, on_one_line
from fastdiss_cli.data.tokenizer_file import make_tokenizer

CHUNK = 8192  # sentence pairs per task of a worker


@dataclass
class Encoded:
    """A block of sentence pairs as tokens.

    Attributes:
        sizes: for each side, int32 [N], the lengths of the sentences.
        tokens: for each side, the concatenated tokens of all sentences.
        unknown: for each side, the number of unknown tokens.
        altered: for each side, the number of sentences that decode to different text.
        empty: the line numbers of pairs with an empty side.
        broken: the number of pairs with a line break, which is replaced by a blank.
    """

    sizes: list[np.ndarray]
    tokens: list[np.ndarray]
    unknown: list[int]
    altered: list[int]
    empty: list[int]
    broken: int


_encoder: BlockEncoder  # of a worker process


class BlockEncoder:
    """Turn blocks of text into tokens.

    Args:
        models: the bytes of the source's and the target's tokenizer.
        dtype: the type of the tokens.
    """

    def __init__(self, models: tuple[bytes, bytes], dtype: np.dtype) -> None:
        src, tgt = models
        self.tokenizers = [make_tokenizer(src)]
        self.tokenizers.append(self.tokenizers[0] if tgt == src else make_tokenizer(tgt))
        self.dtype = dtype

    def encode(self, block: Block) -> Encoded:
        # indices of pairs; most blocks have none, which cheap checks find out first
        broken: set[int] = set()
        empty: set[int] = set()
        encoded = Encoded([], [], [], [], [], 0)
        for tokenizer, texts in zip(self.tokenizers, block.sides(), strict=True):
            if "\n" in "".join(texts):
                broken |= {i for i, text in enumerate(texts) if "\n" in text}
                texts = list(map(on_one_line, texts))
            if "" in texts or any(map(str.isspace, texts)):
                empty |= {i for i, text in enumerate(texts) if not text or text.isspace()}
            rows = tokenizer.encode_all(texts)
            sizes = np.fromiter(map(len, rows), np.int32, len(rows))
            flat = array(self.dtype.char)  # converts lists in half the time of numpy
            for row in rows:
                flat.fromlist(row)
            tokens = np.frombuffer(flat, self.dtype)
            encoded.sizes.append(sizes)
            encoded.tokens.append(tokens)
            encoded.unknown.append(int(np.count_nonzero(tokens == tokenizer.unk)))
            encoded.altered.append(len(tokenizer.altered(texts, rows)))
        encoded.empty = [block.first + i for i in sorted(empty)]
        encoded.broken = len(broken)
        return encoded


def available_cores() -> int:
    """Return the number of cores that this process may use, as restricted by `taskset` or SLURM."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def encode_blocks(
    blocks: Iterator[Block], models: tuple[bytes, bytes], dtype: np.dtype, workers: int
) -> Iterator[Encoded]:
    """Encode blocks in order.

    Args:
        blocks: blocks of `CHUNK` sentence pairs.
        models, dtype: see `BlockEncoder`.
        workers: the number of processes; with one, or a single block, this process does the work.
    """
    first = next(blocks)
    second = next(blocks, None)
    if workers == 1 or second is None:  # too little text to start processes for
        encoder = BlockEncoder(models, dtype)
        yield from map(encoder.encode, chain([first], [second] if second else [], blocks))
        return
    spawn = get_context("spawn")  # forking a process that has threads may hang
    with ProcessPoolExecutor(workers, spawn, _start_worker, (models, dtype)) as pool:
        pending: deque[Future[Encoded]] = deque()
        for block in chain([first, second], blocks):
            with _interrupts_deferred():  # a process that this starts must ignore interrupts
                pending.append(pool.submit(_encode, block))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


@contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Defer Ctrl-C, and block it in processes started meanwhile, which inherit the signal mask."""
    resource_tracker.ensure_running()  # starting it later would unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(models: tuple[bytes, bytes], dtype: np.dtype) -> None:
    """Initialise a worker process, which ends when the main one is killed."""
    global _encoder
    gc.disable()  # there are no reference cycles, and looking for them takes 5 % of the time
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()
    _encoder = BlockEncoder(models, dtype)


def _encode(block: Block) -> Encoded:
    return _encoder.encode(block)
