"""The mean of models whose units were put in one order first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from annotated_types import Ge

from compress.passes.merge.average import Average
from compress.passes.merge.permutation import align_units

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from compress.models.symmetry import Units
    from compress.passes.merge.orders import ReadTensor
    from compress.passes.merge.permutation import Alignment


@dataclass(frozen=True, kw_only=True)
class WeightMatching(Average):
    """Put neurons, channels and heads of the others in the order of the base's, then take the mean.

    Networks that were trained from different beginnings compute the same with different neurons at the same place, and
    their mean computes nothing. Another order of neurons changes nothing that a network computes, so each of the others
    is first put in the order whose weights have the largest inner product with the base's.

    Source: Ainsworth, Hayase and Srinivasa, "Git Re-Basin: Merging Models modulo Permutation Symmetries", 2022, arXiv
    2209.04836, algorithm 1 (weight matching). Differs from the paper in: heads of attention are matched too, each pair
    scored with the best order of what is free within; of the one matrix that has the residual stream along both axes,
    in the head of a masked language model, a step sees a linear approximation; several others are each matched with the
    base; running statistics move along and do not count.

    Args:
        residual: put the channels of a transformer's residual stream in one order too.
        sweeps: at most so many times through all orders; it ends sooner where none gains.

    Example:
        >>> import torch
        >>> from compress import WeightMatching
        >>> from compress.models.symmetry import Place, Units
        >>> ours = {"up": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "down": torch.tensor([[5.0, 6.0]])}
        >>> theirs = {"up": ours["up"].flip(0), "down": ours["down"].flip(1)}
        >>> both = torch.tensor([[0], [1]])
        >>> neurons = Units((Place("up", 0, both), Place("down", 1, both)))
        >>> matching = WeightMatching(models=("other",))
        >>> found = matching.align([neurons], ours.__getitem__, theirs.__getitem__, torch.Generator())
        >>> found.moved, found.after
        (2, 0.0)
    """

    residual: bool = True
    sweeps: Annotated[int, Ge(1)] = 100

    key: ClassVar[str] = "weight_matching"
    common: ClassVar[frozenset[str]] = Average.common | {"residual", "sweeps"}
    aligns: ClassVar[bool] = True

    @property
    def aligns_residual(self) -> bool:
        return self.residual

    def align(
        self, units: Sequence[Units], ours: ReadTensor, theirs: ReadTensor, generator: torch.Generator
    ) -> Alignment:
        return align_units(units, ours, theirs, generator, self.sweeps)
