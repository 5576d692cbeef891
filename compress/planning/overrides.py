"""A choice for each layer as one line of a pipeline: options of the pass, and overrides where layers differ."""

from __future__ import annotations

import re
from collections import Counter
from fnmatch import fnmatchcase
from glob import escape
from typing import TYPE_CHECKING, Any

from compress.passes import Override

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    Chosen = tuple[tuple[str, Any], ...]  # options and their values, in order of their names

NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)")  # a part of a name that is a number


def with_overrides(chosen: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Any], tuple[Override, ...]]:
    """Options of most layers, and overrides for the others, such that the last one that matches a layer is its own.

    Layers whose names differ in numbers alone share an override where most of them are alike.

    Args:
        chosen: layer -> its options; all have the same ones.
    """
    options = {name: tuple(sorted(each.items())) for name, each in chosen.items()}
    most = _most_common(options.values())
    kinds: dict[str, list[str]] = {}
    for name in options:
        kinds.setdefault(_kind(name), []).append(name)
    patterns: list[Override] = []
    single: list[Override] = []
    for pattern, names in kinds.items():
        usual = _most_common(options[name] for name in names)
        alike = {name for name in options if fnmatchcase(name, pattern)} == set(names)
        if not alike or len(names) == 1 or usual == most:
            usual = most
        else:
            patterns.append(Override(pattern, _changes(most, usual)))
        single += [Override(escape(n), _changes(most, options[n])) for n in names if options[n] != usual]
    return dict(most), (*patterns, *single)


def _kind(name: str) -> str:
    """A pattern of all names that differ from this one in numbers alone."""
    parts = NUMBER.split(name)
    return "*".join(escape(part) for part in parts)


def _most_common(each: Iterable[Chosen]) -> Chosen:
    found: Chosen = Counter(each).most_common(1)[0][0]
    return found


def _changes(most: Chosen, own: Chosen) -> dict[str, Any]:
    """What an override says: options that differ from the pass's own; all, where only a pattern's are taken back."""
    changed = {name: value for (name, value), (_, other) in zip(own, most, strict=True) if value != other}
    return changed or dict(own)


__all__ = ["with_overrides"]
