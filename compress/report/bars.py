"""Bars for the terminal: how much of every block is zero."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from compress.passes.names import block_of

if TYPE_CHECKING:
    from collections.abc import Mapping

ALIKE = 0.01  # shares no further apart differ by the rounding to whole columns
LONGEST, SHORTEST = 40, 4  # characters of a bar that is full
EIGHTHS = "▏▎▍▌▋▊▉█"


def uneven(found: Mapping[str, tuple[int, float]]) -> bool:
    """Whether layers differ in their shares of zeros: layer -> (weights, share)."""
    shares = [share for _, share in found.values()]
    return bool(shares) and max(shares) - min(shares) > ALIKE


def zeros(found: Mapping[str, tuple[int, float]], width: int, ascii_only: bool = False) -> str:
    """A line for every block, with the range of its layers where they differ, and one for all.

    Args:
        found: layer -> (weights, share of zeros).
        width: of the terminal.
        ascii_only: it can show nothing else.
    """
    blocks: dict[str, dict[str, tuple[int, float]]] = {}
    for name in sorted(found, key=_natural):
        blocks.setdefault(block_of(name), {})[name] = found[name]
    blocks["in all"] = dict(found)
    ends = {block: f"{_mean_bits(layers):6.1%}{_bits_range(layers)}" for block, layers in blocks.items()}
    names = max(map(len, blocks))
    room = min(LONGEST, max(SHORTEST, width - names - 2 - max(map(len, ends.values()))))
    return "\n".join(
        f"{block:{names}} {_bar(_mean_bits(layers), room, ascii_only):{room}} {ends[block]}"
        for block, layers in blocks.items()
    )


def _natural(name: str) -> list[tuple[str, int]]:
    """Orders layers.10 after layers.9."""
    return [(part, -1) if i % 2 == 0 else ("", int(part)) for i, part in enumerate(re.split(r"(\d+)", name))]


def _mean_bits(layers: Mapping[str, tuple[int, float]]) -> float:
    return sum(count * share for count, share in layers.values()) / sum(count for count, _ in layers.values())


def _bits_range(layers: Mapping[str, tuple[int, float]]) -> str:
    if not uneven(layers):
        return ""
    shares = [share for _, share in layers.values()]
    return f"  {min(shares):.1%} to {max(shares):.1%}"


def _bar(share: float, room: int, ascii_only: bool) -> str:
    if ascii_only:
        return "#" * round(share * room)
    whole, rest = divmod(round(share * room * 8), 8)
    return EIGHTHS[-1] * whole + (EIGHTHS[rest - 1] if rest else "")
