"""What travels along with a model besides its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.io.atomic import copy

if TYPE_CHECKING:
    from pathlib import Path

# What travels along from the source folder: never weights, never code.
COMPANIONS = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "added_tokens.json", "*.model",
              "generation_config.json", "chat_template*", "preprocessor_config.json")  # fmt: skip


def companions(source: Path) -> list[Path]:
    """The tokenizer's files of a model's folder and their like."""
    return sorted({p for pattern in COMPANIONS for p in source.glob(pattern) if p.is_file()})


def copy_companions(source: Path, folder: Path) -> None:
    """Copy the tokenizer's files and their like."""
    for found in companions(source):
        copy(found, folder / found.name)
