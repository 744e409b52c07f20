"""The folder of a training: checkpoint_last, checkpoint_best and numbered ones."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

from fastdiss_cli import logs
from fastdiss_cli.data.files import sync
from fastdiss_cli.errors import FastdissError

LAST, BEST = "checkpoint_last.safetensors", "checkpoint_best.safetensors"
_NUMBERED = re.compile(r"checkpoint_\d+_(\d+)\.safetensors")


def best_of(path: Path) -> Path:
    """Return a checkpoint, or that of a folder: its ``checkpoint_best``, or else ``_last``.

    Raises:
        FastdissError: a folder has none.
    """
    if not path.is_dir():
        return path
    found = [path / name for name in (BEST, LAST) if (path / name).exists()]
    if not found:
        raise FastdissError(f"{path} holds no checkpoint{elsewhere(path)}")
    return found[0]


def elsewhere(folder: Path) -> str:
    """Return a hint, as the end of a message, to checkpoints in a folder and those below it."""
    here = sorted(file.name for file in folder.glob("[!.]*.safetensors"))
    if here:
        unborn = "" if BEST in here else "; the best is known after a validation"
        where = "this folder" if folder == Path() else folder
        return f"; {where} has {', '.join(here[:4])}{unborn}"
    below = sorted({str(file.parent) for file in folder.glob(f"*/{LAST}")})
    return f"; there are some in {', '.join(below)}" if below else ""


def numbered(folder: Path) -> list[Path]:
    """Return the numbered checkpoints of a folder, the newest last."""
    return sorted((p for p in folder.iterdir() if _NUMBERED.fullmatch(p.name)), key=number_of)


def number_of(path: Path) -> int:
    """Return the update in the name of a numbered checkpoint."""
    return int(_NUMBERED.fullmatch(path.name)[1])  # type: ignore[index]


def refuse_others(folder: Path) -> None:
    """Refuse to begin where another training has left checkpoints, which would be replaced.

    Raises:
        FastdissError: there are some.
    """
    found = [*folder.glob(BEST), *(numbered(folder) if folder.is_dir() else [])]
    found = [path for path in found if path.is_file()]
    if found:
        raise FastdissError(
            f"--save-dir {folder} holds {found[0].name} of another training, but no {LAST} to go "
            "on from: train into another folder, or move what is there"
        )


@contextmanager
def occupied(folder: Path) -> Iterator[None]:
    """Keep other processes from training in a folder, which is made where there is none.

    Where the file system has no locks, nobody is kept from it.

    Raises:
        FastdissError: another process is training there.
    """
    if folder.is_file():
        raise FastdissError(f"--save-dir {folder} is a file")
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise FastdissError(f"--save-dir {folder} cannot be written: see its permissions")
    path = folder / ".lock"
    with _locked(path):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            if is_new and not any(folder.iterdir()):
                folder.rmdir()


def _locked(path: Path) -> IO[str]:
    """Open and lock a file; closing it ends the lock.

    Raises:
        FastdissError: another process has locked it.
    """
    while True:
        file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.close()
                raise FastdissError(
                    f"--save-dir {path.parent}: another training is at work there: give another "
                    "folder, or wait for its end"
                ) from None
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # its holder has removed it since it was opened: nobody would see it


def prune_numbered(folder: Path, keep: int, update: int) -> None:
    """Delete all but the newest ``keep`` numbered checkpoints, and the leftovers of killed saves.

    Checkpoints of later updates than ``update``, left by a training that was set back, are kept.
    """
    for left in folder.glob(".checkpoint_*.safetensors.tmp"):
        shutil.rmtree(left, ignore_errors=True)
    found = [path for path in numbered(folder) if number_of(path) <= update]
    for path in found[: max(len(found) - keep, 0)]:
        path.unlink(missing_ok=True)


def copy_checkpoint(source: Path, target: Path) -> None:
    """Copy a checkpoint's bytes without ever leaving half a file there."""
    with replacing(target) as aside:
        shutil.copyfile(source, aside)
        sync(aside)


def link_checkpoint(source: Path, target: Path) -> None:
    """Give a checkpoint a second name, or a copy on a file system without hard links."""
    with replacing(target) as aside:
        try:
            os.link(source, aside)
        except OSError:
            shutil.copyfile(source, aside)
            sync(aside)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield where to write and sync a file that then takes the place of ``path`` at once.

    It is in a folder of its own, which the next call removes if a kill leaves it: safetensors
    writes aside too, under names that nobody could tell later.

    Raises:
        FastdissError: the disk is full or the folder cannot be written.
    """
    folder = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        yield folder / path.name
        os.replace(folder / path.name, path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise FastdissError(f"{path}: cannot write the checkpoint: {reason}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def warn_of_little_space(folder: Path, checkpoint: int) -> None:
    """Warn, before hours of training, where checkpoints of so many bytes will not fit.

    There are three at a time at least: the last, the best, and the one that takes the place of
    either.
    """
    free = shutil.disk_usage(folder).free
    if free < 3 * checkpoint:
        logs.warn(
            f"--save-dir {folder}: {free / 1e6:,.0f} MB are free, where three checkpoints of "
            f"{checkpoint / 1e6:,.0f} MB must fit"
        )
