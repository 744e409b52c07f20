"""Read a tokenizer, whichever kind it is."""

from __future__ import annotations

from pathlib import Path

from fastdiss_cli.data.dictionary import Dictionary, is_dictionary
from fastdiss_cli.data.sentencepiece import SentencePiece
from fastdiss_cli.data.tokenizer import Tokenizer
from fastdiss_cli.errors import FastdissError


def make_tokenizer(model: bytes, origin: str = "tokenizer") -> Tokenizer:
    """Return the tokenizer in serialised form: a fairseq dictionary or a SentencePiece model.

    Args:
        model: the bytes.
        origin: where they come from, for error messages.

    Raises:
        FastdissError: they are neither.
    """
    return Dictionary(model, origin) if is_dictionary(model) else SentencePiece(model, origin)


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer from a file; see `make_tokenizer`."""
    try:
        return make_tokenizer(path.read_bytes(), origin=str(path))
    except IsADirectoryError:
        raise FastdissError(
            f"{path} is a folder: give files, of a dataset {path}/tokenizer.src,"
            f"{path}/tokenizer.tgt"
        ) from None
    except OSError as error:
        raise FastdissError(f"{path}: cannot read the tokenizer: {error.strerror}") from None
