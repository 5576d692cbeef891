"""Values of options that may differ by depth and by name: a number, a list over depth, or a list of {match, value}."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class Matched:
    """A value for the tensors whose full name a shell wildcard matches; the last match of a list wins."""

    match: str
    value: float | tuple[float, ...]


# One number; numbers from the first block to the last, straight lines between them; or a list of {match, value}.
Value = float | tuple[float, ...] | tuple[Matched, ...]
# One number for every model, a list of {match, value} for every model, or one value for each. One value stands for all.
PerModel = float | tuple[Matched, ...] | tuple[Value, ...]


def value_at(value: Value, name: str, depth: float, default: float) -> float:
    """The number that holds for a tensor.

    Args:
        value: of the option.
        name: the tensor's full name.
        depth: 0 at the first block and outside the blocks, 1 at the last block.
        default: where no pattern matches.
    """
    if isinstance(value, tuple) and value and isinstance(value[-1], Matched):
        found = [v.value for v in value if isinstance(v, Matched) and fnmatchcase(name, v.match)]
        return value_at(found[-1], name, depth, default) if found else default
    if isinstance(value, tuple):
        return over_depth([v for v in value if not isinstance(v, Matched)], depth) if value else default
    return value


def values_at(values: PerModel, count: int, name: str, depth: float, default: float) -> list[float]:
    """The number of each of `count` models; arguments as of `value_at`."""
    if not isinstance(values, tuple):
        return [values] * count
    if _for_all(values):
        return [value_at(values, name, depth, default)] * count  # type: ignore[arg-type]
    found = [value_at(v, name, depth, default) for v in values if not isinstance(v, Matched)]
    return found * count if len(found) == 1 else found


def over_depth(numbers: list[float], depth: float) -> float:
    """A place on the straight lines between numbers that stand at equal distances from depth 0 to 1."""
    place = depth * (len(numbers) - 1)
    before = min(int(place), len(numbers) - 1)
    after = min(before + 1, len(numbers) - 1)
    share = place - before
    return (1 - share) * numbers[before] + share * numbers[after]


def numbers_in(value: PerModel | Value) -> Iterator[float]:
    """Every number of a value."""
    if not isinstance(value, tuple):
        yield value
        return
    for inner in value:
        yield from numbers_in(inner.value if isinstance(inner, Matched) else inner)


def patterns_in(value: object) -> Iterator[str]:
    """Every pattern of a value."""
    if isinstance(value, Matched):
        yield value.match
    elif isinstance(value, tuple):
        for inner in value:
            yield from patterns_in(inner)


def model_count(values: PerModel) -> int | None:
    """How many models the values are for; None where they are for any number."""
    if not isinstance(values, tuple) or _for_all(values) or len(values) == 1:
        return None
    return len(values)


def _for_all(values: tuple[object, ...]) -> bool:
    return bool(values) and isinstance(values[0], Matched)
