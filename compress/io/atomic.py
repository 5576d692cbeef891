"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from compress.errors import ResourceError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def write_text(file: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    temporary = file.with_suffix(".partial")
    with writing(temporary):
        temporary.write_text(text)
    publish(temporary, file)


def write_json(data: Mapping[str, Any], file: Path) -> None:
    """Write a configuration."""
    with writing(file):
        file.write_text(json.dumps(data, indent=2) + "\n")


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
        no_space = isinstance(error, OSError) and error.errno in (28, 122)  # ENOSPC, EDQUOT
        if no_space or (isinstance(error, SafetensorError) and "os error 28" in str(error).lower()):
            raise ResourceError(
                f"no space left on the disk of {self.path.parent}; what is finished is kept: make room, run the same "
                "command again"
            ) from error
