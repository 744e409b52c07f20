"""fastdiss train: binarized dataset -> checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import typer

from fastdiss_cli import logs
from fastdiss_cli.commands.options import (
    Device,
    SourceLang,
    TargetLang,
    UserModule,
    complete_architecture,
    completed,
)
from fastdiss_cli.config import (
    DTYPES,
    LR_SCHEDULERS,
    TrainConfig,
    build,
    idle,
    parse_settings,
    read_recipe,
)
from fastdiss_cli.errors import FastdissError, OptionError

TRAIN_FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}
OPTIMISATION = {"rich_help_panel": "Optimisation (a recipe changes the defaults)"}
VALIDATION = {"rich_help_panel": "Validation and checkpoints"}
MACHINE = {"rich_help_panel": "Machine"}


def flag(
    name: str, panel: Mapping[str, str] = MappingProxyType({}), words: Sequence[str] = ()
) -> Any:
    """Return the flag for an option of `TrainConfig`, with its meaning and default as help.

    Args:
        name: the name of the option.
        panel: the panel of the help.
        words: values for shell completion.
    """
    field = TRAIN_FIELDS[name]
    meaning = field.metadata["meaning"]
    return typer.Option(
        help=f"{meaning[0].upper()}{meaning[1:]}. (default: {field.default})",
        autocompletion=lambda incomplete: completed(words, incomplete),
        **panel,
    )


def train(
    data: Annotated[
        Path,
        typer.Argument(help="The folder that `fastdiss preprocess` wrote, or fairseq's data-bin."),
    ],
    save_dir: Annotated[Path, typer.Option(help="Where checkpoints and metrics.jsonl go.")] = Path(
        "checkpoints"
    ),
    arch: Annotated[
        str | None,
        typer.Option(
            help=f"See `fastdiss models`. (default: {TRAIN_FIELDS['arch'].default})",
            autocompletion=complete_architecture,
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE.yaml", help="A recipe; flags override it.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="SECTION.KEY=VALUE",
            help="Any option that `fastdiss models ARCH` prints, as in model.noise_factor=4; "
            "overrides all. Repeatable.",
        ),
    ] = None,
    finetune_from_model: Annotated[
        Path | None,
        typer.Option(
            metavar="CHECKPOINT|DIR",
            help="Start from its weights. Ignored when resuming.",
        ),
    ] = None,
    source_lang: SourceLang = None,
    target_lang: TargetLang = None,
    user_module: UserModule = None,
    seed: Annotated[int | None, flag("seed")] = None,
    max_tokens: Annotated[int | None, flag("max_tokens", OPTIMISATION)] = None,
    update_freq: Annotated[int | None, flag("update_freq", OPTIMISATION)] = None,
    max_update: Annotated[int | None, flag("max_update", OPTIMISATION)] = None,
    max_epoch: Annotated[int | None, flag("max_epoch", OPTIMISATION)] = None,
    lr: Annotated[float | None, flag("lr", OPTIMISATION)] = None,
    lr_scheduler: Annotated[str | None, flag("lr_scheduler", OPTIMISATION, LR_SCHEDULERS)] = None,
    warmup_updates: Annotated[int | None, flag("warmup_updates", OPTIMISATION)] = None,
    clip_norm: Annotated[float | None, flag("clip_norm", OPTIMISATION)] = None,
    weight_decay: Annotated[float | None, flag("weight_decay", OPTIMISATION)] = None,
    dropout: Annotated[
        float | None,
        typer.Option(help="Dropout rate. (default: that of the architecture)", **OPTIMISATION),
    ] = None,
    label_smoothing: Annotated[
        float | None,
        typer.Option(
            help="Of the cross-entropy. (default: that of the architecture)", **OPTIMISATION
        ),
    ] = None,
    ema_decay: Annotated[float | None, flag("ema_decay", OPTIMISATION)] = None,
    validate_interval_updates: Annotated[
        int | None, flag("validate_interval_updates", VALIDATION)
    ] = None,
    valid_steps: Annotated[int | None, flag("valid_steps", VALIDATION)] = None,
    patience: Annotated[int | None, flag("patience", VALIDATION)] = None,
    save_interval_updates: Annotated[int | None, flag("save_interval_updates", VALIDATION)] = None,
    keep_last: Annotated[int | None, flag("keep_last", VALIDATION)] = None,
    accept_changes: Annotated[
        bool,
        typer.Option(
            "--accept-changes",
            help="Resume even if data or options have changed.",
            **VALIDATION,
        ),
    ] = False,
    device: Device = "auto",
    dtype: Annotated[str | None, flag("dtype", MACHINE, DTYPES)] = None,
    compile: Annotated[
        bool | None, typer.Option("--compile", help="Use torch.compile.", **MACHINE)
    ] = None,
) -> None:
    """Train a model; a second call resumes where the first one stopped.

    Defaults < --config < flags < --set. The same line under torchrun uses all its processes.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    flags = {
        "train": {name: value for name, value in given.items() if name in TRAIN_FIELDS},
        "model": {name: given[name] for name in ("dropout", "label_smoothing") if name in given},
    }

    from fastdiss_cli.checkpoints.folder import BEST, LAST, occupied
    from fastdiss_cli.data.opening import open_dataset
    from fastdiss_cli.device import dtype_name, keep_freed_memory, pick_device
    from fastdiss_cli.distributed import Processes
    from fastdiss_cli.models.registry import architecture
    from fastdiss_cli.training.loop import Training

    keep_freed_memory()
    recipe = read_recipe(config)
    try:
        settings = parse_settings(set_ or [])
    except FastdissError as error:
        raise typer.BadParameter(str(error)) from None
    options = {s: {**recipe[s], **flags[s], **settings[s]} for s in ("model", "train")}
    try:
        train_config = build(TrainConfig, options["train"], "train")
        chosen = architecture(train_config.arch, user_module)
        model_config = chosen.config(options["model"])
    except OptionError as error:
        raise _as_given(error, config, recipe, flags, settings) from None
    with Processes(pick_device(device)) as processes, ExitStack() as held:
        if processes.rank == 0:
            held.enter_context(occupied(save_dir))
        dataset = open_dataset(data, source_lang, target_lang, verify=processes.rank == 0)
        training = Training(
            chosen,
            model_config,
            train_config,
            dataset,
            save_dir,
            processes,
            accept_changes,
            finetune_from_model,
        )
        sentences = len(dataset["train"]["src"])
        logs.info(
            f"{chosen.name}: {training.model.num_parameters():,} parameters, "
            f"{logs.counted(sentences, 'training pair')}, "
            f"{processes.world_size} x {processes.device.type}, "
            f"{dtype_name(training.dtype)}"
        )
        end, finished = training.expected_end(), training.finished()
        if train_config.warmup_updates >= end and not finished:
            logs.warn(
                f"the learning rate rises until update {train_config.warmup_updates:,}, but "
                f"training ends at {end:,}: lower --warmup-updates"
            )
        for section, used, defaults in (
            ("model", model_config, chosen.config({})),
            ("train", train_config, TrainConfig()),
        ):
            for key, other in idle(used).items():
                if getattr(used, key) != getattr(defaults, key):
                    now = f"{section}.{other} is {getattr(used, other)}"
                    logs.warn(f"{section}.{key} has no effect while {now}")
        own = flags["train"] | settings["train"]
        if "valid_steps" in own and "steps" not in training.model.decoding_options():
            logs.warn(f"train.valid_steps has no effect: {chosen.name} decodes without steps")
        plan = _plan(train_config, "valid" in dataset.splits)
        if finished:
            plan = f"after update {training.progress.update:,} nothing is left to do: {plan}"
        logs.info(f"{plan}; checkpoints and metrics.jsonl go to {save_dir}")
        if processes.device.type == "cpu" and "arch" not in options["train"]:
            logs.info(
                f"{chosen.name} is meant for a GPU: on a CPU, an --arch that ends in _tiny and "
                "--max-tokens 2000 give results sooner"
            )
        stopped_by = training.run()
        progress = training.progress
        if stopped_by:
            if training.state.saved == progress.update:
                what = "saved: run the same command to resume"
            else:
                what = f"its loss was not finite, and {training.state.last_saved(save_dir)}"
            logs.info(f"stopped by signal {stopped_by} after update {progress.update:,}; {what}")
    if stopped_by:
        raise SystemExit(128 + stopped_by)
    best, file = "", save_dir / LAST
    if progress.best_figure:
        measure, value = progress.best_figure
        measure = measure.replace("bleu", "BLEU")
        best = f"; best validation {measure} {value:.2f} at {progress.best_update:,}"
        file = save_dir / BEST
    ended = f"done after update {progress.update:,}"
    if 0 < train_config.patience <= progress.bad_validations:
        ended += f" ({logs.counted(progress.bad_validations, 'validation')} without a new best)"
    logs.info(f"{ended}{best}; the model is {file}")


