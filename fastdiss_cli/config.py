"""Configuration: defaults < recipe YAML < flags < --set section.key=value.

A configuration is a frozen dataclass. This file turns untyped values (from YAML, the command
line or a checkpoint) into one, and refuses what it does not know.
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

from fastdiss_cli.errors import FastdissError, OptionError, suggest

C = TypeVar("C")
DTYPES = ("auto", "float32", "bfloat16")
LR_SCHEDULERS = ("inverse_sqrt", "cosine")
SECTIONS = ("model", "train")
# what `yaml.safe_load` raises on text that is no YAML, and on values such as `!!int x`
_NOT_YAML = (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


class _Recipe(yaml.SafeLoader):
    """YAML in which a key that is there twice is an error, and not the later one of them."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                line = key.start_mark.line + 1
                raise yaml.YAMLError(f"{key.value!r} is there twice, again in line {line}")
            seen.add(key.value)
        return node


def option(
    default: Any,
    meaning: str,
    needs: tuple[str, object] | None = None,
    before: Any = None,
    formerly: str = "",
) -> Any:
    """Declare a field of a configuration; `fastdiss models ARCH` prints what it means.

    Args:
        default: its value unless one is given.
        meaning: a few words.
        needs: another field and the value without which this one changes nothing; True: any value
            but 0, false or empty.
        before: the value that the code had before this option existed; older checkpoints are read
            with it. None: today's default.
        formerly: its name in older checkpoints, if it had another.
    """
    metadata = {"meaning": meaning, "needs": needs, "before": before, "formerly": formerly}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """Everything about a training run that is not the model."""

    arch: str = option("fastdiss_small", "a name that `fastdiss models` lists")
    seed: int = option(1, "seed of all random draws")
    max_tokens: int = option(8000, "padded tokens per batch and side, per process")
    max_positions: int = option(1024, "longer training sentences are left out, with a report")
    update_freq: int = option(1, "batches whose gradients are added up for one update")
    max_update: int = option(100_000, "updates before training stops")
    max_epoch: int = option(0, "epochs before training stops; 0: no limit")
    patience: int = option(20, "validations without a better score before it stops; 0: no limit")
    lr: float = option(5e-4, "peak learning rate of AdamW")
    lr_scheduler: str = option("inverse_sqrt", "its course: inverse_sqrt, or cosine to 0")
    warmup_updates: int = option(4000, "updates over which the learning rate rises from 0")
    adam_betas: tuple[float, float] = option((0.9, 0.98), "of AdamW")
    weight_decay: float = option(0.01, "weight decay of AdamW, for matrices")
    clip_norm: float = option(1.0, "the norm that gradients are clipped to; 0: no clipping")
    ema_decay: float = option(0.9999, "of the average of the weights, which generates; 0: none")
    max_skipped: int = option(20, "non-finite gradients in a row before training stops")
    validate_interval_updates: int = option(1000, "updates between validations; 0: every epoch")
    save_interval_updates: int = option(1000, "updates between saves of checkpoint_last")
    valid_sentences: int = option(500, "how many are decoded for BLEU; 0: validation loss only")
    valid_steps: int = option(5, "sampling steps for validation BLEU")
    keep_last: int = option(1, "numbered checkpoints kept, one a validation; 0: none")
    log_interval: int = option(50, "updates between lines of metrics.jsonl")
    tensorboard: bool = option(False, "event files for TensorBoard, too, beside the checkpoints")
    dtype: str = option("auto", "type of the products: auto, float32 or bfloat16 (autocast)")
    compile: bool = option(False, "use torch.compile")
    shard: bool = option(False, "divide weights, moments and average among the processes")

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
            require(self, key, getattr(self, key) >= 0, "at least 0")
        require(self, "valid_steps", self.valid_steps <= 10_000, "at most 10000")
        require(self, "lr", self.lr > 0, "above 0")
        require(self, "ema_decay", 0 <= self.ema_decay < 1, "in [0, 1)")
        require(self, "adam_betas", all(0 <= b < 1 for b in self.adam_betas), "two in [0, 1)")
        require(self, "shard", not (self.shard and self.compile), "false with compile")
        one_of(self, "lr_scheduler", LR_SCHEDULERS)
        warm = self.warmup_updates > 0 or self.lr_scheduler != "inverse_sqrt"
        require(
            self, "warmup_updates", warm, "at least 1 with inverse_sqrt, which falls from there"
        )
        one_of(self, "dtype", DTYPES)


