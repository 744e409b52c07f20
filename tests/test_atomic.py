"""Files are complete or absent: kills, full disks and read-only folders at any moment.

A forked child, in which torch is already imported, does the writing. An audit hook in the child
sees every file system call that Python makes below a folder, and kills the child or fails the call
at one of them: the first in one child, the second in the next, and so on until a child gets
through. Kills at random moments land in between, inside library calls.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import one_line_error, run_cli, write_pairs

from fastdiss_cli.checkpoints.checkpoint import Checkpoint, Progress
from fastdiss_cli.checkpoints.folder import copy_checkpoint, prune_numbered
from fastdiss_cli.data import encoding
from fastdiss_cli.data.binarized import BinarizedDataset
from fastdiss_cli.data.dataset import TokenWriter
from fastdiss_cli.data.sentencepiece import train_tokenizer
from fastdiss_cli.errors import FastdissError

DONE, REFUSED, BUG = 0, 1, 3
CALLS = {"open", "os.rename", "os.link", "os.mkdir", "os.chmod", "os.fsync"}
CLEANING = {"os.remove", "os.rmdir", "os.scandir", "shutil.rmtree"}
WRITING = os.O_WRONLY | os.O_RDWR
KILLS = 120  # kills of the writer of checkpoints, at random moments
ERRORS = [errno.ENOSPC, errno.EROFS]
OnCall = Callable[[int, str], None]


def child(act: Callable[[], object], output: Path | None = None) -> int:
    """Fork a process that calls ``act``, and return its pid.

    It exits with `DONE`, or with `REFUSED` if a FastdissError was raised; the error or the return
    value is written to ``output``.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside sleeping threads
        number = os.fork()
    if number:
        return number
    code = BUG
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # when the tests are killed
        text, code = str(act() or ""), DONE
    except FastdissError as error:
        text, code = str(error), REFUSED
    except BaseException:
        text = traceback.format_exc()
    finally:
        if output is not None:
            output.write_text(text)
        os._exit(code)


def ending(number: int) -> int:
    """Wait for a child; return its exit code, or the signal that ended it as a negative number."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def on_calls(folder: Path, calls: set[str], act: OnCall) -> None:
    """Call ``act`` with a number and a name before every file system call below a folder.

    The hook lasts as long as the process: for children only.
    """
    numbers = itertools.count()
    fsync = os.fsync

    def audited(handle: int) -> None:
        sys.audit("os.fsync", os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    def hook(event: str, args: tuple) -> None:
        to_read = event == "open" and not args[2] & WRITING
        if event in calls and not to_read and isinstance(args[0], (str, os.PathLike)):
            path = os.path.abspath(os.fspath(args[0]))
            if path.startswith(str(folder)):
                act(next(numbers), f"{event} {path}")

    os.fsync = audited
    sys.addaudithook(hook)


def killed_at(number: int, folder: Path, act: Callable[[], object]) -> Callable[[], object]:
    """Return ``act`` with a SIGKILL before one of its file system calls."""

    def kill(i: int, _: str) -> None:
        if i == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def run() -> object:
        on_calls(folder, CALLS | CLEANING, kill)
        return act()

    return run


def failing_at(
    number: int, code: int, folder: Path, act: Callable[[], object]
) -> Callable[[], object]:
    """Return ``act`` with one of its calls failing; its return value names that call, if any."""
    failed = []

    def fail(i: int, call: str) -> None:
        if i == number:
            failed.append(call)
            raise OSError(code, os.strerror(code))

    def run() -> object:
        on_calls(folder, CALLS, fail)
        outcome = act()
        return outcome or "".join(failed)

    return run


def checkpoint(version: int, size: int = 1000) -> Checkpoint:
    """Make a checkpoint that holds its version in every part."""
    tensors = {f"model.{name}": torch.full((size,), float(version)) for name in "ab"}
    return Checkpoint(
        "none", {}, {"seed": version}, Progress(update=version), f"{version}", 1, tensors
    )


def version_of(path: Path) -> int:
    """Load a checkpoint and return its version, which all its parts must agree on."""
    found = Checkpoint.load(path)
    version = found.progress.update
    assert found.train_config == {"seed": version} and found.dataset_hash == str(version)
    assert all((tensor == version).all() for tensor in found.tensors.values())
    return version


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


BOTH = ["checkpoint_best.safetensors", "checkpoint_last.safetensors"]


def save_both(folder: Path, version: int, size: int = 1000) -> None:
    """Save as a training does after a new best validation."""
    best, last = (folder / name for name in BOTH)
    checkpoint(version, size).save(last)
    copy_checkpoint(last, best)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Return a folder with a best and a last checkpoint of version 0."""
    folder = tmp_path / "saved"
    save_both(folder, 0)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("links", [True, False], ids=["links", "no-links"])
