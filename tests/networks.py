"""Small networks, and sentences for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastdiss_cli.data.batching import Batch, pad
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
