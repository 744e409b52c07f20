"""SentencePiece models, lossless if they are trained here."""

from __future__ import annotations

import io
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

import sentencepiece as spm

from fastdiss_cli import logs
from fastdiss_cli.data.tokenizer import BLANK, Tokenizer
from fastdiss_cli.errors import FastdissError

MODEL_TYPES = ("unigram", "bpe", "char", "word")
# training uses a random sample of at most this many lines: more do not change the pieces
_TRAINING_LINES = 2_000_000
_LONGEST_LINE = 1 << 16  # bytes; SentencePiece skips longer lines
# the end of a model of `train_tokenizer`: field 3, a NormalizerSpec with the name "identity", no
# character map, and remove_extra_whitespaces off
_NO_NORMALIZER = b"\x1a\x0e\x0a\x08identity\x12\x00\x20\x00"
_FIXED_PIECES = 260  # every vocabulary holds 256 bytes and 4 special symbols


class SentencePiece(Tokenizer):
    """A SentencePiece model.

    Models that are trained here number their special symbols as fairseq does (bos 0, pad 1, eos 2,
    unk 3); other models keep their numbers, and those of bos, pad and eos that they lack are
    appended after the last piece.

    Args:
        model: the bytes of a SentencePiece model.
        origin: where they come from, for error messages.

    Raises:
        FastdissError: the bytes are not a SentencePiece model.
    """

    def __init__(self, model: bytes, origin: str = "tokenizer") -> None:
        self.model = model
        self._sp = spm.SentencePieceProcessor()
        try:
            if not model:
                raise RuntimeError
            self._sp.LoadFromSerializedProto(model)
        except (RuntimeError, UnicodeError):
            raise FastdissError(f"{origin}: not a SentencePiece model") from None
        self.vocab_size = self._sp.vocab_size()
        self.unk = self._sp.unk_id()
        specials = []
        for own in (self._sp.bos_id(), self._sp.pad_id(), self._sp.eos_id()):
            specials.append(own if own >= 0 else self.vocab_size)
            self.vocab_size += own < 0
        self.bos, self.pad, self.eos = specials
        self._specials = set(specials)

    def encode(self, text: str) -> list[int]:
        return [*self._sp.encode(text), self.eos]

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text; encoding all at once takes two thirds of the time."""
        has_eos = self._sp.eos_id() >= 0
        rows = self._sp.encode(texts, add_eos=has_eos, num_threads=1)
        if not has_eos:
            for row in rows:
                row.append(self.eos)
        return rows

    def altered(self, texts: list[str], rows: list[list[int]]) -> set[int]:
        """Return the indices of the texts whose ids decode to a different text.

        Decoding every text would add half the time of encoding. So each text is compared with its
        joined pieces, and only those that differ are decoded.
        """
        if self.lossless:
            if BLANK not in "".join(texts):
                return set()
            return {i for i, text in enumerate(texts) if BLANK in text}
        written = self._written.__getitem__
        return {
            i
            for i, (text, row) in enumerate(zip(texts, rows, strict=True))
            if "".join(map(written, row)) != f" {text}" and self.decode(row) != text
        }

    @property
    def lossless(self) -> bool:
        """Whether the model normalises nothing and falls back to bytes, like those trained here."""
        byte = self._sp.piece_to_id("<0x00>")
        return self.model.endswith(_NO_NORMALIZER) and self._sp.is_byte(byte)

    @cached_property
    def _written(self) -> list[str]:
        """The text of each piece, or a line break, which no text has, if it decodes differently."""
        written = []
        for i, piece in enumerate(self.pieces(range(self.vocab_size))):
            text = piece.replace(BLANK, " ")
            written.append(text if self.decode([i]) == text.removeprefix(" ") else "\n")
        written[self.eos] = ""
        return written

    def decode(self, ids: Sequence[int]) -> str:
        ids = [i for i in ids if i not in self._specials]
        text = self._sp.decode(ids)
        if BLANK in text:  # the `word` model falls back to the bytes of the mark itself
            text = text.replace(BLANK, " ")
            if self._sp.is_byte(ids[0]):
                text = text.removeprefix(" ")
        return text

    def pieces(self, ids: Sequence[int]) -> list[str]:
        known = self._sp.vocab_size()
        return [self._sp.id_to_piece(i) if i < known else "<special>" for i in ids]


def train_tokenizer(
    lines: Iterable[str], model_type: str, vocab_size: int, total: int = 0
) -> Tokenizer:
    """Train a lossless SentencePiece model.

    Nothing is normalised, blanks are kept, and characters that are not in the vocabulary fall
    back to their UTF-8 bytes (256 of the pieces).

    Args:
        lines: the text, one sentence per item; empty ones are skipped.
        model_type: one of `MODEL_TYPES`.
        vocab_size: the maximum number of pieces; a small corpus gets fewer.
        total: the number of lines; if it is very large, a sample is used, always the same. 0:
            unknown; if there are very many lines, the first are used.

    Raises:
        FastdissError: the vocabulary does not fit the text.
    """
    if total > _TRAINING_LINES:
        logs.info(f"... on a sample of about {_TRAINING_LINES:,} of {total:,} lines")
    counted = _CountedLines(lines, _TRAINING_LINES / max(total, 1))
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(counted),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            input_sentence_size=_TRAINING_LINES,
            max_sentence_length=_LONGEST_LINE,
            bos_id=0,
            pad_id=1,
            eos_id=2,
            unk_id=3,
            minloglevel=3,
        )
    except RuntimeError as error:
        if counted.failure is not None:
            raise counted.failure from None
        if not counted.count:
            raise FastdissError("no text to train a tokenizer on: every line is empty") from None
        raise FastdissError(_explain(str(error), model_type, vocab_size)) from None
    if counted.long:
        logs.warn(
            f"{counted.long:,} of {counted.count:,} lines are longer than {_LONGEST_LINE:,} bytes: "
            "the tokenizer is not trained on them"
        )
    return SentencePiece(model.getvalue())


class _CountedLines:
    """Non-empty lines, or a share of them, counted as they pass.

    An error in reading them is kept. SentencePiece itself would draw a new sample in every run.
    """

    def __init__(self, lines: Iterable[str], share: float) -> None:
        self.lines, self.share = lines, share
        self.count = self.long = 0
        self.failure: BaseException | None = None

    def __iter__(self) -> Iterator[str]:
        draw = random.Random(1)
        try:
            for line in self.lines:
                drawn = self.share >= 1 or draw.random() < self.share
                if line and drawn and self.count < _TRAINING_LINES:
                    self.count += 1
                    # a character has at most 4 bytes
                    may_be_long = 4 * len(line) > _LONGEST_LINE
                    self.long += may_be_long and len(line.encode()) > _LONGEST_LINE
                    yield line
        except BaseException as error:  # SentencePiece would wrap it in a RuntimeError of its own
            self.failure = error
            raise


def _explain(message: str, model_type: str, vocab_size: int) -> str:
    reason = message.rsplit("] ", 1)[-1].strip()
    needed = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
    if needed:
        return f"--vocab-size {vocab_size} is too small for the text: use at least {needed[1]}"
    if vocab_size < _FIXED_PIECES:
        return f"--vocab-size {vocab_size} is too small: the bytes alone need {_FIXED_PIECES} ids"
    if "sentences_.empty()" in message:
        return (
            f"no line of the text can train a tokenizer: all are longer than {_LONGEST_LINE:,} "
            "bytes or contain reserved characters"
        )
    return f"cannot train a {model_type} tokenizer of {vocab_size} pieces: {reason}"
