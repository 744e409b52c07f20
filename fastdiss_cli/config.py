"""Configuration: defaults < recipe YAML < flags < --set section.key=value.

A configuration is a frozen dataclass. This module builds one from untyped values (from YAML, the
command line or a checkpoint) and rejects unknown options and invalid values.
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from fastdiss_cli import logs
from fastdiss_cli.errors import FastdissError, OptionError, suggest

C = TypeVar("C")
DTYPES = ("auto", "float32", "bfloat16")
LR_SCHEDULERS = ("inverse_sqrt", "cosine")
SECTIONS = ("model", "train")
# raised by `yaml.safe_load` on text that is not YAML, and on values such as `!!int x`
_NOT_YAML = (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


class _Recipe(yaml.SafeLoader):
    """A YAML loader that rejects duplicate keys, instead of keeping the last one."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                line = key.start_mark.line + 1
                raise yaml.YAMLError(f"duplicate key {key.value!r} in line {line}")
            seen.add(key.value)
        return node


def option(
    default: Any,
    meaning: str,
    needs: tuple[str, bool | str | tuple[str, ...]] | None = None,
    before: Any = None,
) -> Any:
    """Declare a configuration field; `fastdiss models ARCH` prints its meaning.

    Args:
        default: its default value.
        meaning: its description, in a few words.
        needs: another field and the value, or one of several, that it must have for this one to
            have any effect; True stands for any true value.
        before: the value for older checkpoints, which do not have this field; None: the default.
    """
    metadata = {"meaning": meaning, "needs": needs, "before": before}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """All options of a training run but those of the model."""

    arch: str = option("fastdiss_small", "a name that `fastdiss models` lists")
    seed: int = option(1, "seed of all random draws")
    max_tokens: int = option(8000, "padded tokens per batch and side, per process")
    max_positions: int = option(1024, "longer training sentences are left out, with a warning")
    update_freq: int = option(1, "batches whose gradients are accumulated for one update")
    max_update: int = option(100_000, "updates before training stops")
    max_epoch: int = option(0, "epochs before training stops; 0: no limit")
    patience: int = option(20, "validations without a new best before training stops; 0: no limit")
    lr: float = option(5e-4, "peak learning rate of AdamW")
    lr_scheduler: str = option(
        "inverse_sqrt", "schedule of the learning rate: inverse_sqrt, or cosine to 0"
    )
    warmup_updates: int = option(4000, "updates over which the learning rate rises from 0")
    adam_betas: tuple[float, float] = option((0.9, 0.98), "betas of AdamW")
    weight_decay: float = option(0.01, "weight decay of AdamW, matrices only")
    clip_norm: float = option(1.0, "maximum gradient norm; 0: no clipping")
    ema_decay: float = option(0.9999, "decay of the weight average that is decoded with; 0: none")
    max_skipped: int = option(20, "consecutive non-finite gradients before training stops")
    validate_interval_updates: int = option(1000, "updates between validations; 0: every epoch")
    save_interval_updates: int = option(1000, "updates between saves of checkpoint_last")
    valid_sentences: int = option(500, "sentences decoded for validation BLEU; 0: loss only")
    valid_steps: int = option(
        5, "sampling steps for validation BLEU", needs=("valid_sentences", True)
    )
    keep_last: int = option(1, "numbered checkpoints kept, one per validation; 0: none")
    log_interval: int = option(50, "updates between lines of metrics.jsonl")
    tensorboard: bool = option(False, "also write TensorBoard event files beside the checkpoints")
    dtype: str = option("auto", "type of matrix products: auto, float32 or bfloat16 (autocast)")
    compile: bool = option(False, "use torch.compile")
    shard: bool = option(False, "shard weights, moments and average across the processes")

    def __post_init__(self) -> None:
        for key in (
            "max_tokens", "max_positions", "update_freq", "max_update", "valid_steps",
            "save_interval_updates", "log_interval", "max_skipped",
        ):  # fmt: skip
            require(self, key, getattr(self, key) >= 1, "at least 1")
        for key in (
            "max_epoch", "patience", "warmup_updates", "weight_decay", "clip_norm",
            "validate_interval_updates", "valid_sentences", "keep_last",
        ):  # fmt: skip
            unlimited = " (0: no limit)" if key in ("max_epoch", "patience") else ""  # fairseq: -1
            require(self, key, getattr(self, key) >= 0, f"at least 0{unlimited}")
        require(self, "valid_steps", self.valid_steps <= 10_000, "at most 10000")
        require(self, "lr", self.lr > 0, "above 0")
        require(self, "ema_decay", 0 <= self.ema_decay < 1, "in [0, 1)")
        require(self, "adam_betas", all(0 <= b < 1 for b in self.adam_betas), "a pair in [0, 1)")
        require(self, "shard", not (self.shard and self.compile), "false with compile")
        one_of(self, "lr_scheduler", LR_SCHEDULERS)
        warm = self.warmup_updates > 0 or self.lr_scheduler != "inverse_sqrt"
        require(self, "warmup_updates", warm, "at least 1 with inverse_sqrt")
        one_of(self, "dtype", DTYPES)


