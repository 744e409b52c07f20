"""From text to token ids and back: what every tokenizer does."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence

from fastdiss_cli.errors import FastdissError

BLANK = "\u2581"  # SentencePiece's mark for a blank


class Tokenizer(ABC):
    """Turn text into token ids and back; a sentence's ids end with ``eos``.

    Attributes:
        model: the serialised tokenizer; see `make_tokenizer`.
        vocab_size: the number of ids, including special symbols.
        bos, pad, eos, unk: the ids of the special symbols.
    """

    model: bytes
    vocab_size: int
    bos: int
    pad: int
    eos: int
    unk: int

    @property
    def hash(self) -> str:
        """The sha256 of the model's bytes: equal hashes mean equal ids."""
        return hashlib.sha256(self.model).hexdigest()

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the ids of one sentence, including ``eos``."""

    def encode_source(self, text: str) -> list[int]:
        """Return the ids of a sentence to translate; white space alone counts as an empty one."""
        return self.encode("" if text.isspace() else text)

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without bos, pad and eos."""

    @abstractmethod
    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the written form of each id."""

    @property
    @abstractmethod
    def lossless(self) -> bool:
        """Whether decoding restores every text that has no U+2581, SentencePiece's mark."""

    @abstractmethod
    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, as `encode` does."""

    @abstractmethod
    def altered(self, texts: list[str], rows: list[list[int]]) -> set[int]:
        """Return the indices of the texts that their ids, ``rows``, do not restore."""


def check_same(
    own: tuple[Tokenizer, Tokenizer], others: tuple[Tokenizer, Tokenizer], where: str, remedy: str
) -> None:
    """Refuse tokenizers that differ from the checkpoint's: their ids would mean other tokens.

    Args:
        own: the checkpoint's, of source and target.
        others, where: the others, and what they belong to.
        remedy: what to do.

    Raises:
        FastdissError: they differ; the message has both hashes.
    """
    for side, mine, other in zip(("source", "target"), own, others, strict=True):
        if mine.hash != other.hash:
            raise FastdissError(
                f"the {side} tokenizer of {where} ({other.hash[:16]}) is not the checkpoint's "
                f"({mine.hash[:16]}); {remedy}"
            )
