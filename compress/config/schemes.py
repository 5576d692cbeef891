"""Short names for what codes are: `w4g128`, `w4`, or the name of a grid: of floats, or of super-blocks."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from compress.passes.quantize.named_grids import NAMED_GRIDS

if TYPE_CHECKING:
    from collections.abc import Collection

SCHEME = r"w(\d+)(?:g(\d+))?"
DESCRIBED = "bits and group size such as w4g128, or w4 for one scale per row"
NAMED = f"for rtn and gptq also {', '.join(NAMED_GRIDS)}"


def options_of(scheme: Any, names: Collection[str]) -> dict[str, Any] | None:
    """The options that a scheme is short for, of a quantizer with options of these names; None where it is none."""
    if scheme in NAMED_GRIDS and "grid" in names:
        bits, group_size = NAMED_GRIDS[scheme]
        return {"grid": scheme, "bits": bits, "group_size": group_size}
    match = re.fullmatch(SCHEME, str(scheme))
    if not match:
        return None
    if not match[2] and "group_size" not in names:
        return {"bits": int(match[1])}
    return {"bits": int(match[1]), "group_size": int(match[2]) if match[2] else None}


def no_scheme(names: Collection[str]) -> str:
    """What is said of a text that is no scheme of such a quantizer."""
    return f"is not {DESCRIBED}{f' ({NAMED})' if 'grid' in names else ''}"


__all__ = ["DESCRIBED", "NAMED", "no_scheme", "options_of"]
