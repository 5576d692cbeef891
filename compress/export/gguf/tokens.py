"""Tokens by their ids, with their types, and how texts are cut into them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from compress.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of tokens
PHI_3 = "Phi-3"  # in the name of a model: there special tokens take the spaces after them, but for these
TAKE_NO_SPACES = {"<unk>", "<s>", "<|endoftext|>"}


@dataclass(frozen=True)
class Tokens:
    """A vocabulary.

    Attributes:
        texts: by id, as many as the model has embeddings.
        types: of each.
        numbers: text -> id.
        name: of the model, where llama.cpp goes by it; or None.
    """

    texts: list[str]
    types: list[int]
    numbers: dict[str, int]
    name: str | None = None


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
    return Tokens(texts, types, numbers, PHI_3 if _take_spaces_as_phi_3(added) else None)


def _take_spaces_as_phi_3(added: Sequence[Mapping[str, Any]]) -> bool:
    texts = {token["content"] for token in added}
    taking = {token["content"] for token in added if token.get("rstrip")}
    return texts > TAKE_NO_SPACES and "</s>" in taking and taking == texts - TAKE_NO_SPACES


def refuse_odd_tokens(data: Mapping[str, Any], tokens: Tokens, file: Path) -> None:
    """Refuse added tokens that are found in texts in another way than llama.cpp finds them.

    It looks for them as they are spelled, before text is normalized, and takes no spaces with them.
    """
    odd = ["lstrip", "single_word"]
    odd += [] if tokens.name == PHI_3 else ["rstrip"]
    odd += [] if is_passed_over(data.get("normalizer")) else ["normalized"]
    for token in data.get("added_tokens", []):
        option = next((name for name in odd if token.get(name)), None)
        if option is not None:
            raise UsageError(
                f"{file}: its added token {token['content']!r} has {option}: true, and llama.cpp looks for it as it is "
                "spelled, before text is normalized, and takes no spaces with it; set it to false, or export hf"
            )


def is_passed_over(normalizer: Mapping[str, Any] | None) -> bool:
    """Whether text may be taken as it is in the place of what a normalizer makes of it.

    NFC joins letters with their accents, as nearly every text has them already.
    """
    return normalizer is None or normalizer["type"] == "NFC" or normalizer.get("normalizers") == []


def refuse_changes(model: Mapping[str, Any], file: Path, *names: str) -> None:
    """Refuse options of a tokenizer's model that a file has no place for."""
    changed = [name for name in names if model.get(name)]
    if changed:
        raise UsageError(f"{file}: GGUF has no place for its {changed[0]}; export hf")
