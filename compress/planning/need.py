"""How much of something a run needs at most, and what it is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


@dataclass(frozen=True)
class Need:
    """What is needed at one moment of a run.

    Attributes:
        moment: what the run does then, such as `training`.
        parts: what it is for -> bytes.
    """

    moment: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.parts.values())


def most(needs: Iterable[Need]) -> Need:
    """The moment that needs most; what it does not need is left out."""
    largest = max(needs, key=lambda need: need.total)
    return Need(largest.moment, {name: size for name, size in largest.parts.items() if size})
