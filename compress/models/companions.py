"""What belongs to a model besides its weights and config.json: one list, fetched with it and copied with it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from compress.io.atomic import copy, write_json
from compress.logs import LOGGER

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

# Never weights, never code. A file that is not here is not looked at.
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "vocab.bpe", "encoder.json", "emoji.json", "merges.txt", "bpe.codes", "dict.txt", "*.model",
    "*.tiktoken", "tokenizer.model.v*", "tekken.json", "source.spm", "target.spm", "chat_template.jinja",
    "chat_template.json", "additional_chat_templates/*.jinja", "generation_config.json", "preprocessor_config.json",
    "processor_config.json", "video_preprocessor_config.json", "modules.json", "sentence_bert_config.json",
    "config_sentence_transformers.json", "*_Pooling/config.json",
)  # fmt: skip
CODE = "auto_map"  # names classes in files of code, which do not travel along


def companions(folder: Path) -> list[Path]:
    """The files of a model's folder that belong to it and are copied, weights and config.json left out."""
    return [found for found in _matching(folder) if _lies_in(found, folder)]


def copy_companions(source: Path, folder: Path) -> None:
    """Copy the tokenizer's files and their like; what names code that is not copied is left out of them."""
    for found in _matching(source):
        if not _lies_in(found, source):
            LOGGER.warning("%s is a link that leads out of the model's folder; it is not copied", found)
            continue
        target = folder / found.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        settings = _naming_code(found)
        if settings is None:
            copy(found, target)
        else:
            write_json(without_code(settings), target)


def _matching(source: Path) -> list[Path]:
    return sorted({found for pattern in COMPANIONS for found in source.glob(pattern) if found.is_file()})


def _lies_in(path: Path, folder: Path) -> bool:
    """Whether a file lies in a folder, links followed; the hub's cache links to the blobs beside its snapshots."""
    inside = [folder.resolve()]
    if inside[0].parent.name == "snapshots":
        inside.append(inside[0].parent.parent / "blobs")
    return any(place in path.resolve().parents for place in inside)


def without_code(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without the names of classes whose code does not travel along."""
    return {key: value for key, value in settings.items() if key != CODE}


def _naming_code(file: Path) -> dict[str, Any] | None:
    """The content of a file of settings that names code."""
    if not file.name.endswith("_config.json"):
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None  # copied as it is
    return found if isinstance(found, dict) and CODE in found else None