def idle(config: Any) -> set[str]:
    """Return the names of the options that change nothing, as what they need is off."""

    def is_idle(field: dataclasses.Field) -> bool:
        if field.metadata.get("needs") is None:
            return False
        other, wanted = field.metadata["needs"]
        value = getattr(config, other)
        return not value if wanted is True else value != wanted

    return {field.name for field in dataclasses.fields(config) if is_idle(field)}


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


def build(cls: type[C], values: Mapping[str, Any], section: str = "") -> C:
    """Make a configuration from untyped values; what is not given keeps its default.

    Args:
        cls: its dataclass.
        values: by the name of the field.
        section: of `SECTIONS`, in front of the names of options in errors.

    Raises:
        OptionError: an unknown key (with the closest known one), a wrong type or range.
    """
    prefix = section and f"{section}."
    hints = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    typed = {}
    for key, value in values.items():
        if key not in known:
            hint = suggest(str(key), known)
            if section == "model" and key in TrainConfig.__dataclass_fields__:
                hint = f"; it is train.{key}"
            elif not hint and section:
                hint = "; `fastdiss models ARCH` lists all"
            elif not hint:
                hint = f"; there are {', '.join(known)}"
            raise OptionError(f"{prefix}{key}", f"is no option{hint}")
        typed[key] = _convert(value, hints[key], f"{prefix}{key}")
    try:
        return cls(**typed)
    except OptionError as error:
        raise OptionError(f"{prefix}{error.option}", error.reason) from None


def build_saved(cls: type[C], values: Mapping[str, Any], section: str = "") -> C:
    """Make the configuration that a checkpoint was trained with; see `build` and `option`."""
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    before = {field.name: field.metadata.get("before") for field in fields}
    then = {name: value for name, value in before.items() if value is not None}
    now = {field.metadata.get("formerly") or field.name: field.name for field in fields}
    renamed = {now.get(key, key): value for key, value in values.items()}
    return build(cls, {**then, **renamed}, section)


def read_recipe(path: Path | None) -> dict[str, dict[str, Any]]:
    """Read a recipe: a YAML mapping with the sections ``model`` and ``train``."""
    if path is None:
        return {section: {} for section in SECTIONS}
    try:
        recipe = _Recipe(path.read_text(encoding="utf-8")).get_single_data() or {}
    except OSError as error:
        raise FastdissError(f"{path}: {error.strerror}") from None
    except _NOT_YAML as error:
        reason = " ".join(str(error).split())
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
            reason = f"line {error.problem_mark.line + 1}: {error.problem}"
        raise FastdissError(f"{path} is no recipe: {reason}") from None
    if not isinstance(recipe, dict):
        raise FastdissError(f"{path}: a recipe is a mapping with the sections model and train")
    for section, values in recipe.items():
        if section not in SECTIONS:
            hint = suggest(str(section), SECTIONS)
            if not isinstance(values, dict):
                hint = "; options are under `model:` or `train:`, see `fastdiss models ARCH`"
            raise FastdissError(f"{path}: unknown section {section!r}{hint}")
        if not isinstance(values, dict):
            raise FastdissError(f"{path}: section {section!r} must be a mapping of keys to values")
    return {section: recipe.get(section, {}) for section in SECTIONS}


def parse_settings(settings: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Parse ``--set section.key=value`` items; values are YAML."""
    parsed: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for item in settings:
        name, equals, value = item.partition("=")
        section, dot, key = name.partition(".")
        if not equals or not dot or section not in SECTIONS:
            raise FastdissError(f"--set {item}: write model.KEY=VALUE or train.KEY=VALUE")
        try:
            parsed[section][key] = yaml.safe_load(value)
        except _NOT_YAML:
            raise FastdissError(f"--set {item}: cannot read the value") from None
    return parsed


def _convert(value: Any, hint: Any, name: str) -> Any:
    """Return ``value`` as the type of a configuration field."""
    if isinstance(hint, types.UnionType):  # X | None
        return None if value is None else _convert(value, typing.get_args(hint)[0], name)
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
        pass  # no machine counts as far
    elif isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    what = {float: "a number", int: "a whole number", bool: "true or false", str: "a word"}[hint]
    raise OptionError(name, f"must be {what}, not {_shown(value)}")


def _shown(value: Any) -> str:
    """Return a value for a message, cut: a few aliases of YAML can stand for a billion words."""
    if value is None:
        return "empty"
    text = reprlib.repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
