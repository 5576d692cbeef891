"""A pass that fails on one layer never stops a run: more damping, then its fallback, and the report says so."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from compress.errors import SolveError

if TYPE_CHECKING:
    from compress.passes.base import Edit, LinearPass, Target

MORE_DAMPING = (1.0, 10.0, 100.0)


def solved(pass_: LinearPass, target: Target) -> tuple[Edit, str | None]:
    """Run a pass; on failure with more damping, then its fallback. Says in words what was done instead, or None."""
    reason = ""
    damping = getattr(pass_, "damping", None)
    helps = isinstance(damping, int | float) and target.statistics is not None
    for factor in MORE_DAMPING if helps else MORE_DAMPING[:1]:
        options: dict[str, Any] = {"damping": float(damping or 0) * factor} if helps else {}
        try:
            return replace(pass_, **options).run(target), f"damping x{factor:g}: {reason}" if reason else None
        except SolveError as error:
            reason = str(error)
    other = pass_.stand_in()
    return other.run(target), f"{other.key} instead of {pass_.key}: {reason}"
