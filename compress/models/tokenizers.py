"""The tokenizer of a model's folder, loaded in one place; whatever is wrong with it is one sentence."""

from __future__ import annotations

import importlib.util
import json
from typing import TYPE_CHECKING, Any

from compress.errors import DataError
from compress.lazy import transformers

if TYPE_CHECKING:
    from pathlib import Path

FILE = "tokenizer.json"
VOCABULARIES = (FILE, "*.model", "*.tiktoken", "tekken.json", "vocab.json", "vocab.txt")


def load_tokenizer(folder: Path, needed: str = "text") -> Any:
    """The tokenizer of a folder; code that comes with it is never run.

    Args:
        folder: the model's.
        needed: what is to be read with it, for the message.

    Raises:
        DataError: there is none that can be read here, and why.
    """
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        tokenizer("a text", add_special_tokens=False, verbose=False)  # some settings are first read when used
    except Exception as error:  # each class, and the libraries below, fail in their own way
        why = _reason(folder, error)
        raise DataError(f"{folder} has no tokenizer that can be used, and {needed} needs one: {why}") from error
    return tokenizer


def _reason(folder: Path, error: Exception) -> str:
    """What is wrong, and what to do."""
    there = sorted(found for pattern in VOCABULARIES for found in folder.glob(pattern))
    if not there:
        return f"it holds none of {', '.join(VOCABULARIES)}; copy the tokenizer's files into it"
    settings = _settings(folder / "tokenizer_config.json")
    if settings is None:
        return "tokenizer_config.json is cut off or damaged; fetch it again"
    if settings.get("auto_map"):
        return "its code comes with the model (auto_map in tokenizer_config.json), and such code is never run here"
    if there[0].name == FILE:
        if _settings(there[0]) is None:
            return f"{FILE} is cut off or damaged; fetch it again"
        return f"this version of the package tokenizers cannot use {FILE} ({_first_line(error)}); update it"
    if there[0].suffix == ".model" and importlib.util.find_spec("sentencepiece") is None:
        return f"{there[0].name} needs a package; pip install sentencepiece, or add the model's {FILE}"
    if there[0].suffix == ".tiktoken" and importlib.util.find_spec("tiktoken") is None:
        return f"{there[0].name} needs a package; pip install tiktoken, or add the model's {FILE}"
    return f"{there[0].name} cannot be used ({_first_line(error)}); fetch it again, or add the model's {FILE}"


def _settings(file: Path) -> dict[str, Any] | None:
    """The content of a file of JSON, nothing where there is none; None where it is damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
