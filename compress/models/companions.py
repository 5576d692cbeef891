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
    "config_sentence_transformers.json", "*_Pooling/config.json", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE",
    "NOTICE.txt", "NOTICE.md", "USE_POLICY.md",
)  # fmt: skip
OF_THE_MODEL = ("generation_config.json", "preprocessor_config.json", "processor_config.json")  # of no tokenizer
CODE = "auto_map"  # names classes in files of code, which do not travel along


def companions(folder: Path, tokenizer: Path | None = None) -> list[Path]:
    """The files of a model's folder that belong to it and are copied, weights and config.json left out.

    Args:
        folder: the model's.
        tokenizer: another folder, whose tokenizer takes the place of the model's.
    """
    return [found for found, source in _matching(folder, tokenizer) if _lies_in(found, source)]


def copy_companions(source: Path, folder: Path, tokenizer: Path | None = None) -> None:
    """Copy the tokenizer's files and their like; what names code that is not copied is left out of them."""
    for found, place in _matching(source, tokenizer):
        if not _lies_in(found, place):
            LOGGER.warning("%s is a link that leads out of the model's folder; it is not copied", found)
            continue
        target = folder / found.relative_to(place)
        target.parent.mkdir(exist_ok=True)
        settings = _naming_code(found)
        if settings is None:
            copy(found, target)
        else:
            write_json(without_code(settings), target)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer that can be used by itself."""
    settings, files = (folder / name for name in ("tokenizer_config.json", "tokenizer.json"))
    return settings.is_file() and (files.is_file() or any(folder.glob("*.model")) or (folder / "vocab.json").is_file())


def _matching(source: Path, tokenizer: Path | None = None) -> list[tuple[Path, Path]]:
    """Every file, with the folder that it is of."""
    places: list[tuple[Path, tuple[str, ...]]] = [(source, COMPANIONS)]
    if tokenizer is not None and tokenizer != source:
        places = [(source, OF_THE_MODEL), (tokenizer, tuple(p for p in COMPANIONS if p not in OF_THE_MODEL))]
    return sorted({(f, place) for place, patterns in places for p in patterns for f in place.glob(p) if f.is_file()})


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
