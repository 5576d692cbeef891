"""Where a model is from and under what terms, which what is made of it must say as well."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from compress.errors import UsageError
from compress.io.manifest import CARD
from compress.io.small_file import read_text
from compress.models.adapters import parts
from compress.models.hub import is_hub_id

if TYPE_CHECKING:
    from collections.abc import Mapping

TERMS = ("license", "license_name", "license_link", "language", "pipeline_tag")  # that hold for what is made of it too
OWN = (*TERMS, "library_name", "base_model", "base_model_relation", "tags")  # that a result says of itself
FENCE = "---"
LONGEST = 300  # letters of a value


def hub_ids(model: str | Path) -> list[str]:
    """The names on the hub of what the user calls a model, and of an adapter that is part of it; none of a folder.

    A folder of the hub's cache is known by its path.
    """
    found = []
    for name in parts(model):
        path = Path(name)
        if path.is_dir():
            cached = [part for part in path.resolve().parts if part.startswith("models--") and part.count("--") == 2]
            found += [part.removeprefix("models--").replace("--", "/") for part in cached]
        elif is_hub_id(name):
            found.append(name)
    return found


def said_by(folder: Path, names: tuple[str, ...] = TERMS) -> dict[str, Any]:
    """What the head of a folder's model card says, of what can be passed on: text, and lists of text.

    A card that cannot be read says nothing: it is for people, and no result may depend on it.
    """
    try:
        lines = read_text(folder / CARD).splitlines()
        if not lines or lines[0].strip() != FENCE:
            return {}
        head = yaml.safe_load("\n".join(lines[1 : lines.index(FENCE, 1)]))
    except (UsageError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return {name: head[name] for name in names if _plain(head.get(name))} if isinstance(head, dict) else {}


def shared_terms(all_said: list[Mapping[str, Any]]) -> dict[str, Any]:
    """What the cards of several parents say alike."""
    first = all_said[0] if all_said else {}
    return {name: value for name, value in first.items() if all(said.get(name) == value for said in all_said)}


def _plain(value: object) -> bool:
    """Whether a value is text, or a list of text, of a length that a card may have."""
    each = value if isinstance(value, list) else [value]
    known = (isinstance(v, str) and 0 < len(v) <= LONGEST and v.isprintable() for v in each)
    return 0 < len(each) <= LONGEST and all(known)
