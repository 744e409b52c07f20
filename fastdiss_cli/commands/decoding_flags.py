"""The flags of `generate` as a model's decoding options; what does not fit is wrong usage."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import typer

from fastdiss_cli.errors import FastdissError

if TYPE_CHECKING:
    from fastdiss_cli.models.registry import Seq2SeqModel


def decoding_options(model: Seq2SeqModel, arch: str, flags: dict[str, Any]) -> Any:
    """Return a model's ``Decoding`` from flags; those that are None keep its defaults.

    Args:
        model: the model.
        arch: its name, for the message.
        flags: by the name of the option.

    Raises:
        BadParameter: the model has no such option, or not with this value.
    """
    known = [field.name for field in dataclasses.fields(model.Decoding)]
    given = {key: value for key, value in flags.items() if value is not None}
    for key in given:
        if key not in known:
            there = ", ".join(_flag(name) for name in known if name in flags)
            raise typer.BadParameter(f"{_flag(key)} does not apply to {arch}, which has {there}")
    try:
        return model.Decoding(**given)
    except FastdissError as error:  # it begins with the option's name
        name, _, rest = str(error).partition(" ")
        raise typer.BadParameter(f"{_flag(name)} {rest}") from None


def _flag(option: str) -> str:
    return "--" + {"history": "print-history"}.get(option, option.replace("_", "-"))


def step_counts_of(steps: str | None) -> list[int | None]:
    """Return the step counts of ``--steps``; [None]: the model's default.

    Raises:
        BadParameter: they are no different whole numbers of at least 1.
    """
    if steps is None:
        return [None]
    counts = steps.split(",")
    if not all(count.strip().isdecimal() and int(count) >= 1 for count in counts):
        raise typer.BadParameter(f"--steps {steps}: give whole numbers of at least 1, as in 1,2,5")
    if len(set(map(int, counts))) < len(counts):
        raise typer.BadParameter(f"--steps {steps}: a step count is given twice")
    return [int(count) for count in counts]
