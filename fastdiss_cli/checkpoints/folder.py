"""The folder of a training run: checkpoint_last, checkpoint_best and numbered checkpoints."""

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
    """Return the path of a file; for a folder, its ``checkpoint_best``, or else ``_last``.

    Raises:
        FastdissError: a folder has neither.
    """
    if not path.is_dir():
        return path
    found = [path / name for name in (BEST, LAST) if (path / name).exists()]
    if not found:
        raise FastdissError(f"{path} contains no checkpoint{elsewhere(path)}")
    return found[0]


def elsewhere(folder: Path) -> str:
    """Return the end of a message that names checkpoints in a folder or in its subfolders."""
    here = sorted(file.name for file in folder.glob("[!.]*.safetensors"))
    if here:
        unvalidated = LAST in here and BEST not in here
        no_best = "; the best is known after a validation" if unvalidated else ""
        where = "this folder" if folder == Path() else folder
        return f"; {where} has {', '.join(here[:4])}{no_best}"
    below = sorted({str(file.parent) for file in folder.glob(f"*/{LAST}")})
    return f"; there are some in {', '.join(below)}" if below else ""


def numbered(folder: Path) -> list[Path]:
    """Return the numbered checkpoints of a folder, oldest first."""
    return sorted((p for p in folder.iterdir() if _NUMBERED.fullmatch(p.name)), key=number_of)


def number_of(path: Path) -> int:
    """Return the update in the name of a numbered checkpoint."""
    return int(_NUMBERED.fullmatch(path.name)[1])  # type: ignore[index]


def refuse_others(folder: Path) -> None:
    """Refuse to start a training among the checkpoints of another one, or in a dataset.

    Raises:
        FastdissError: there are such checkpoints, or it is a dataset.
    """
    if (folder / "manifest.json").exists():
        raise FastdissError(f"--save-dir {folder} is a dataset: give a folder of its own")
    found = [*folder.glob(BEST), *(numbered(folder) if folder.is_dir() else [])]
    found = [path for path in found if path.is_file()]
    if found:
        raise FastdissError(
            f"--save-dir {folder} holds {found[0].name} of another training, but no {LAST} to "
            "resume from: train into another folder, or move its checkpoints"
        )


@contextmanager
def occupied(folder: Path) -> Iterator[None]:
    """Keep other processes from training in a folder, which is created if missing.

    A file system without locks offers no such protection.

    Raises:
        FastdissError: another process is training there.
    """
    if folder.is_file():
        raise FastdissError(f"--save-dir {folder} is a file")
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise FastdissError(f"--save-dir {folder} is not writable: check its permissions")
    path = folder / ".lock"
    with _locked(path):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            if is_new and not any(folder.iterdir()):
                folder.rmdir()


def _locked(path: Path) -> IO[str]:
    """Open and lock a file; closing it releases the lock.

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
                    f"--save-dir {path.parent}: another training is running there: choose another "
                    "folder, or wait until it ends"
                ) from None
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # removed by its last holder after we opened it: nobody else would see it


def prune_numbered(folder: Path, keep: int, update: int) -> None:
    """Delete all but the newest ``keep`` numbered checkpoints, and the leftovers of killed saves.

    Checkpoints after ``update``, left by a training that was rolled back, are kept.
    """
    for left in folder.glob(".checkpoint_*.safetensors.tmp"):
        shutil.rmtree(left, ignore_errors=True)
    found = [path for path in numbered(folder) if number_of(path) <= update]
    for path in found[: max(len(found) - keep, 0)]:
        path.unlink(missing_ok=True)


def copy_checkpoint(source: Path, target: Path) -> None:
    """Copy a checkpoint so that the target is never half written."""
    with replacing(target) as temporary:
        shutil.copyfile(source, temporary)
        sync(temporary)


def link_checkpoint(source: Path, target: Path) -> None:
    """Hard-link a checkpoint, or copy it on a file system without hard links."""
    with replacing(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
            sync(temporary)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write and sync; on exit its file atomically replaces ``path``.

    It is in a folder of its own, which the next call removes if a killed process left it behind:
    the temporary files of safetensors have names that could not be recognised later.

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
    """Warn, before hours of training, if checkpoints of that many bytes will not fit on the disk.

    At least three exist at a time: the last, the best, and the one that is about to replace either.
    """
    free = shutil.disk_usage(folder).free
    if free < 3 * checkpoint:
        logs.warn(
            f"--save-dir {folder}: {free / 1e6:,.0f} MB are free, but three checkpoints of "
            f"{checkpoint / 1e6:,.0f} MB must fit"
        )
