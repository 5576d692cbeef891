"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
from typing import TYPE_CHECKING, Any

from compress.errors import ResourceError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path


def write_text(file: Path, text: str) -> None:
    """Write a small file whole or not at all; halves of letters, which UTF-8 has no bytes for, are spelled out."""
    temporary = file.with_suffix(".partial")
    with writing(temporary):
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    publish(temporary, file)


def write_json(data: Mapping[str, Any], file: Path) -> None:
    """Write a configuration."""
    write_text(file, json.dumps(data, indent=2) + "\n")


def copy(source: Path, file: Path) -> None:
    """Copy the content of a file."""
    with writing(file):
        shutil.copyfile(source, file)


def link(source: Path, file: Path) -> None:
    """Give a file that is never changed another name, in the place of what bore it; a copy where there are no links."""
    if file.is_file() and file.samefile(source):
        return  # a file system may rename no link of a file to another one
    temporary = file.with_suffix(".partial")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        copy(source, temporary)
    publish(temporary, file)


def write_pieces(file: Path, pieces: Iterable[memoryview]) -> None:
    """Write a file of no importance, that something is copied to, a piece at a time."""
    with writing(file), file.open("wb") as opened:
        for piece in pieces:
            opened.write(piece)


def publish(temporary: Path, final: Path) -> None:
    """Flush a finished file to disk and give it its name."""
    _flush(temporary)
    temporary.replace(final)


def flush_folder(folder: Path) -> None:
    """Flush every file and folder in a folder, and the folder itself, to disk."""
    for place, _, files in os.walk(folder):
        for name in files:
            _flush(os.path.join(place, name))
        flush_names(place)


def flush_names(folder: Path | str) -> None:
    """Flush which names a folder holds: what was renamed in it is still so after a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush(file: Path | str) -> None:
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())


def remove_made(folder: Path) -> None:
    """Remove a folder that this program made, file by file; a link in it goes, and what it points to stays."""
    for place, folders, files in os.walk(folder, topdown=False):
        for name in files:
            os.unlink(os.path.join(place, name))
        for name in folders:
            path = os.path.join(place, name)
            os.unlink(path) if os.path.islink(path) else os.rmdir(path)
    if folder.is_dir():
        folder.rmdir()


class writing:
    """Turns a full disk into an error that says so; the unfinished file is removed."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is None:
            return
        self.path.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"no space left on the disk of {self.path.parent}; what is finished is kept: make room, run the same "
                "command again"
            ) from error
