"""fairseq's dictionary: one word and its count per line, in the order of ids."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fastdiss_cli.data.tokenizer import BLANK, Tokenizer
from fastdiss_cli.errors import FastdissError

_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")  # ids 0 to 3, not in the file
_LINE = re.compile(r"(.+) \d+( #fairseq:overwrite)?")
_FIRST_LINE = re.compile(rb"[^\r\n]+ \d+( #fairseq:overwrite)?[ \t]*([\r\n]|\Z)")


def is_dictionary(model: bytes) -> bool:
    """Return whether bytes begin like a dictionary, which no SentencePiece model does."""
    return _FIRST_LINE.match(model) is not None


class Dictionary(Tokenizer):
    """A fairseq dictionary, for text that is already segmented into words between blanks.

    Ids are those of fairseq: bos 0, pad 1, eos 2, unk 3, then the lines of the file. A repeated
    word is an error, unless the later line is flagged ``#fairseq:overwrite`` and replaces it.
    Decoding undoes the segmentation that the words show: subword-nmt's ``@@`` at the end of a
    piece, or SentencePiece's mark at the beginning of a word.

    Args:
        model: the bytes of ``dict.<language>.txt``.
        origin: where they come from, for error messages.

    Raises:
        FastdissError: the bytes are not a dictionary.
    """

    bos, pad, eos, unk = range(4)
    lossless = False

    def __init__(self, model: bytes, origin: str = "dictionary") -> None:
        self.model = model
        try:
            lines = model.decode("utf-8").split("\n")
        except UnicodeDecodeError:
            raise FastdissError(f"{origin}: the dictionary is not valid UTF-8") from None
        if not lines[-1]:
            lines.pop()
        if not lines:
            raise FastdissError(f"{origin}: the dictionary is empty")
        self._symbols = list(_SPECIALS)
        self._ids = {"<unk>": self.unk}
        for number, line in enumerate(lines, start=1):
            match = _LINE.fullmatch(line.rstrip())
            if match is None:
                raise FastdissError(
                    f"{origin}: line {number} is not a word and its count, as fairseq writes them"
                )
            word, overwrites = match.groups()
            if not overwrites and (word in self._ids or word in _SPECIALS):
                raise FastdissError(
                    f"{origin}: line {number} repeats the word {word!r}; remove it, or "
                    "flag it with #fairseq:overwrite"
                )
            self._ids[word] = len(self._symbols)
            self._symbols.append(word)
        self.vocab_size = len(self._symbols)
        words = self._symbols[len(_SPECIALS) :]
        self._bpe = any(len(word) > 2 and word.endswith("@@") for word in words)
        self._sentencepiece = not self._bpe and any(word.startswith(BLANK) for word in words)

    def encode(self, text: str) -> list[int]:
        return [*(self._ids.get(word, self.unk) for word in text.split()), self.eos]

    def decode(self, ids: Sequence[int]) -> str:
        text = " ".join(self._symbols[i] for i in ids if i not in (self.bos, self.pad, self.eos))
        if self._bpe:
            return f"{text} ".replace("@@ ", "").rstrip()
        if self._sentencepiece:
            return text.replace(" ", "").replace(BLANK, " ").strip()
        return text

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [self._symbols[i] for i in ids]

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        return list(map(self.encode, texts))

    def altered(self, texts: list[str], rows: list[list[int]]) -> set[int]:
        """Return the indices of the texts that differ from their words joined by blanks."""
        words = self._symbols.__getitem__
        pairs = enumerate(zip(texts, rows, strict=True))
        return {i for i, (text, row) in pairs if " ".join(map(words, row[:-1])) != text}