def test_a_kill_at_any_moment_leaves_whole_checkpoints(tmp_path: Path, links: bool) -> None:
    """Checkpoints have four megabytes, so that most of the time is spent in writes."""
    draw = random.Random(1)
    size, inside = 500_000, 0
    save_both(tmp_path, 0, size)
    versions = dict.fromkeys(BOTH, 0)

    def write() -> None:
        if not links:
            os.link = refuse
        for version in itertools.count(max(versions.values()) + 1):
            save_both(tmp_path, version, size)

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    for _ in range(KILLS // 2):
        writer = child(write)
        time.sleep(draw.uniform(0, 0.1))
        os.kill(writer, signal.SIGKILL)
        assert ending(writer) == -signal.SIGKILL
        inside += names(tmp_path) != BOTH
        for name, before in versions.items():  # one that was written, not an earlier one
            versions[name] = version_of(tmp_path / name)
            assert versions[name] >= before
        assert versions[BOTH[0]] <= versions[BOTH[1]]  # the best one was the last one earlier
    assert inside  # some kills interrupted a write
    print(f"{inside} of {KILLS // 2} kills inside a write, {versions[BOTH[1]]} versions")
    save_both(tmp_path, 10**6)
    assert names(tmp_path) == BOTH  # and the next save removes their leftovers


def test_a_kill_before_every_call_leaves_whole_checkpoints(saved: Path) -> None:
    for number in itertools.count():
        code = ending(child(killed_at(number, saved, partial(save_both, saved, number + 1))))
        best, last = (version_of(saved / name) for name in BOTH)
        assert best <= last and {best, last} <= {number, number + 1}
        if code == DONE:
            break
        assert code == -signal.SIGKILL
        save_both(saved, number + 1)
        assert names(saved) == BOTH
    assert number > 15


@pytest.mark.parametrize("code", ERRORS, ids=errno.errorcode.get)
def test_a_failure_of_any_call_leaves_the_older_checkpoints(saved: Path, code: int) -> None:
    message = saved.parent / "message"
    for number in itertools.count():
        before = [version_of(saved / name) for name in BOTH]
        act = failing_at(number, code, saved, partial(save_both, saved, number + 1))
        ended = ending(child(act, message))
        assert names(saved) == BOTH
        after = [version_of(saved / name) for name in BOTH]
        if ended == DONE:
            assert after == [number + 1] * 2
            if not message.read_text():
                break
        else:
            assert ended == REFUSED, message.read_text()
            assert f"cannot write the checkpoint: {os.strerror(code)}" in message.read_text()
            assert "\n" not in message.read_text()
            # what failed may be the sync of the folder, after the file took its place
            assert set(after) <= {*before, number + 1}
    assert number > 10


def test_prune_removes_what_kills_left(saved: Path) -> None:
    left = saved / ".checkpoint_1_7.safetensors.tmp"
    left.mkdir()
    (left / ".tmpX1Y2").write_bytes(b"half a file")
    prune_numbered(saved, keep=1, update=99)
    assert names(saved) == BOTH


def test_a_checkpoint_is_readable_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        checkpoint(1).save(tmp_path / "c.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "c.safetensors").stat().st_mode & 0o777 == 0o640


def limited(act: Callable[[], object], size: int) -> Callable[[], object]:
    """Return ``act`` on a disk that takes at most that many bytes per file."""

    def run() -> object:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        return act()

    return run


def read_only(act: Callable[[], object], folder: Path) -> Callable[[], object]:
    """Return ``act`` in a working folder that it cannot write to, even as root."""

    def run() -> object:
        os.chdir(folder)
        folder.chmod(0o555)
        if os.geteuid() == 0:
            os.seteuid(65534)
        return act()

    return run


@pytest.mark.parametrize("size", [0, 100, 5_000])
def test_a_full_disk_leaves_the_older_checkpoint(saved: Path, size: int) -> None:
    message = saved.parent / "message"
    message.touch()
    last = saved / BOTH[1]
    code = ending(child(limited(lambda: refusal(lambda: checkpoint(1).save(last)), size)))
    assert code == DONE
    assert version_of(last) == 0 and names(saved) == BOTH


def refusal(act: Callable[[], object]) -> str:
    """Return the error message of ``act``."""
    with pytest.raises(FastdissError) as caught:
        act()
    message = str(caught.value)
    assert "cannot write the checkpoint: " in message and "\n" not in message
    return message


def test_a_read_only_folder_keeps_the_older_checkpoints(saved: Path) -> None:
    best, last = map(Path, BOTH)

    def write() -> None:
        for act in (lambda: checkpoint(1).save(last), lambda: copy_checkpoint(last, best)):
            assert "Permission denied" in refusal(act)

    (saved / BOTH[0]).unlink()  # a copy of a file to itself would be no write
    output = saved.parent / "output"
    assert ending(child(read_only(write, saved), None)) == DONE, output
    saved.chmod(0o755)
    assert names(saved) == BOTH[1:] and version_of(saved / BOTH[1]) == 0


def events(folder: Path, act: Callable[[], object]) -> Iterator[tuple[str, str]]:
    """Return the file system calls of ``act`` below a folder, as (call, path)."""
    seen: list[str] = []

    def run() -> str:
        on_calls(folder, {"os.rename", "os.link", "os.fsync"}, lambda _, call: seen.append(call))
        act()
        return json.dumps(seen)

    output = folder.parent / "output"
    assert ending(child(run, output)) == DONE, output.read_text()
    for call in json.loads(output.read_text()):
        yield tuple(call.split(" ", 1))


@pytest.mark.parametrize("links", [True, False], ids=["links", "no-links"])
def test_a_checkpoint_is_synced_before_it_takes_its_name(saved: Path, links: bool) -> None:
    def save() -> None:
        if not links:
            os.link = lambda *_: os.open("/dev/null/none", os.O_RDONLY)
        save_both(saved, 1)

    synced, renamed = set(), 0
    for call, path in events(saved, save):
        if call == "os.fsync":
            synced.add(path)
        elif call == "os.link":  # of a file that is on the disk
            synced.add(str(Path(path).with_name(f".{BOTH[0]}.tmp") / BOTH[0]))
        elif ".tmp/.tmp" not in path:
            assert path in synced
            synced.discard(str(saved))
            renamed += 1
    assert renamed == 2 and str(saved) in synced


# datasets


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[str | Path, ...]:
    """Return the flags of a preprocess that takes a tenth of a second."""
    folder = tmp_path_factory.mktemp("text")
    for split, count in (("train", 1000), ("test", 10)):
        write_pairs(folder / split, count, seed=split)
    (folder / "spm").write_bytes(train_tokenizer(["eins two"], "char", 300).model)
    flags = ("--trainpref", folder / "train", "--testpref", folder / "test", "--workers", "1")
    return ("preprocess", "-s", "de", "-t", "en", *flags, "--tokenizer", folder / "spm")


def make(text: tuple[str | Path, ...], destdir: Path) -> str:
    """Run ``preprocess`` to the end, or raise its error line."""
    done = run_cli(*text, "--destdir", destdir)
    if done.returncode == 1:
        *before, line = done.stderr.splitlines()
        assert line.startswith("fastdiss: error: ")
        assert not [other for other in before if "rror" in other]
        raise FastdissError(line)
    assert done.returncode == 0, done.stderr
    return ""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def none_or_whole(folder: Path) -> bool:
    """Return whether there is a dataset, which must then be complete."""
    if not folder.exists():
        return False
    BinarizedDataset(folder, verify=True)
    return True


@pytest.mark.parametrize("older", [False, True], ids=["fresh", "replaced"])
def test_a_kill_before_every_call_leaves_no_half_dataset(
    tmp_path: Path, text: tuple[str | Path, ...], older: bool
) -> None:
    folder = tmp_path / "d"
    found = 0
    make(text, folder)
    whole = contents(folder)
    for number in itertools.count():
        if not older:
            shutil.rmtree(folder, ignore_errors=True)
        code = ending(child(killed_at(number, tmp_path, lambda: make(text, folder))))
        found += none_or_whole(folder)
        if code == DONE:
            break
        assert code == -signal.SIGKILL
        for left in (*tmp_path.glob(".d.tmp-*"), *tmp_path.glob("d.old-*")):
            if not folder.exists() and left.name.startswith("d."):
                assert none_or_whole(left)  # between two renames the older one has another name
            shutil.rmtree(left)
        if older and not folder.exists():
            make(text, folder)
    assert number > 20
    assert contents(folder) == whole  # a rerun succeeds
    # there is always an older dataset but between two renames; a new one only at the very end
    assert found >= number - 3 if older else found < number // 2


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_no_half_dataset(
    tmp_path: Path, text: tuple[str | Path, ...]
) -> None:
    draw = random.Random(2)
    folder = tmp_path / "d"
    make(text, tmp_path / "whole")
    for _ in range(30):
        writer = child(lambda: make(text, folder))
        time.sleep(draw.uniform(0, 0.2))
        os.kill(writer, signal.SIGKILL)
        assert ending(writer) in (DONE, -signal.SIGKILL)
        none_or_whole(folder)
    make(text, folder)
    assert contents(folder) == contents(tmp_path / "whole")


@pytest.mark.parametrize("code", ERRORS, ids=errno.errorcode.get)
def test_a_failure_of_any_call_leaves_the_older_dataset(
    tmp_path: Path, text: tuple[str | Path, ...], code: int
) -> None:
    folder, message = tmp_path / "inner" / "d", tmp_path / "output"
    make(text, folder)
    whole = contents(folder)
    for number in itertools.count():
        act = failing_at(number, code, folder.parent, lambda: make(text, folder))
        ended = ending(child(act, message))
        assert contents(folder) == whole
        if ended == DONE and not message.read_text():
            break
        assert ended in (DONE, REFUSED), message.read_text()
        assert names(folder.parent) == ["d"]
        assert ended == DONE or f"d: cannot write the dataset: {os.strerror(code)}" in (
            message.read_text()
        )
    assert number > 20


@pytest.mark.parametrize("size", [0, 1_000, 50_000])
def test_a_full_disk_leaves_the_older_dataset(
    tmp_path: Path, text: tuple[str | Path, ...], size: int
) -> None:
    folder, message = tmp_path / "inner" / "d", tmp_path / "output"
    make(text, folder)
    whole = contents(folder)

    def write() -> None:
        with pytest.raises(FastdissError, match=f"{folder}: cannot write the dataset: File too l"):
            make(text, folder)

    assert ending(child(limited(write, size))) == DONE, message
    assert contents(folder) == whole and names(folder.parent) == ["d"]


def test_a_read_only_folder_keeps_the_older_dataset(
    tmp_path: Path, text: tuple[str | Path, ...]
) -> None:
    folder, inner = tmp_path / "inner" / "d", tmp_path / "inner"
    make(text, folder)
    whole = contents(folder)

    def write() -> None:
        with pytest.raises(FastdissError, match="Permission denied"):
            make(text, Path("d"))

    assert ending(child(read_only(write, inner))) == DONE
    inner.chmod(0o755)
    assert contents(folder) == whole and names(inner) == ["d"]


def test_a_dataset_is_synced_before_it_takes_its_name(
    tmp_path: Path, text: tuple[str | Path, ...]
) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    seen = list(events(inner, lambda: make(text, inner / "d")))
    (aside,) = (path for call, path in seen if call == "os.rename")
    end = seen.index(("os.rename", aside))
    synced = {path for _, path in seen[:end]}
    assert synced == {aside, *(f"{aside}/{name}" for name in names(inner / "d"))}
    assert seen[end + 1 :] == [("os.fsync", str(inner))]


def test_what_a_killed_run_left_is_named(tmp_path: Path, text: tuple[str | Path, ...]) -> None:
    (tmp_path / ".d.tmp-1").mkdir()
    assert ".d.tmp-1: remove it" in run_cli(*text, "--destdir", tmp_path / "d").stderr
    own = tmp_path / f".d.tmp-{os.getpid()}"  # of another machine that shares the disk
    own.mkdir()
    (own / "train.src.bin").write_bytes(b"of another run")
    one_line_error(run_cli(*text, "--destdir", tmp_path / "d"), "File exists")
    assert (own / "train.src.bin").read_bytes() == b"of another run"


def children(parent: int) -> list[int]:
    listed = Path(f"/proc/{parent}/task/{parent}/children")
    return [int(number) for number in listed.read_text().split()]


def is_alive(number: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{number}/stat").read_text()
    except OSError:
        return False


def test_workers_end_when_the_main_process_is_killed(
    tmp_path: Path, text: tuple[str | Path, ...]
) -> None:
    write_pairs(tmp_path / "big", 30_000)
    flags = [*text[:5], "--trainpref", tmp_path / "big", "--workers", "2", *text[-2:]]
    command = [sys.executable, "-m", "fastdiss_cli", *map(str, flags)]
    process = subprocess.Popen([*command, "--destdir", str(tmp_path / "d")])
    while len(workers := children(process.pid)) < 3 and process.poll() is None:
        time.sleep(0.01)  # two workers, and the resource tracker of multiprocessing
    process.kill()
    process.wait()
    assert len(workers) == 3 and not (tmp_path / "d").exists()
    for _ in range(600):
        if not any(map(is_alive, workers)):
            break
        time.sleep(0.1)
    assert not any(map(is_alive, workers))


def test_a_killed_worker_is_one_line(
    tmp_path: Path, text: tuple[str | Path, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "CHUNK", 32)
    add = TokenWriter.add

    def kill_workers_and_add(writer: TokenWriter, *args: object) -> None:
        for number in children(os.getpid()):
            with suppress(OSError):  # it may have ended meanwhile
                if b"spawn_main" in Path(f"/proc/{number}/cmdline").read_bytes():
                    os.kill(number, signal.SIGKILL)
        add(writer, *args)

    monkeypatch.setattr(TokenWriter, "add", kill_workers_and_add)
    with pytest.raises(FastdissError, match=r"worker process was killed.*fewer --workers"):
        make((*text[:-4], "--workers", "2", *text[-2:]), tmp_path / "d")
    assert names(tmp_path) == []
