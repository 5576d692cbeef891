"""What is wrong with a value, in words that a reader of the file knows."""

from __future__ import annotations

import difflib
from reprlib import Repr
from typing import TYPE_CHECKING, Any

from compress.config.writing import written_value

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

JSON_KINDS = {
    "integer": "a whole number",
    "number": "a number",
    "string": "a text",
    "boolean": "true or false",
    "null": "null",
    "object": "several by name, such as {first: ..., second: ...}",
}
BOUNDS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
_repr = Repr()
_repr.maxlevel, _repr.maxstring, _repr.maxother, _repr.maxlist, _repr.maxdict = 4, 200, 200, 12, 12


def shown(value: Any) -> str:
    """A value as the file has it, shortened where it is long."""
    return _repr.repr(written_value(value))


def known(word: Any, words: Iterable[str]) -> str:
    """The words that are known, and the nearest of them."""
    names = sorted(words)
    close = difflib.get_close_matches(str(word), names, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}known: {', '.join(names)}"


def described(rule: Mapping[str, Any]) -> str:
    """What a JSON schema of one value allows."""
    if "anyOf" in rule:
        return " or ".join(map(described, rule["anyOf"]))
    if "examples" in rule:
        return f"one like {', '.join(rule['examples'])}"
    if "enum" in rule:
        numbers = rule.get("type") == "integer"
        return " or ".join(map(str, rule["enum"])) if numbers else f"one of {', '.join(rule['enum'])}"
    if "const" in rule:
        return str(rule["const"])
    if rule["type"] == "array":
        return _described_list(rule["items"])
    return JSON_KINDS[rule["type"]] + _range_text(rule)


def bounded(rule: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a JSON schema of one value that has a range."""
    found = [rule, *rule.get("anyOf", ())]
    return next((part for part in found if any(bound in part for bound in BOUNDS)), rule)


def out_of_range(value: Any, rule: Mapping[str, Any]) -> str:
    """What is wrong with a number that is of the right kind."""
    part = bounded(rule)
    least, above, most, below = (part.get(bound) for bound in BOUNDS)
    if most is None and below is None:
        if least == 0:
            return f"{shown(value)} is negative"
        if least == 1 or above == 0:
            return f"{shown(value)} is not {'positive' if least is None else 'a positive number'}"
    return f"{shown(value)} is not{_range_text(part)}"


def _described_list(item: Mapping[str, Any]) -> str:
    if "$ref" in item:
        return "a list of {match: pattern, value: number or list over depth}"
    if item.get("type") == "number":
        return "a list of numbers over depth"
    if "enum" in item:
        return f"a list of some of {', '.join(item['enum'])}"
    return "a list of such values, one for each model" if "anyOf" in item else "a list"


def _range_text(rule: Mapping[str, Any]) -> str:
    least, above, most, below = (None if rule.get(bound) is None else f"{rule[bound]:g}" for bound in BOUNDS)
    low, high = least or above, most or below
    if low and high and (least is None) == (most is None):
        return f" between {low} and {high}"
    if low and high:
        return f" from {low} to below {high}" if least else f" above {low} up to {high}"
    said = {"at least": least, "above": above, "at most": most, "below": below}
    return "".join(f" {words} {bound}" for words, bound in said.items() if bound)
