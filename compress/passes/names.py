"""Names of layers: which options a pattern changes, which block they say a layer is in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Override:
    """Other option values for the sites that match; the last match wins."""

    match: str
    options: Mapping[str, Any]


BLOCK_PREFIX = re.compile(r"(?:.*?\.)?\d+(?=\.|$)")  # a name up to its first number


def block_of(name: str) -> str:
    """What layers of one block have in common in their names; a layer outside every block is one of its own."""
    found = BLOCK_PREFIX.match(name)
    return found[0] if found else name
