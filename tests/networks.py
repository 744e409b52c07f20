"""Small networks, and sentences for them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from fastdiss_cli.data.batching import Batch, pad
from fastdiss_cli.decoding.generation import Run, SequenceGenerator
from fastdiss_cli.decoding.selection import by_score
from fastdiss_cli.models.registry import Seq2SeqModel, Vocabulary, architecture

VOCAB = Vocabulary(size=23, bos=0, pad=1, eos=2)
SMALL = {"model_dim": 32, "ffn_dim": 64, "heads": 2, "encoder_layers": 2, "decoder_layers": 2}


def make_model(family: str, vocab: Vocabulary = VOCAB, **options: object) -> Seq2SeqModel:
    torch.manual_seed(0)
    arch = architecture(f"{family}_tiny")
    sizes = {**SMALL, **({} if family == "transformer" else {"latent_dim": 16})}
    return arch.family(arch.config({**sizes, **options}), vocab, vocab).eval()


def random_sentences(count: int, longest: int = 9) -> list[list[int]]:
    draw = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, longest, (count,), generator=draw).tolist()
    return [[*torch.randint(4, 23, (n,), generator=draw).tolist(), VOCAB.eos] for n in lengths]


def make_batch(sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> Batch:
    return Batch(*pad(sources, VOCAB.pad), *pad(targets, VOCAB.pad))


def answers(model: Seq2SeqModel, sources: list[list[int]], max_tokens: int, **options: object):
    """Return the tokens and the score of each sentence's best answer, for comparison."""
    limit = {"max_len_b": 12} if hasattr(model.Decoding, "beam") else {}
    run = Run(model.Decoding(**limit, **options))
    SequenceGenerator(model, by_score, max_tokens).decode(sources, [run])
    return [(h.tokens, pytest.approx(h.score, abs=1e-4)) for h in run.best]
