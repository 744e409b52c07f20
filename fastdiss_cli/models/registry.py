"""The one model registry: an architecture is a name for a family and its sizes.

A family is a subclass of `Seq2SeqModel`. Adding a system is one file with one such class and one
`register` call for each size, the file named in `FAMILIES`; the commands find it by its name and
never mention a model.
"""
# B batch, S source length, T target length

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fastdiss_cli.config import build, check_types
from fastdiss_cli.data.batching import Batch
from fastdiss_cli.data.layout import Layout
from fastdiss_cli.device import out_of_memory
from fastdiss_cli.errors import (
    USER_MODULE,
    FastdissError,
    OptionError,
    describe_bug,
    suggest,
)
from fastdiss_cli.models import FAMILIES


@dataclass(frozen=True)
class Vocabulary:
    """The facts about a tokenizer that a model needs; equal ones are the same vocabulary."""

    size: int
    bos: int
    pad: int
    eos: int
    hash: str = ""  # of the tokenizer: two of the same size may give an id to different tokens


@dataclass
class Loss:
    """A training loss: the mean to minimise, and its parts for the log (all 0-d tensors).

    The parts have the same names, in the same order, in every batch: ranks add them up.
    """

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class HistoryStep:
    """A candidate at one sampling step.

    Attributes:
        time: noise time of the step.
        tokens: the best token of each position up to the first eos.
        confidences: their probabilities, and that of the eos.
        norm: mean square of a coordinate of z0_hat; that of the true embeddings is 1.
        gap: mean squared difference of a coordinate to the z0_hat that the network gives with a
            fresh estimate of this step as its self_cond; measured only for a diagnosis.
    """

    time: float
    tokens: list[int]
    confidences: list[float]
    norm: float = math.nan
    gap: float = math.nan


@dataclass
class Hypothesis:
    """One candidate answer.

    Attributes:
        tokens: ids without eos.
        score: mean log-probability of the tokens; higher is better. In beam search the sum is
            divided by length ** lenpen instead.
        token_scores: log-probability of each token, and of eos if the answer ended with it.
        nfe: decoder evaluations that it took.
        history: the sampling steps, if requested.
        runners_up: other candidates of the sentence, if requested.
        weight: the probability of its length, where the model predicts lengths; MBR weighs
            candidates by it.
    """

    tokens: list[int]
    score: float
    token_scores: list[float]
    nfe: int
    history: list[HistoryStep] = field(default_factory=list)
    runners_up: list[Hypothesis] = field(default_factory=list)
    weight: float = 1.0


class Seq2SeqModel(nn.Module, ABC):
    """The contract of every system in the registry.

    Class attributes:
        Config: frozen dataclass of the model's options.
        Decoding: frozen dataclass of its decoding options, with a property ``candidates``, how
            many it makes of a sentence. A flag of ``generate`` applies to a model whose
            ``Decoding`` has a field of that name.
        default_select: the default of ``--select``.

    The parts that ``--compile`` compiles are named ``encoder`` and ``decoder``. All state is in
    parameters: buffers are not saved. For decoding `frozen` replaces linear layers by faster ones,
    so a model must call them and not access their weights. A model that can rerank has
    ``log_likelihood``. One whose ``Decoding`` has a field ``diagnose`` also has the fields
    ``steps`` and ``time_grid`` there, and itself ``schedule``, ``self_conditioned`` and
    ``losses_at`` (see `Difformer`).
    """

    Config: ClassVar[type]
    Decoding: ClassVar[type]
    default_select: ClassVar[str] = "score"

    def __init__(self, config: Any, src: Vocabulary, tgt: Vocabulary) -> None:
        super().__init__()
        self.config, self.src, self.tgt = config, src, tgt

    @abstractmethod
    def loss(self, batch: Batch, update: int) -> Loss:
        """Return the loss of a batch; random draws come from torch's global generators."""

    @abstractmethod
    def encode(self, src_tokens: Tensor, layout: Layout) -> Any:
        """Return what decoding needs of the sources, int64 [B, S], right-padded as in layout."""

    @abstractmethod
    def decode(
        self,
        memory: Any,
        seeds: Tensor,
        options: Any,
        gold: Sequence[Sequence[int]] | None = None,
    ) -> list[list[Hypothesis]]:
        """Return the candidates of each sentence, best score first.

        Args:
            memory: from `encode`, for B sentences.
            seeds: int64 [B], of the noise of each sentence.
            options: a `Decoding`.
            gold: the references, for options that diagnose with them.
        """

    def misfits(self, src_lengths: np.ndarray, tgt_lengths: np.ndarray) -> str | None:
        """Describe training data that the model cannot represent; None: there is none.

        Args:
            src_lengths, tgt_lengths: numbers of tokens of each pair, int [N].
        """
        return None

    @classmethod
    def decoding_options(cls) -> list[str]:
        """Return the names of the options of ``Decoding``."""
        return [field.name for field in dataclasses.fields(cls.Decoding)]

    def check_decoding(self, options: Any) -> None:
        """Raise an `OptionError` if a ``Decoding`` does not fit this model."""

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def num_parameters(self) -> int:
        """Return the number of trained parameters; not for a frozen model."""
        return sum(p.numel() for p in self.parameters())


