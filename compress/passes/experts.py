"""A pass that leaves fewer experts in the layers of a mixture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from annotated_types import Ge, Gt, Lt

from compress.passes.base import OptionError, Pass, Reach

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from compress.models.graph import Graph
    from compress.models.symmetry import Units
    from compress.passes.interface import ExpertsLeft, ExpertsSeen
    from compress.passes.merge.orders import Moves, ReadTensor


@dataclass(frozen=True, kw_only=True)
class ExpertsPass(Pass):
    """A pass that leaves fewer experts in every layer of a mixture: of those of which it selects every matrix.

    Args:
        keep: how many experts of every layer stay: a share of them, or a whole number.
    """

    keep: Annotated[float, Gt(0), Lt(1)] | Annotated[int, Ge(1)] = 0.75

    reach: ClassVar[Reach] = "experts"
    merges: ClassVar[bool] = False  # what stays may be made of several, so one of those that may go stays in each group

    @property
    def calibrated(self) -> bool:
        return True

    @property
    def sees_outputs(self) -> bool:
        """Whether it must know what experts put out, not only what they are sent."""
        return True

    @property
    def sees_distances(self) -> bool:
        """Whether it must know how like each other the outputs of experts are, each shown every token."""
        return False

    @property
    def aligned(self) -> bool:
        """Whether the neurons of experts that become one are put in one order first, by `order`."""
        return False

    @property
    def mixes_routers(self) -> bool:
        """Whether the router gets the mean of what it had for experts that become one.

        Otherwise it keeps what it had for the one whose number they keep.
        """
        return False

    @property
    def kept_in_words(self) -> str:
        """How many experts stay."""
        return f"{self.keep}" if isinstance(self.keep, int) else f"{100 * self.keep:g}%"

    def produces(self, kind: str) -> str:
        return kind

    def check(self) -> Iterator[OptionError]:
        if self.overrides:
            yield OptionError("overrides", "every layer keeps as many experts; use exclude for those that must stay")

    def kept_of(self, count: int, groups: int, least: int = 1) -> int:
        """How many experts of `count` stay. A share is rounded so that equally many of each group do, `least` or more.

        A whole number is taken as it is.
        """
        if isinstance(self.keep, int):
            return self.keep
        return min(count, groups * max(least, int(self.keep * count / groups + 0.5)))

    def candidates(self, graph: Graph, layer: str) -> frozenset[int]:
        """Numbers of the experts of a layer that it may take out: those of which it selects every matrix."""
        may: dict[int, bool] = {}
        for site in graph.sites:
            if site.is_expert and site.parameter.rpartition(".")[0] == layer:
                number = site.ref.index[0]
                may[number] = may.get(number, True) and self.selects(site.name, in_block=True)
        return frozenset(number for number, selected in may.items() if selected)

    def scores(self, layer: ExpertsSeen) -> Tensor:
        """(experts,) float64: what each is worth."""
        raise NotImplementedError

    def run(self, layer: ExpertsSeen) -> ExpertsLeft:
        """Which experts stay, and what they are made of."""
        raise NotImplementedError

    def order(self, neurons: Units, ours: ReadTensor, theirs: ReadTensor) -> Moves:
        """How the neurons of another expert are put in our order: name of a parameter -> what is done to its entry."""
        raise NotImplementedError
