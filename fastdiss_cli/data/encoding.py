"""Encode the text of a split in parallel, in order, with a bounded part of it in memory."""

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
from fastdiss_cli.data.tokenizer import make_tokenizer

CHUNK = 8192  # sentence pairs that a worker is given at once


@dataclass
class Encoded:
    """A block of sentence pairs as tokens.

    Attributes:
        sizes: of each side, int32 [N], the lengths of the sentences.
        tokens: of each side, all sentences one after the other.
        unknown: of each side, how many tokens are unknown.
        empty: the numbers of the lines with an empty side.
        altered: pairs that decode to other text.
        broken: pairs with a line break, which has become a blank.
    """

    sizes: list[np.ndarray]
    tokens: list[np.ndarray]
    unknown: list[int]
    empty: list[int]
    altered: int
    broken: int


class BlockEncoder:
    """Turn blocks of text into tokens.

    Args:
        models: the bytes of the source's and the target's tokenizer.
        dtype: of the tokens.
    """

    def __init__(self, models: tuple[bytes, bytes], dtype: np.dtype) -> None:
        src, tgt = models
        self.tokenizers = [make_tokenizer(src)]
        self.tokenizers.append(self.tokenizers[0] if tgt == src else make_tokenizer(tgt))
        self.dtype = dtype

    def encode(self, block: Block) -> Encoded:
        # the places of pairs; most blocks have none of them, which is seen at a glance
        broken: set[int] = set()
        empty: set[int] = set()
        altered: set[int] = set()
        encoded = Encoded([], [], [], [], 0, 0)
        for tokenizer, texts in zip(self.tokenizers, block.sides(), strict=True):
            if "\n" in "".join(texts):
                broken |= {i for i, text in enumerate(texts) if "\n" in text}
                texts = list(map(on_one_line, texts))
            if "" in texts or any(map(str.isspace, texts)):
                empty |= {i for i, text in enumerate(texts) if not text or text.isspace()}
            rows = tokenizer.encode_all(texts)
            sizes = np.fromiter(map(len, rows), np.int32, len(rows))
            flat = array(self.dtype.char)  # takes lists in half the time that numpy needs
            for row in rows:
                flat.fromlist(row)
            tokens = np.frombuffer(flat, self.dtype)
            encoded.sizes.append(sizes)
            encoded.tokens.append(tokens)
            encoded.unknown.append(int(np.count_nonzero(tokens == tokenizer.unk)))
            altered |= tokenizer.altered(texts, rows)
        encoded.empty = [block.first + place for place in sorted(empty)]
        encoded.altered, encoded.broken = len(altered), len(broken)
        return encoded


def encode_blocks(
    blocks: Iterator[Block], models: tuple[bytes, bytes], dtype: np.dtype, workers: int
) -> Iterator[Encoded]:
    """Encode blocks in order.

    Args:
        blocks: of `CHUNK` sentence pairs.
        models, dtype: see `BlockEncoder`.
        workers: processes; with one, or a single block, it is this one.
    """
    first = next(blocks)
    second = next(blocks, None)
    if workers == 1 or second is None:  # too little text to start processes for
        encoder = BlockEncoder(models, dtype)
        yield from map(encoder.encode, chain([first], [second] if second else [], blocks))
        return
    fresh = get_context("spawn")  # a forked copy of a process that has threads may hang
    with ProcessPoolExecutor(workers, fresh, _start_process, (models, dtype)) as pool:
        under_way: deque[Future[Encoded]] = deque()
        for block in chain([first, second], blocks):
            with _interrupts_held_back():  # it may start a process, which never sees one
                under_way.append(pool.submit(_encode, block))
            if len(under_way) > 2 * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Keep Ctrl-C for later, and from processes that are started meanwhile: they inherit it."""
    resource_tracker.ensure_running()  # to start it would let them through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_process(models: tuple[bytes, bytes], dtype: np.dtype) -> None:
    """Start a worker in a process, which ends when the main one is killed."""
    global _encoder
    gc.disable()  # nothing here is in cycles, and to look for them takes a twentieth of the time
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()
    _encoder = BlockEncoder(models, dtype)


def _encode(block: Block) -> Encoded:
    return _encoder.encode(block)
