"""A pass that fails on one layer never stops a run: more damping, then its fallback, and the report says so."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from compress.errors import SolveError

if TYPE_CHECKING:
    from collections.abc import Callable

    from compress.calibration.statistics import Statistics
    from compress.passes.base import Edit, LinearPass, Pass, Target

P = TypeVar("P", bound="Pass")
Done = TypeVar("Done")

MORE_DAMPING = (1.0, 10.0, 100.0)


def solved(pass_: LinearPass, target: Target) -> tuple[Edit, str | None]:
    """Run a pass; on failure with more damping, then its fallback. Says in words what was done instead, or None."""
    return with_more_damping(pass_, lambda tried: tried.run(target), pass_.stand_in(), target.statistics)


def with_more_damping(
    pass_: P, run: Callable[[P], Done], other: P, statistics: Statistics | None
) -> tuple[Done, str | None]:
    """What `run` makes with a pass, on failure with more damping where that helps, then with another pass."""
    reason = ""
    damping = getattr(pass_, "damping", None)
    helps = isinstance(damping, int | float) and statistics is not None
    for factor in MORE_DAMPING if helps else MORE_DAMPING[:1]:
        options: dict[str, Any] = {"damping": float(damping or 0) * factor} if helps else {}
        try:
            return run(replace(pass_, **options)), f"damping x{factor:g}: {reason}" if reason else None
        except SolveError as error:
            reason = str(error)
    return run(other), f"{other.key} instead of {pass_.key}: {reason}"
