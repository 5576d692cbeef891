"""Values of options against the types their dataclasses declare."""

from __future__ import annotations

import math
import re
import types
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from compress.errors import OptionError
from compress.passes.merge.schedules import Matched

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compress.export import Exporter
    from compress.passes import Pass


def mistyped(pass_: Pass | Exporter) -> Iterator[OptionError]:
    """Options of a pass or exporter made in Python, and of its overrides, that are of the wrong type."""
    hints = get_type_hints(type(pass_))
    own = {f.name: getattr(pass_, f.name) for f in fields(pass_) if f.name != "overrides"}
    yield from _wrong(hints, own, "")
    for i, override in enumerate(getattr(pass_, "overrides", ())):
        yield from _wrong(hints, override.options, f"overrides[{i}].")


def _wrong(hints: Mapping[str, Any], options: Mapping[str, Any], prefix: str) -> Iterator[OptionError]:
    for name, value in options.items():
        if name not in hints:
            continue  # unknown ones are named elsewhere
        text_for_list = isinstance(value, str) and any(get_origin(o) is tuple for o in choices(hints[name]))
        if text_for_list or not any(fits(option, value)[0] for option in choices(hints[name])):
            yield OptionError(f"{prefix}{name}", f"{value!r} is not {describe(hints[name])}")


def choices(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the one type."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def fits(hint: Any, value: Any) -> tuple[bool, Any]:
    """Whether a value read from a file is of an annotated type, and the value as that type."""
    if get_origin(hint) is Literal:
        return value in get_args(hint), value
    if get_origin(hint) is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            return False, None
        found = [_as_one_of(get_args(hint)[0], item) for item in items]
        return all(good for good, _ in found), tuple(item for _, item in found)
    if hint is Matched:
        if isinstance(value, Mapping) and value.keys() == {"match", "value"}:
            value = Matched(value["match"], value["value"])
        if not isinstance(value, Matched) or not isinstance(value.match, str):
            return False, None
        good, number = _as_one_of(get_type_hints(Matched)["value"], value.value)
        return good, Matched(value.match, number)
    if get_origin(hint) is Mapping:  # names of things to things
        whole = isinstance(value, Mapping) and all(isinstance(k, str) and k for k in value)
        found_in = {k: _as_one_of(get_args(hint)[1], v) for k, v in value.items()} if whole else {}
        return whole and all(good for good, _ in found_in.values()), {k: v for k, (_, v) in found_in.items()}
    if hint is type(None):
        return value is None, None
    if hint is float and isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        value = float(value)  # YAML 1.1 takes 1e-2, without a point, for a text
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return math.isfinite(value), float(value)
    if hint in (int, float, str, bool):
        return type(value) is hint, value
    raise TypeError(f"options of type {hint} are not readable from YAML")


def written(value: Any) -> Any:
    """A value of an option as YAML has it."""
    if isinstance(value, tuple):
        return [written(item) for item in value]
    if isinstance(value, Matched):
        return {"match": value.match, "value": written(value.value)}
    return {name: written(item) for name, item in value.items()} if isinstance(value, Mapping) else value


def _as_one_of(hint: Any, value: Any) -> tuple[bool, Any]:
    """The same of a type that may be a union: the first member that fits."""
    found = (fits(option, value) for option in choices(hint))
    return next((each for each in found if each[0]), (False, None))


def describe(hint: Any) -> str:
    """An annotated type in words."""
    words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
    parts = []
    for option in choices(hint):
        if get_origin(option) is Literal:
            parts.append("one of " + ", ".join(map(str, get_args(option))))
        elif get_origin(option) is tuple:
            parts.append(_described_list(get_args(option)[0]))
        elif get_origin(option) is Mapping:
            parts.append("several by name, such as {first: ..., second: ...}")
        else:
            parts.append(words.get(option, str(option)))
    return " or ".join(parts)


def _described_list(item: Any) -> str:
    if item is Matched:
        return "a list of {match: pattern, value: number or list over depth}"
    if item is float:
        return "a list of numbers over depth"
    return "a list of such values, one for each model" if len(choices(item)) > 1 else "a list"
