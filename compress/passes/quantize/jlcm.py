"""JLCM: tables of values and the choice of every weight's entry, learned together.

Shapes: O rows, I columns, K entries of a table, G tables, S scales of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Gt, Lt

from compress.encodings import Codebooks
from compress.encodings.codebook import nearest, of_columns, stored_table, unscaled
from compress.encodings.uniform import narrowest, stored_scale
from compress.lazy import functional, no_grad, torch
from compress.passes.quantize.codebook import Codebook, CodebookOptions
from compress.passes.quantize.learned import LearnedPass, LearnedRounding, look_up, pulled
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

    Every weight has a place on its table and chooses the entry nearest to it. The gradient at the weight says which way
    its place should move; how far it moves in a step is the learning rate times how strongly the entries on that side
    pull it, the nearer the more (the proximal mapping gradient). Places may pass any number of entries, and zero.
    Masked weights stay zero.

    The pull scales what Adam makes of the gradient: inside the gradient Adam would divide it out again, as an entry
    pulls alike from step to step.

    Source: Yvinec, Dapogny and Bailly, "Network Memory Footprint Compression Through Jointly Learnable Codebooks and
    Mappings", ICLR 2024, arXiv 2309.17361. The paper's update could not be read in full; this is a reconstruction from
    its stated shape. Differs from the paper in: one number per weight, its place, stands for the logits of all entries;
    rows store the number of their table unless `reorder` sorts them; scales are learned too where there are any; the
    best iterate on held-out samples is kept, never worse there than k-means.

    Args:
        mapping_rate: learning rate of the choices, in mean gaps of a table: the length of a step towards an entry one
            mean gap away.
        mapping_gradient: `proximal`; or `distance`, the plain chain rule through a one-hot choice, whose pull grows
            with the distance, for comparison; or `equal`, the same step for every weight.
        learn_mapping: False learns the tables alone.

    Example:
        >>> import torch, compress
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 8))
        >>> result = compress.apply(model, [compress.Jlcm(bits=3, steps=5)], calibration=torch.randn(16, 64))
        >>> result.weights["0"].encoding.table.shape
        torch.Size([1, 8])
    """

    learning_rate: Annotated[float, Gt(0), Lt(1)] = 0.01
    mapping_rate: Annotated[float, Gt(0), Lt(1)] = 0.02
    mapping_gradient: Literal["proximal", "distance", "equal"] = "proximal"
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
    """What = scale * table[choice]; chosen is the entry nearest to W / scale plus what the weight has moved."""

    def __init__(self, weight: Tensor, start: Codebooks, options: Jlcm):
        self.options, self.row_group, self.weight = options, start.row_group, weight
        self.period = start.period
        self.first_table = start.table.float()
        self.largest = self.first_table.abs().amax(1, keepdim=True).clamp_(min=1e-12)
        self.gap = mean_gap(self.first_table)[self.row_group.long()][:, None]  # (O, 1)
        self.moved = torch.zeros_like(self.first_table, requires_grad=True)  # in units of the largest entry
        self.first_scale = None if start.scale is None else start.scale.float()
        self.log_scale = torch.zeros(
            (len(weight), 1 if start.scale is None else start.scale.shape[1]), requires_grad=start.scale is not None
        )
        self.place = torch.zeros_like(weight, requires_grad=options.learn_mapping)  # moved so far, in mean gaps
        self.step: tuple[Tensor, Tensor, Tensor] | None = None  # places before it, the entries there, and the tables

    def groups(self) -> list[tuple[list[Tensor], float]]:
        found = [([t for t in (self.moved, self.log_scale) if t.requires_grad], self.options.learning_rate)]
        return [*found, ([self.place], self.options.mapping_rate)] if self.options.learn_mapping else found

    def table(self) -> Tensor:
        """(G, K) as it stands, ascending."""
        return (self.first_table + self.largest * self.moved).sort(1).values

    def scale(self) -> Tensor | None:
        """(O, S) as it stands."""
        return None if self.first_scale is None else self.first_scale * self.log_scale.exp()

    def unit(self, scale: Tensor | None) -> Tensor:
        """(O, I) the places of weights, in units of the table."""
        own = self.weight if scale is None else unscaled(self.weight, scale)
        return moved(own, self.gap, self.place)

    def soft(self, progress: float) -> Tensor:
        table, scale = self.table(), self.scale()
        unit = self.unit(scale)
        entry = nearest(unit.detach(), table.detach(), self.row_group)
        made = look_up(table, entry.long(), self.row_group.long())
        self.step = None
        if self.options.learn_mapping and progress < FROZEN:
            self.step = self.place.detach().clone(), entry, table.detach()
            made = passed(made, unit)
        return made if scale is None else made * of_columns(scale, made.shape[1])

    @no_grad
    def after(self) -> None:
        if self.step is None:
            return
        before, entry, table = self.step
        up, down = pulls(table, self.options.mapping_gradient)
        index = entry.long() + self.row_group.long()[:, None] * table.shape[1]
        self.place.copy_(pulled(before, self.place, up[index], down[index]))

    @no_grad
    def encoding(self) -> Codebooks:
        table = stored_table(self.table())
        scale = self.scale()
        stored = None if scale is None else narrowest(stored_scale(scale))
        codes = nearest(self.unit(scale), table, self.row_group)
        return Codebooks(codes, narrowest(table), self.row_group, stored, self.period)


@fused
def moved(unit: Tensor, gap: Tensor, place: Tensor) -> Tensor:
    """(O, I) weights and what they have moved, (O, 1) mean gaps long."""
    return unit + gap * place


@fused
def passed(made: Tensor, unit: Tensor) -> Tensor:
    """(O, I) entries as they are, but that the gradient goes to the places too."""
    return made + (unit - unit.detach())  # adds nothing


def mean_gap(table: Tensor) -> Tensor:
    """(G, K) ascending tables -> (G,) D."""
    return table.diff(dim=1).mean(1).clamp(min=1e-12)


def pulls(table: Tensor, gradient: str) -> tuple[Tensor, Tensor]:
    """(G, K) ascending tables -> how strongly a weight at each entry is pulled up, and down, (G * K,) both.

    In units of the mean gap D of the table: an entry at the distance d pulls with D^2 / max(d, D / 4) where the
    gradient is `proximal`, with d where it is `distance`, with D where it is `equal`; the strongest of a side counts:
    the neighbour's, or that of the last entry. Nothing lies beyond the last entry: a weight there does not move further
    out, and is not further away when it is wanted back.
    """
    mean = mean_gap(table)[:, None]
    if gradient == "distance":
        up, down = (table[:, -1:] - table) / mean, (table - table[:, :1]) / mean
    else:
        gap = table.diff(dim=1)
        pull = mean / gap.clamp(min=NEAREST * mean) if gradient == "proximal" else torch.ones_like(gap)
        up, down = functional.pad(pull, (0, 1)), functional.pad(pull, (1, 0))
    return up.flatten(), down.flatten()