def _as_given(
    error: OptionError,
    path: Path | None,
    recipe: dict[str, dict[str, Any]],
    flags: dict[str, dict[str, Any]],
    settings: dict[str, dict[str, Any]],
) -> Exception:
    """Report where an invalid option was given; on the command line it is a usage error."""
    section, _, key = error.option.partition(".")
    if section == "train" and key not in TRAIN_FIELDS:
        from fastdiss_cli.models.registry import architectures

        if any(key in arch.family.Config.__dataclass_fields__ for arch in architectures().values()):
            error = OptionError(error.option, f"is not an option; use model.{key}")
    if key in settings[section]:
        return typer.BadParameter(f"--set {error}")
    if key in flags[section]:
        return typer.BadParameter(f"--{key.replace('_', '-')} {error.reason}")
    return FastdissError(f"{path}: {error}") if key in recipe[section] else error


def _plan(config: TrainConfig, validates: bool) -> str:
    """Describe when training validates and when it ends."""
    limits = [logs.counted(config.max_update, "update")]
    if config.max_epoch:
        limits.append(logs.counted(config.max_epoch, "epoch"))
    if config.patience and validates:
        limits.append(f"{logs.counted(config.patience, 'validation')} without a new best")
    interval = config.validate_interval_updates
    every = f"every {logs.counted(interval, 'update')}" if interval else "after every epoch"
    return f"until {' or '.join(limits)}; " + (
        f"validation {every}" if validates else "the dataset has no split to validate on"
    )
