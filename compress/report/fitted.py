"""What was chosen for a budget: as JSON, and in a few lines."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from compress.report.report import size_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


@dataclass(frozen=True)
class Point:
    """A choice for all layers.

    Attributes:
        bytes: of the whole file of weights.
        bits: stored bits per weight of the layers that were chosen for.
        loss: predicted, the sum over layers.
    """

    bytes: int
    bits: float
    loss: float


@dataclass(frozen=True)
class FittedLayer:
    """One layer.

    Attributes:
        option: that was chosen.
        bytes: that its weight takes.
        group: number of the group that is given one option; its losses are in `Fitted.losses`.
        errors: option -> squared change of what the layer puts out, over its square.
    """

    option: str
    bytes: int
    group: int
    errors: Mapping[str, float]


@dataclass(frozen=True)
class Fitted:
    """Options of a quantizer for each layer, under a budget.

    Attributes:
        model: as it was named.
        method: the quantizer.
        sensitivity: the measure of losses.
        groups: which layers are given the same option.
        budget: the largest file of weights, or the most bits per weight, that was allowed.
        chosen: what was chosen.
        uniform: option -> what it would be for all layers.
        front: choices for smaller and larger budgets, from the smallest to the largest.
        losses: for each group, option -> predicted loss.
        layers: by name.
    """

    model: str
    method: str
    sensitivity: str
    groups: str
    budget: Mapping[str, float]
    chosen: Point
    uniform: Mapping[str, Point]
    front: tuple[Point, ...]
    losses: tuple[Mapping[str, float], ...] = field(repr=False)
    layers: Mapping[str, FittedLayer] = field(repr=False)

    def to_json(self) -> str:
        """All of it."""
        return json.dumps(asdict(self), indent=1) + "\n"

    def summary(self) -> dict[str, Any]:
        """What was chosen, without the layers."""
        return {name: value for name, value in asdict(self).items() if name not in ("losses", "layers")}

    def counts(self) -> dict[str, int]:
        """Option -> number of layers, in the order of the options."""
        chosen = [layer.option for layer in self.layers.values()]
        return {option: chosen.count(option) for option in self.uniform if option in chosen}


def lines(fitted: Fitted) -> Iterator[str]:
    """What was chosen, and the uniform choices beside it."""
    counted = ", ".join(f"{option} for {count}" for option, count in fitted.counts().items())
    layers = "layer" if len(fitted.layers) == 1 else "layers"
    chosen = fitted.chosen
    yield f"{fitted.method}, {counted} of {len(fitted.layers)} {layers}"
    yield f"predicted: {_said(chosen)}"
    for option, point in fitted.uniform.items():
        yield f"  {option} everywhere: {_said(point)}"


def _said(point: Point) -> str:
    return f"{size_text(point.bytes)}, {point.bits:.2f} bits per weight, loss {point.loss:.4g}"


__all__ = ["Fitted", "FittedLayer", "Point", "lines"]
