"""What travels along with a model besides its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.io.atomic import copy
from compress.logs import LOGGER

if TYPE_CHECKING:
    from pathlib import Path

# What travels along from the source folder: never weights, never code.
COMPANIONS = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "added_tokens.json", "*.model",
              "generation_config.json", "chat_template*", "preprocessor_config.json")  # fmt: skip


def copy_companions(source: Path, folder: Path) -> None:
    """Copy the tokenizer's files and their like."""
    for path in _matching(source):
        if _lies_in(path, source):
            copy(path, folder / path.name)
        else:
            LOGGER.warning("%s is a link that leads out of the model's folder; it is not copied", path)


def companions(source: Path) -> list[Path]:
    """The files that `copy_companions` copies."""
    return [path for path in _matching(source) if _lies_in(path, source)]


def _matching(source: Path) -> list[Path]:
    return sorted({p for pattern in COMPANIONS for p in source.glob(pattern) if p.is_file()})


def _lies_in(path: Path, folder: Path) -> bool:
    """Whether a file lies in a folder, links followed; the hub's cache links to the blobs beside its snapshots."""
    inside = [folder.resolve()]
    if inside[0].parent.name == "snapshots":
        inside.append(inside[0].parent.parent / "blobs")
    return any(place in path.resolve().parents for place in inside)
