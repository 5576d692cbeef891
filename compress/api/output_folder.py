"""Where a result may be written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.encodings.format import WEIGHTS
from compress.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

APPLIED = "delta.json"  # says what a base and a delta were put together from
OURS = (WEIGHTS, "report.json", APPLIED)


def refuse_destination(destination: Path, source: Path, overwrite: bool) -> None:
    """Refuse what could not be written at the end, or would destroy something.

    Raises:
        UsageError: says which.
    """
    source, target = source.resolve(), destination.resolve()
    if target == source or target in source.parents or source in target.parents:
        raise UsageError(f"{destination} is, holds or lies in the model {source}; write somewhere else")
    if destination.exists() and not destination.is_dir():
        raise UsageError(f"{destination} is a file; -o names a folder to write")
    ancestor = next(p for p in destination.parents if p.exists())
    if not ancestor.is_dir():
        raise UsageError(f"{ancestor} is a file; {destination} cannot be made in it")
    ours = any((destination / name).exists() for name in OURS)
    if overwrite and destination.is_dir() and not ours and any(destination.iterdir()):
        raise UsageError(f"{destination} holds files that no run wrote; --overwrite only replaces results")