@dataclass(frozen=True)
class Architecture:
    """One entry of the registry."""

    name: str
    family: type[Seq2SeqModel]
    description: str
    sizes: dict[str, Any]

    def config(self, overrides: dict[str, Any]) -> Any:
        """Return the model configuration: the family's defaults < sizes < overrides."""
        return build(self.family.Config, {**self.sizes, **overrides}, "model", self.name)

    def model(self, config: Any, src: Vocabulary, tgt: Vocabulary) -> Seq2SeqModel:
        """Return a new model.

        Raises:
            FastdissError: a user-defined family failed; the message says where.
        """
        try:
            return self.family(config, src, tgt)
        except Exception as error:
            if isinstance(error, FastdissError) or out_of_memory(error):
                raise
            raise FastdissError(f"making {self.name}: {describe_bug(error)}") from error


_ARCHITECTURES: dict[str, Architecture] = {}


def register(name: str, family: type[Seq2SeqModel], description: str, **sizes: Any) -> None:
    """Add an architecture.

    Args:
        name: the value of ``--arch``; by convention ``family_size``.
        family: the model class.
        description: one line for ``fastdiss models``.
        sizes: options of ``family.Config`` that differ from its defaults.

    Raises:
        FastdissError: the name is taken, a size is not an option of the family, or the family does
            not declare its options as `Seq2SeqModel` demands.
    """
    if name in _ARCHITECTURES:
        raise FastdissError(f"architecture {name!r} is registered twice")
    for part in ("Config", "Decoding"):
        options = getattr(family, part, None)
        if not is_dataclass(options):
            raise FastdissError(f"architecture {name!r}: {family.__name__} has no dataclass {part}")
        try:
            check_types(options)
        except OptionError as error:
            raise FastdissError(f"architecture {name!r}: {part}.{error}") from None
    if not hasattr(family.Decoding, "candidates"):
        raise FastdissError(f"architecture {name!r}: Decoding has no property candidates")
    made = Architecture(name, family, description, sizes)
    made.config({})
    _ARCHITECTURES[name] = made


def architectures(user_module: Path | None = None) -> dict[str, Architecture]:
    """Return all architectures by name, including those of a user module."""
    for family in FAMILIES:
        importlib.import_module(f"fastdiss_cli.models.{family}")
    if user_module is not None:
        _import_user_module(user_module)
    return _ARCHITECTURES


def architecture(name: str, user_module: Path | None = None) -> Architecture:
    """Return one architecture.

    Raises:
        OptionError: no such name.
        FastdissError: the user's module fails.
    """
    known = architectures(user_module)
    if name not in known:
        raise OptionError(
            "train.arch",
            f"{name!r} is unknown{suggest(name, known)} (`fastdiss models` lists what there is, "
            "--user-module adds your own)",
        )
    return known[name]


def _import_user_module(path: Path) -> None:
    name = f"{USER_MODULE}{path.resolve()}"
    if name in sys.modules:
        return
    before = set(_ARCHITECTURES)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        reason = "must be a .py file" if path.exists() else "no such file"
        raise FastdissError(f"--user-module {path}: {reason}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)  # it may import its neighbours
    try:
        with redirect_stdout(sys.stderr):  # stdout is for data
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        reason = error if isinstance(error, FastdissError) else describe_bug(error)
        del sys.modules[name]  # a notebook may try again
        for added in set(_ARCHITECTURES) - before:
            del _ARCHITECTURES[added]
        raise FastdissError(f"--user-module {path}: {reason}") from error
    finally:
        sys.path.remove(folder)
