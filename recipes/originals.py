"""Where the text comes from: the files of a corpus, found in a local copy or downloaded."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import os
import shutil
import tarfile
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from corpora import Part

from fastdiss_cli import logs
from fastdiss_cli.errors import FastdissError


class Originals:
    """The files that a corpus is made from: found in a local copy, or downloaded.

    Args:
        local: the folder with the copy, or None to download.
        store: where downloads are kept.
        scratch: where members of archives may be put.
        known: sha256 of the files that an earlier run has read, by name.
    """

    def __init__(
        self, local: Path | None, store: Path, scratch: Path, known: dict[str, str]
    ) -> None:
        self.local, self.store, self.scratch, self.known = local, store, scratch, known
        self.sha256: dict[str, str] = {}

    def files(self, part: Part) -> list[Path]:
        """Return the files of a part, checked.

        Raises:
            FastdissError: one is missing, or is not what it was or should be.
        """
        archive = _archive(part)
        if archive and part.url:
            path = self._find(archive) if self.local else self._download(part.url, archive)
            if path is not None:
                self._check(path, part.md5)
                return self._unpack(path, part.files)
        paths = []
        for name in part.files:
            if self.local:
                path = self._find(name)
            elif part.url is not None:
                path = self._download(part.url + name, name)
            else:
                raise FastdissError(f"{name} cannot be downloaded: see the recipe's README.md")
            if path is None:
                instead = f" (nor {archive})" if archive else ""
                raise FastdissError(f"{self.local}: there is no {name}{instead}")
            self._check(path, None)
            paths.append(path)
        return paths

    def have(self, parts: tuple[Part, ...]) -> bool:
        """Tell whether a local copy has all files of these parts, in archives or by themselves."""
        if self.local is None:
            return False
        return all(
            (archive and self._find(archive)) or all(self._find(name) for name in part.files)
            for part in parts
            for archive in [_archive(part)]
        )

    def _find(self, name: str) -> Path | None:
        """Return a file of the local copy, with or without ``.gz``, wherever it lies."""
        assert self.local is not None
        bare = name.removesuffix(".gz")
        for wanted in (name, bare, f"{bare}.gz"):
            found = [path for path in sorted(self.local.rglob(wanted)) if path.is_file()]
            if len(found) > 1:
                raise FastdissError(f"{wanted} is there twice: {found[0]} and {found[1]}")
            if found:
                return found[0]
        return None

    def _download(self, url: str, name: str) -> Path:
        path = self.store / name
        if not path.exists():
            logs.info(f"downloading {url} ...")
            self.store.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f"{name}.part")
            try:
                with urllib.request.urlopen(url, timeout=60) as answer, open(part, "wb") as file:
                    shutil.copyfileobj(answer, file)
                    size = answer.headers.get("Content-Length")
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", None) or error
                raise FastdissError(
                    f"{url}: {reason}; or give a local copy with --from FOLDER"
                ) from None
            if size is not None and part.stat().st_size != int(size):
                raise FastdissError(f"{url}: the connection broke off; run this again")
            os.replace(part, path)
        return path

    def _check(self, path: Path, md5: str | None) -> None:
        name = path.name
        if name in self.sha256:
            return
        if md5 is not None and digest(path, "md5") != md5:
            raise FastdissError(f"{path} is damaged, or not the official one: its md5 is not {md5}")
        self.sha256[name] = digest(path, "sha256")
        if self.known.get(name, self.sha256[name]) != self.sha256[name]:
            raise FastdissError(
                f"{path} is not the file that was read the last time (its sha256 differs); "
                "prepare it in another folder"
            )

    def _unpack(self, archive: Path, names: tuple[str, ...]) -> list[Path]:
        """Copy members of an archive into scratch files, in one pass."""
        wanted = {name: self.scratch / name for name in names}
        try:
            for name, file in _members(archive):
                if name in wanted:
                    with open(wanted[name], "wb") as copy:
                        shutil.copyfileobj(file, copy)
        except (tarfile.TarError, zipfile.BadZipFile, EOFError, gzip.BadGzipFile) as error:
            raise FastdissError(f"{archive} is damaged: {error}") from None
        for name, path in wanted.items():
            if not path.exists():
                raise FastdissError(f"{archive}: there is no {name} in it")
        return list(wanted.values())


def _archive(part: Part) -> str:
    """Return the name of the archive that holds a part's files; none: an empty string."""
    return (part.url or "").rsplit("/", 1)[-1]


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield the names, without folders, and the contents of an archive's files."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as zipped:
            for entry in zipped.infolist():
                if not entry.is_dir():
                    with zipped.open(entry) as file:
                        yield Path(entry.filename).name, file
        return
    with tarfile.open(archive, "r|*") as tar:
        for member in tar:
            content = tar.extractfile(member) if member.isfile() else None
            if content is not None:
                yield Path(member.name).name, content


def digest(path: Path, kind: str) -> str:
    """Return the checksum of a file, in hexadecimal digits."""
    checksum = hashlib.new(kind, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            checksum.update(block)
    return checksum.hexdigest()
