"""JLCM: tables of values and the choice of every weight's entry, learned together.

Shapes: O rows, I columns, K entries of a table, G tables.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Gt, Lt

from compress.encodings import Codebooks
from compress.encodings.codebook import nearest, stored_table, unscaled
from compress.encodings.uniform import narrowest, stored_scale
from compress.lazy import no_grad, torch
from compress.passes.quantize.codebook import Codebook, CodebookOptions
from compress.passes.quantize.learned import LearnedPass, LearnedRounding, look_up
from compress.passes.solvers.device import fused

if TYPE_CHECKING:
    from torch import Tensor

    from compress.calibration.statistics import Need
    from compress.passes.base import Target

FROZEN = 0.8  # share of the steps after which choices stay as they are and only tables learn
NEAREST = 0.25  # candidates nearer than this share of the mean gap count as this far


@dataclass(frozen=True, kw_only=True)
class Jlcm(CodebookOptions, LearnedPass):
    """Learn tables and choices from the block's outputs, starting at k-means.

    The gradient at a weight pulls it towards the other entries of its table or away from them, the more the nearer they
    are (the proximal mapping gradient). What has been pulled far enough is nearest to another entry and chooses it.
    Masked weights stay zero.

    Source: Yvinec, Dapogny and Bailly, "Network Memory Footprint Compression Through Jointly Learnable Codebooks and
    Mappings", ICLR 2024, arXiv 2309.17361. The paper's update could not be read in full; this is a reconstruction from
    its stated shape. Differs from the paper in: one number per weight, a factor that moves it over the table, stands
    for the logits of all its entries; rows store the number of their table unless `reorder` sorts them; each row's
    scale is learned too where there is one; the best iterate on held-out samples is kept, never worse there than
    k-means.

    Args:
        mapping_rate: learning rate of the choices, of the logarithm of each weight's factor.
        mapping_gradient: `proximal`; or `distance`, the plain chain rule through a one-hot choice, whose pull grows
            with the distance, for comparison.
        learn_mapping: False learns the tables alone.

    Example:
        >>> import torch, compress
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 8))
        >>> result = compress.apply(model, [compress.Jlcm(bits=3, steps=5)], calibration=torch.randn(16, 64))
        >>> result.weights["0"].encoding.table.shape
        torch.Size([1, 8])
    """

    learning_rate: Annotated[float, Gt(0), Lt(1)] = 0.01
    mapping_rate: Annotated[float, Gt(0), Lt(1)] = 0.015
    mapping_gradient: Literal["proximal", "distance"] = "proximal"
    learn_mapping: bool = True

    key: ClassVar[str] = "jlcm"

    @property
    def needs(self) -> Need:
        return "gram" if self.objective == "layer" else super().needs

    def start(self, target: Target) -> Choice:
        return Choice(target.weight, self.by_kmeans(target), self)

    def stand_in(self) -> Codebook:
        shared = {f.name: getattr(self, f.name) for f in fields(CodebookOptions)}
        return Codebook(**{**shared, "weighting": "none", "overrides": ()})


class Choice(LearnedRounding):
    """What = scale * table[choice]; a weight chooses the entry nearest to W / scale times its factor."""

    def __init__(self, weight: Tensor, start: Codebooks, options: Jlcm):
        self.options, self.row_group, self.weight = options, start.row_group, weight
        self.period = start.period
        self.first_table = start.table.float()
        self.largest = self.first_table.abs().amax(1, keepdim=True).clamp_(min=1e-12)
        self.moved = torch.zeros_like(self.first_table, requires_grad=True)  # in units of the largest entry
        self.first_scale = None if start.scale is None else start.scale.float()
        self.log_scale = torch.zeros(len(weight), 1, requires_grad=start.scale is not None)
        self.log_factor = torch.zeros_like(weight, requires_grad=options.learn_mapping)

    def groups(self) -> list[tuple[list[Tensor], float]]:
        found = [([t for t in (self.moved, self.log_scale) if t.requires_grad], self.options.learning_rate)]
        return [*found, ([self.log_factor], self.options.mapping_rate)] if self.options.learn_mapping else found

    def table(self) -> Tensor:
        """(G, K) as it stands, ascending."""
        return (self.first_table + self.largest * self.moved).sort(1).values

    def scale(self) -> Tensor | None:
        """(O, 1) as it stands."""
        return None if self.first_scale is None else self.first_scale * self.log_scale.exp()

    def moved_weight(self) -> Tensor:
        """(O, I) in units of the table."""
        scale = self.scale()
        unit = self.weight if scale is None else unscaled(self.weight, scale)
        return moved(unit, self.log_factor)

    def soft(self, progress: float) -> Tensor:
        table, unit = self.table(), self.moved_weight()
        entry = nearest(unit.detach(), table.detach(), self.row_group).long()
        made = look_up(table, entry, self.row_group.long())
        if self.options.learn_mapping and progress < FROZEN:
            up, down = pulls(table.detach(), self.options.mapping_gradient)
            made = pulled(made, unit, entry, self.row_group.long()[:, None] * table.shape[1], up, down)
        scale = self.scale()
        return made if scale is None else made * scale

    @no_grad
    def encoding(self) -> Codebooks:
        table = stored_table(self.table())
        scale = self.scale()
        stored = None if scale is None else narrowest(stored_scale(scale))
        return Codebooks(
            nearest(self.moved_weight(), table, self.row_group), narrowest(table), self.row_group, stored, self.period
        )


@fused
def moved(unit: Tensor, log_factor: Tensor) -> Tensor:
    """(O, I) weights times their factors."""
    return unit * log_factor.exp()


@fused
def pulled(made: Tensor, unit: Tensor, entry: Tensor, first: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """(O, I) entries as they are, but that the gradient goes to the choices too; `first` (O, 1) of the row's table."""
    above = unit.detach() > made.detach()
    index = entry + first
    pull = torch.where(above, up[index], down[index])
    return made + (unit - unit.detach()) * pull  # adds nothing


def candidates(table: Tensor, gradient: str) -> Tensor:
    """(G, K) ascending table -> (G, K, K): how strongly a weight at entry i is pulled to entry k, in units of D.

    `proximal` is D^2 / max(d, D / 4) for the distance d of the two and the mean gap D of the table; `distance` is d.
    Nothing pulls a weight to where it is.
    """
    distance = (table[:, None, :] - table[:, :, None]).abs()
    mean = table.diff(dim=1).mean(1).clamp(min=1e-12)[:, None, None]
    pull = mean / distance.clamp(min=NEAREST * mean) if gradient == "proximal" else distance / mean
    pull.diagonal(dim1=1, dim2=2).zero_()
    return pull


def pulls(table: Tensor, gradient: str) -> tuple[Tensor, Tensor]:
    """The strongest pull at a weight that lies above its entry and at one that lies below it, (G * K,) both.

    The candidates of a weight are those on its side of its entry: whichever way the gradient points, it brings them
    nearer or moves them away. A weight beyond the last entry has its candidates on the other side.
    """
    pull = candidates(table, gradient)
    up, down = pull.triu().amax(2), pull.tril().amax(2)
    return torch.where(up > 0, up, down).flatten(), torch.where(down > 0, down, up).flatten()
