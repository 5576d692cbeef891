"""A language model with layers whose inputs are turned while it runs."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from math import gcd
from typing import TYPE_CHECKING, Any, TypeVar

from compress.encodings.turn import block_of
from compress.models.graph import chosen, find
from compress.models.shorten import rebuilt
from compress.models.turned_inputs import ENTRY, pattern_of, turn_inputs

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from compress.models.cuts import Cut
    from compress.models.graph import Graph

Value = TypeVar("Value")


@dataclass(frozen=True)
class Turned:
    """The model with such layers.

    Attributes:
        graph: of it.
        configured: changed entries of the configuration, with their new values.
        cuts: nothing is.
    """

    graph: Graph
    configured: dict[str, Any]
    cuts: dict[str, Cut] = field(default_factory=dict)

    def moved(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """What was known by old names, by the new ones: the same."""
        return dict(values)


def with_turned(graph: Graph, sites: Collection[str], in_place: bool = False) -> Turned:
    """A model that turns the inputs of some layers.

    Args:
        graph: of the model.
        sites: the layers.
        in_place: change the model itself. Otherwise it is rebuilt, parameters on the meta device.

    Raises:
        UnsupportedModelError: there is no such model.
    """
    model, widths = graph.model, defaultdict[str, int](int)
    for site in graph.sites:
        if site.name in sites:
            widths[pattern_of(site.name)] = gcd(widths[pattern_of(site.name)], site.shape[1])
    sizes = {pattern: block_of(width) for pattern, width in widths.items()}
    if in_place:
        turn_inputs(model, sizes)
        config: Any = model.config
        setattr(config, ENTRY, {**(getattr(config, ENTRY, None) or {}), **sizes})
    else:
        model = rebuilt(model, {ENTRY: sizes}, "inputs that are turned")  # type: ignore[arg-type]
    names = list(dict.fromkeys(tower.name for tower in graph.towers))
    return Turned(chosen(find(model), names), {ENTRY: sizes})


__all__ = ["Turned", "with_turned"]