def idle(config: Any) -> dict[str, str]:
    """Return the names of the options without effect, each with the option that is the reason."""
    needs = {field.name: field.metadata.get("needs") for field in dataclasses.fields(config)}

    def reason(name: str) -> str | None:
        if needs[name] is None:
            return None
        other, wanted = needs[name]
        value = getattr(config, other)
        if wanted is True:
            met = bool(value)
        else:
            met = value in (wanted if isinstance(wanted, tuple) else (wanted,))
        return reason(other) if met else other

    return {name: other for name in needs if (other := reason(name))}


def require(config: object, key: str, holds: bool, what: str) -> None:
    """Raise an OptionError unless a configuration value is in its range."""
    if not holds:
        raise OptionError(key, f"must be {what}, not {getattr(config, key)!r}")


def one_of(config: object, key: str, choices: Sequence[str]) -> None:
    """Raise an OptionError unless a configuration value is one of the choices."""
    value = getattr(config, key)
    if value not in choices:
        hint = suggest(value, choices)
        raise OptionError(key, f"must be one of {', '.join(choices)}, not {value!r}{hint}")


def build(cls: type[C], values: Mapping[str, Any], section: str = "", arch: str = "") -> C:
    """Build a configuration from untyped values; missing ones keep their defaults.

    Args:
        cls: the dataclass of the configuration.
        values: by field name.
        section: one of `SECTIONS`, to prefix option names in errors.
        arch: the architecture that the options belong to, for errors.

    Raises:
        OptionError: a key is unknown, or a value has the wrong type or is out of range.
    """
    prefix = section and f"{section}."
    hints = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    typed = {}
    for key, value in values.items():
        if key not in known:
            hint = suggest(str(key), known)
            if section == "model" and key in TrainConfig.__dataclass_fields__:
                hint = f"; use train.{key}"
            elif not hint and section:
                hint = f"; `fastdiss models {arch or 'ARCH'}` lists all"
            elif not hint:
                hint = f"; the options are {', '.join(known)}"
            raise OptionError(f"{prefix}{key}", f"is not an option{arch and f' of {arch}'}{hint}")
        typed[key] = _convert(value, hints[key], f"{prefix}{key}")
    try:
        return cls(**typed)
    except OptionError as error:
        raise OptionError(f"{prefix}{error.option}", error.reason) from None


_GONE = {"embedding_scale": False}  # removed options, at the value at which they did nothing


def build_saved(cls: type[C], values: Mapping[str, Any], section: str) -> C:
    """Build the configuration of a checkpoint, possibly an older one; see `build` and `option`.

    Raises:
        OptionError: see `build`; or the checkpoint is from a newer version.
    """
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    before = {field.name: field.metadata.get("before") for field in fields}
    values = {n: v for n, v in values.items() if n in before or (n, v) not in _GONE.items()}
    for name in values:
        if name not in before:
            other = "an older" if name in _GONE else "a newer"
            raise OptionError(
                f"{section}.{name}",
                f"is not an option of this version of fastdiss: the checkpoint is from {other} one",
            )
    then = {name: value for name, value in before.items() if value is not None}
    return build(cls, {**then, **values}, section)


