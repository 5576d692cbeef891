"""Tokens by their ids, with their types, and how texts are cut into them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from compress.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of tokens


@dataclass(frozen=True)
class Tokens:
    """A vocabulary.

    Attributes:
        texts: by id, as many as the model has embeddings.
        types: of each.
        numbers: text -> id.
    """

    texts: list[str]
    types: list[int]
    numbers: dict[str, int]


@dataclass(frozen=True)
class Cut:
    """How a text becomes tokens.

    Attributes:
        model: what llama.cpp calls the kind.
        splits: the name of how text is cut up before merging.
        merges: in order, the two parts with a space between.
        scores: by id; pairs whose token has the highest merge first.
        space: whether a space is put before every text; None where the kind does not ask.
        special: further tokens with a meaning -> their ids.
        kinds_of_text: how many embeddings there are of the first, second, ... of several texts.
    """

    model: str
    splits: str
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    space: bool | None = None
    special: dict[str, int] = field(default_factory=dict)
    kinds_of_text: int = 0


def add_tokens(data: Mapping[str, Any], size: int, file: Path) -> Tokens:
    """The tokens of a tokenizer.json, for a model with `size` embeddings."""
    added = data.get("added_tokens", [])
    numbers = {**data["model"]["vocab"], **{token["content"]: token["id"] for token in added}}
    if numbers and max(numbers.values()) >= size:
        raise UsageError(f"{file} has tokens up to {max(numbers.values())}, and the model embeds only {size}")
    texts, types = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    for text, number in numbers.items():
        texts[number], types[number] = text, NORMAL
    for token in added:
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    return Tokens(texts, types, numbers)


def refuse_changes(model: Mapping[str, Any], file: Path, *names: str) -> None:
    """Refuse options of a tokenizer's model that a file has no place for."""
    changed = [name for name in names if model.get(name)]
    if changed:
        raise UsageError(f"{file}: GGUF has no place for its {changed[0]}; export hf")
