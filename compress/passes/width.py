"""A pass that takes neurons and attention heads out of every block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from annotated_types import Ge, Gt, Lt, MinLen

from compress.models.narrow import nearest, width_of
from compress.models.symmetry import Part
from compress.passes.base import OptionError, Pass, Reach

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compress.models.graph import Graph
    from compress.models.narrow import Width
    from compress.passes.interface import Narrowed, UnitsSeen


@dataclass(frozen=True, kw_only=True)
class WidthPass(Pass):
    """A pass that takes units out of every block, as many of each: neurons of the MLP, key-value groups of attention.

    Args:
        sparsity: share of the neurons, and of the key-value groups with their query heads, that go.
        parts: what is made narrower: `heads`, `mlp`, or both; heads go first.
        multiple_of: the number of neurons that stay is a multiple of this: kernels work on tiles of 8 and more, and
            the columns of the next matrix should fall into whole groups of a quantizer. Heads are counted as they are.
    """

    sparsity: Annotated[float, Gt(0), Lt(1)] = 0.2
    parts: Annotated[tuple[Part, ...], MinLen(1)] = ("heads", "mlp")
    multiple_of: Annotated[int, Ge(1)] = 8

    reach: ClassVar[Reach] = "width"
    accepts: ClassVar[frozenset[str]] = frozenset({"dense"})

    @property
    def sees_makers(self) -> bool:
        """Whether it must know how large the matrices are that make the units."""
        return False

    @property
    def sees_slopes(self) -> bool:
        """Whether it must know the gradients of the loss, with the whole model in memory."""
        return False

    @property
    def needs_biases(self) -> bool:
        """Whether it can do nothing with a reading layer without a bias."""
        return False

    @property
    def calibrated(self) -> bool:
        return self.needs != "none" or self.sees_slopes

    @property
    def trains_whole(self) -> bool:
        return self.sees_slopes

    def produces(self, kind: str) -> str:
        return kind

    def check(self) -> Iterator[OptionError]:
        if len(set(self.parts)) < len(self.parts):
            yield OptionError("parts", "names one of them twice")
        for option in ("include", "exclude", "overrides"):
            if getattr(self, option):
                yield OptionError(option, "the configuration has one width for all blocks; choose with `parts`")

    def kept_of(self, graph: Graph) -> dict[Width, int]:
        """How many units of each part of a model stay, heads first.

        Raises:
            UnsupportedModelError: they cannot go, or none would stay.
        """
        widths = [width_of(graph, part) for part in sorted(self.parts)]
        multiples: dict[Part, int] = {"heads": 1, "mlp": self.multiple_of}
        return {w: nearest(graph, w, w.count * (1 - self.sparsity), multiples[w.part]) for w in widths}

    def run(self, seen: UnitsSeen) -> Narrowed:
        """Which units stay, and what the layer that reads them becomes.

        Raises:
            SolveError: the linear algebra failed; the caller tries again with more damping, then runs `stand_in`.
        """
        raise NotImplementedError

    def stand_in(self) -> WidthPass:
        """A pass that cannot fail."""
        raise NotImplementedError