def option_changes(saved: Mapping[str, Any], now: Any, section: str) -> dict[str, tuple[Any, Any]]:
    """Return (old, new) by name of the options of a checkpoint that differ from a configuration.

    Options without effect, because another one is off, are ignored.

    Args:
        saved: those of the checkpoint; see `build_saved`.
        now: the configuration.
        section: one of `SECTIONS`.
    """
    then = build_saved(type(now), saved, section)
    values = {name: (value, getattr(now, name)) for name, value in vars(then).items()}
    ignored = {**idle(then), **idle(now)}
    return {n: (old, new) for n, (old, new) in values.items() if old != new and n not in ignored}


def check_types(cls: type) -> None:
    """Check that `build` can make every field of a configuration.

    Raises:
        OptionError: it cannot.
    """
    hints = typing.get_type_hints(cls)
    for name in (field.name for field in dataclasses.fields(cls)):
        hint = hints[name]
        parts = set(typing.get_args(hint) or (hint,)) - {types.NoneType, Ellipsis}
        plain = typing.get_origin(hint) in (None, tuple, types.UnionType)
        if not plain or len(parts) > 1 or not parts <= {bool, int, float, str}:
            raise OptionError(
                name, "must be a bool, int, float, str, one of these | None, or a tuple"
            )


def read_recipe(path: Path | None) -> dict[str, dict[str, Any]]:
    """Read a recipe: a YAML mapping with the sections ``model`` and ``train``."""
    if path is None:
        return {section: {} for section in SECTIONS}
    try:
        recipe = _Recipe(path.read_text(encoding="utf-8")).get_single_data()
    except OSError as error:
        raise FastdissError(f"{path}: {error.strerror}") from None
    except _NOT_YAML as error:
        reason = " ".join(str(error).split())
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
            reason = f"line {error.problem_mark.line + 1}: {error.problem}"
        raise FastdissError(f"{path} is not a valid recipe: {reason}") from None
    if not isinstance(recipe, dict):
        raise FastdissError(f"{path}: a recipe is a mapping with the sections model and train")
    for section, values in recipe.items():
        if section not in SECTIONS:
            hint = suggest(str(section), SECTIONS)
            if not isinstance(values, dict):
                hint = "; options are under `model:` or `train:`, see `fastdiss models ARCH`"
            raise FastdissError(f"{path}: unknown section {section!r}{hint}")
        if not isinstance(values, (dict, types.NoneType)):
            raise FastdissError(f"{path}: section {section!r} must be a mapping of keys to values")
    return {section: recipe.get(section) or {} for section in SECTIONS}


def parse_settings(settings: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Parse the ``section.key=value`` items of ``--set``; values are YAML."""
    parsed: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for item in settings:
        name, equals, value = item.partition("=")
        section, dot, key = name.partition(".")
        if not equals or not dot or section not in SECTIONS:
            raise FastdissError(f"--set {item}: write model.KEY=VALUE or train.KEY=VALUE")
        if key in parsed[section] and logs.is_main_process():
            logs.warn(f"--set {name} is given more than once: the last one counts")
        try:
            parsed[section][key] = yaml.safe_load(value)
        except _NOT_YAML:
            raise FastdissError(f"--set {item}: cannot read the value") from None
    return parsed


def _convert(value: Any, hint: Any, name: str) -> Any:
    """Return ``value`` as the type of a configuration field."""
    if isinstance(hint, types.UnionType):  # X | None
        (kind,) = set(typing.get_args(hint)) - {types.NoneType}
        return None if value is None else _convert(value, kind, name)
    if typing.get_origin(hint) is tuple:
        parts = typing.get_args(hint)
        variadic = len(parts) == 2 and parts[1] is Ellipsis
        if isinstance(value, (list, tuple)) and (variadic or len(value) == len(parts)):
            return tuple(_convert(v, parts[0], name) for v in value)
        what = "a list" if variadic else f"a list of {len(parts)} values"
        raise OptionError(name, f"must be {what}, not {_shown(value)}")
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:  # YAML 1.1 takes 5e-4 for a string
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    elif hint is int and isinstance(value, int) and abs(value) >= 2**63:
        raise OptionError(name, f"must fit into 64 bits, not {_shown(value)}")
    elif isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    what = {float: "a number", int: "a whole number", bool: "true or false", str: "a word"}[hint]
    raise OptionError(name, f"must be {what}, not {_shown(value)}")


def _shown(value: Any) -> str:
    """Return a value for a message, truncated: a few YAML aliases can expand to gigabytes."""
    if value is None:
        return "empty"
    text = reprlib.repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
