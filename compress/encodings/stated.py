"""What a file states of a packed weight, checked before anything is made of it: the file may be damaged, or newer."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Mapping

Made = TypeVar("Made")
DTYPES = ("float16", "bfloat16", "float32", "float64")
LARGEST = 1 << 40  # of a whole number
WIDEST = 8  # bits of a code


def made_from(cls: type[Made], data: Any, what: str) -> Made:
    """A form, of what a file states of it.

    Args:
        cls: a dataclass with fields of type int, bool, str and their like; a float is a share, between 0 and 1.
        data: name -> value, as JSON has it.
        what: it is, for messages.

    Raises:
        ValueError: no mapping, a field that is unknown or missing, or a value that it cannot have.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{what} is no mapping")
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(set(map(str, data)) - known.keys()):
        raise ValueError(f"fields {unknown} of {what} are not known to this version")
    if missing := sorted(name for name, f in known.items() if f.default is MISSING and name not in data):
        raise ValueError(f"fields {missing} of {what} are missing")
    for name, value in data.items():
        if not _fits(name, value, str(known[name].type)):
            raise ValueError(f"{name} {value!r:.100} of {what} is not known to this version")
    return cls(**data)


def _fits(name: str, value: Any, kind: str) -> bool:
    """Whether a field may have a value, by its name and the type that stands in its class."""
    if value is None:
        return kind.endswith("| None")
    if kind == "bool":
        return isinstance(value, bool)
    if kind.startswith("int"):
        return whole(value, WIDEST if name == "bits" else LARGEST, least=0 if name == "period" else 1)
    if kind.startswith("float"):  # a share
        return type(value) is float and 0 < value < 1
    return isinstance(value, str) and (value in DTYPES or not name.endswith("dtype"))


def whole(value: Any, largest: int = LARGEST, least: int = 1) -> bool:
    """Whether a value is a whole number in a range."""
    return type(value) is int and least <= value <= largest


def divides(parts: Mapping[str, int], numbers: Mapping[str, int]) -> None:
    """Check that every part divides the number of the same key.

    Raises:
        ValueError: it does not.
    """
    for name, part in parts.items():
        if part and numbers[name] % part:
            raise ValueError(f"{numbers[name]} {name} cannot be split into {part} equal parts")
