"""The Python API: load a checkpoint and generate."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastdiss_cli.data.tokenizer import Tokenizer
from fastdiss_cli.decoding.generation import Run, decode
from fastdiss_cli.decoding.output import hypothesis_text
from fastdiss_cli.decoding.selection import by_mbr, by_score
from fastdiss_cli.device import pick_device
from fastdiss_cli.errors import FastdissError
from fastdiss_cli.models.registry import Seq2SeqModel
from fastdiss_cli.training.checkpoint import load_model


@dataclasses.dataclass
class Translator:
    """A loaded model with its tokenizers."""

    model: Seq2SeqModel
    src_tokenizer: Tokenizer
    tgt_tokenizer: Tokenizer

    def generate(
        self, sentences: Sequence[str], max_tokens: int = 8000, **options: Any
    ) -> list[str]:
        """Translate sentences.

        Args:
            sentences: raw text.
            max_tokens: padded source tokens a batch, all candidates counted.
            **options: the model's decoding options, such as ``steps=5, noise_beam=3`` (see its
                `Decoding`). Several candidates are chosen from as the command chooses.

        Returns:
            One translation a sentence, in order.

        Raises:
            FastdissError: an option that the model does not have, or a value out of range.
        """
        known = [field.name for field in dataclasses.fields(self.model.Decoding)]
        for name in options:
            if name not in known:
                raise FastdissError(f"no decoding option {name!r}; there are {', '.join(known)}")
        run = Run(self.model.Decoding(**options))
        mbr = self.model.default_select == "mbr"
        select = by_mbr(self.tgt_tokenizer, "bleu") if mbr else by_score
        if sentences:
            sources = [self.src_tokenizer.encode(sentence) for sentence in sentences]
            decode(self.model, sources, [run], select, max_tokens)
        return [hypothesis_text(hypothesis, self.tgt_tokenizer) for hypothesis in run.best]


def load(path: str | Path, device: str = "auto", user_module: Path | None = None) -> Translator:
    """Load a checkpoint; it needs no other file.

    Raises:
        FastdissError: no such checkpoint, or it is damaged.
    """
    model, src, tgt, _ = load_model(Path(path), pick_device(device), user_module)
    return Translator(model, src, tgt)
