"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
from typing import TYPE_CHECKING, Any

from compress.errors import ResourceError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def write_text(file: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    temporary = file.with_suffix(".partial")
    with writing(temporary):
        temporary.write_text(text, encoding="utf-8")
    publish(temporary, file)


def write_json(data: Mapping[str, Any], file: Path) -> None:
    """Write a configuration."""
    write_text(file, json.dumps(data, indent=2) + "\n")


def copy(source: Path, file: Path) -> None:
    """Copy the content of a file."""
    with writing(file):
        shutil.copyfile(source, file)


def publish(temporary: Path, final: Path) -> None:
    """Flush a finished file to disk and give it its name."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(final)


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
