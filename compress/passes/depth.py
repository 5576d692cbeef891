"""A pass that takes whole blocks out of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from annotated_types import Ge

from compress.passes.base import Pass, Reach

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compress.models.graph import Graph
    from compress.passes.interface import Depth


@dataclass(frozen=True, kw_only=True)
class DepthPass(Pass):
    """A pass that takes whole blocks out of the model, those of which it selects every site.

    Args:
        blocks: how many of them.
    """

    blocks: Annotated[int, Ge(0)] = 1

    reach: ClassVar[Reach] = "depth"

    @property
    def calibrated(self) -> bool:
        return self.blocks > 0

    @property
    def neighbours(self) -> bool:
        """Whether the blocks that go must follow one another."""
        return False

    def produces(self, kind: str) -> str:
        return kind

    def candidates(self, graph: Graph) -> tuple[int, ...]:
        """Numbers of the blocks that it may take out: those of which it selects every site."""
        every = range(len(graph.blocks)) if graph.blocks != ("",) else ()
        sites = {i: graph.in_block(i) for i in every}
        return tuple(i for i in every if sites[i] and all(self.selects(s.name, in_block=True) for s in sites[i]))

    def run(self, model: Depth) -> Iterator[tuple[int, ...]]:
        """Numbers of the blocks that go; it is asked for more when those are gone."""
        raise NotImplementedError
