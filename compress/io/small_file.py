"""Small text files that somebody else may have written: read whole, in bounded memory, or refused in one sentence."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from compress.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

MOST = 64 << 20  # bytes; the longest index of the largest models has some megabytes


def read_text(file: Path, most: int = MOST) -> str:
    """The text of a file.

    Args:
        file: a regular file, in UTF-8.
        most: bytes that are read.

    Raises:
        UsageError: not there, no regular file, too large, or not UTF-8.
    """
    try:
        if file.exists() and not file.is_file():
            raise UsageError(f"{file} is a folder or a device; give a file")
        with file.open("rb") as opened:
            found = opened.read(most + 1)
        if len(found) > most:
            raise UsageError(f"{file} has more than {most:,} bytes, too many for what it should be; give another file")
        return found.decode("utf-8")
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a zero in the name
        raise UsageError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from error


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    try:
        return parse_object(read_text(file), str(file))
    except CheckpointError:
        raise
    except UsageError as error:
        raise CheckpointError(str(error)) from error


def parse_object(text: str | bytes, place: str) -> dict[str, Any]:
    """The JSON object that a text is; a name that stands twice is refused.

    Raises:
        CheckpointError: it is something else.
    """
    try:
        found = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise CheckpointError(f"{place} is not JSON: {reason}; fetch or write it again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{place} must be a JSON object such as {{...}}; fetch or write it again")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in found if names.count(name) > 1)!r} stands in it twice")
    return found
