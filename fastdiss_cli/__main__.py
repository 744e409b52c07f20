"""The command line: all commands, and the error handling they share."""

from __future__ import annotations

import functools
import inspect
import io
import os
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any

import typer

from fastdiss_cli import __version__, logs
from fastdiss_cli.commands.fairseq_flags import rewrite_flags
from fastdiss_cli.errors import USER_MODULE, FastdissError, OptionError, describe_bug
from fastdiss_cli.signals import BROKEN_PIPE

# command -> module of fastdiss_cli.commands; the module defines a function of its own name
COMMANDS = {
    "preprocess": "preprocess",
    "train": "train",
    "generate": "generate",
    "score": "score",
    "plot": "plot",
    "export": "export",
    "card": "card",
    "models": "models",
    "average": "export",
}
UsageError: type[Exception] = typer.BadParameter.__base__  # from the click that typer uses
HELP = {"average": "Average checkpoints into one file (the same as export)."}


class Command(typer.core.TyperCommand):
    """A command that tells of flags whose earlier values are not used."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        *_, order = self.make_parser(ctx).parse_args(args=list(args))
        single = [
            option
            for option in order
            if option.param_type_name == "option" and not (option.multiple or option.is_flag)
        ]
        tells = logs.is_main_process() and not ctx.resilient_parsing  # which is completion
        for option in dict.fromkeys(single if tells else ()):
            if single.count(option) > 1:
                logs.warn(f"{option.opts[0]} is given more than once: the last one counts")
        return super().parse_args(ctx, args)


def command_line(name: str = "") -> typer.Typer:
    """Return the app with the named command only, or with all if there is no such command.

    A single command starts 0.1 s faster: the others are not imported.
    """
    app = typer.Typer(
        pretty_exceptions_enable=False,
        # in a narrow terminal rich would cut the names of flags
        rich_markup_mode="rich" if shutil.get_terminal_size().columns >= 60 else None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(options)
    for command in [name] if name in COMMANDS else COMMANDS:
        module = COMMANDS[command]
        function = getattr(import_module(f"fastdiss_cli.commands.{module}"), module)
        # typer would keep the line breaks of the source; under -OO there is no docstring
        help = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.getdoc(function) or "")
        run = _exit_on_broken_pipe(function)
        app.command(command, cls=Command, help=HELP.get(command, help))(run)
    return app


def _exit_on_broken_pipe(function: Callable[..., None]) -> Callable[..., None]:
    """Exit silently when stdout's reader is gone, as with `head`; click would exit with 1."""

    @functools.wraps(function)
    def command(*args: Any, **options: Any) -> None:
        try:
            function(*args, **options)
        except BrokenPipeError:
            raise SystemExit(BROKEN_PIPE) from None

    return command


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fastdiss {__version__}")
        raise typer.Exit


def options(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Few-step diffusion text generation: FastDiSS and the systems it is compared with."""


def _flush() -> None:
    """Flush stdout; an error says where it came from."""
    try:
        sys.stdout.flush()
    except OSError as error:
        error.filename = error.filename or "stdout"
        raise


def _drop_output() -> None:
    """Flush stdout, or discard its buffer if it cannot be written."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> None:
    """Run the command line; every expected failure is one line on stderr and exit code 1 or 2."""
    if sys.stderr is None:  # closed, e.g. for a daemon
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for name, mode, closed in (("stdin", "r", os.O_WRONLY), ("stdout", "w", os.O_RDONLY)):
        if getattr(sys, name) is None:  # using it is an error
            setattr(sys, name, open(os.open(os.devnull, closed), mode))  # noqa: SIM115
    with suppress(OSError):  # not a file
        # a pipe that another program left non-blocking would seem to end where it is empty
        os.set_blocking(sys.stdin.fileno(), True)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # text is UTF-8, whatever the locale
            # messages may quote file names that are not valid text
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    raw = getattr(sys.stdout, "buffer", None)
    if isinstance(raw, io.RawIOBase):  # PYTHONUNBUFFERED: text would be lost in partial writes
        sys.stdout = io.TextIOWrapper(
            io.BufferedWriter(raw), "utf-8", "backslashreplace", line_buffering=True
        )
    for word in sys.argv[1:]:
        if not word or re.fullmatch(r"--?[\w-]+=", word):
            which = word.removesuffix("=") or "an argument"
            logs.error(f"{which} is empty: is a shell variable unset?")
            sys.exit(2)
    try:
        try:
            words = rewrite_flags(sys.argv[1:]) or ["--help"]
            # the same name when started by `python -m`
            code = command_line(words[0])(words, prog_name="fastdiss", standalone_mode=False)
            if code == 130:  # typer has caught it already
                raise KeyboardInterrupt
        finally:
            _flush()  # report a full disk here, not at interpreter shutdown
    except (KeyboardInterrupt, typer.Abort):  # Abort is a RuntimeError
        logs.error("interrupted")
        sys.exit(130)
    except UsageError as error:
        command = " ".join(["fastdiss", *(word for word in words[:1] if word in COMMANDS)])
        message = " ".join(error.format_message().removeprefix("Invalid value: ").split())
        helps = "`fastdiss " in message or "did you mean" in message
        hint = "" if helps else f" (see `{command} --help`)"
        if logs.is_main_process():
            logs.error(message.removesuffix(".") + hint)
        sys.exit(2)
    except FastdissError as error:
        message = str(error)
        if isinstance(error, OptionError) and "." not in error.option:
            message = f"--{error.option.replace('_', '-')} {error.reason}"
        logs.error(message)
        sys.exit(1)
    except BrokenPipeError:  # from the last flush
        _drop_output()
        sys.exit(BROKEN_PIPE)
    except OSError as error:
        _drop_output()
        where = error.filename or "input/output"
        logs.error(str(FastdissError(f"{where}: {error.strerror or error}")))
        sys.exit(1)
    except Exception as error:
        from fastdiss_cli.device import out_of_memory

        if out_of_memory(error):
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            logs.error(f"out of memory: lower --max-tokens or choose a smaller model ({reason})")
        elif any(name.startswith(USER_MODULE) for name in sys.modules):
            logs.error(describe_bug(error))
        else:
            raise
        sys.exit(1)
    sys.exit(code)


if __name__ == "__main__":
    main()
