"""Neurons of like distribution side by side.

Shapes: O rows, I columns, M quantiles; H heads of S channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from annotated_types import Ge, Le

from compress.lazy import torch
from compress.passes.base import Edit, ModelPass, OptionError
from compress.passes.quantize.grouping import group, quantiles

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from compress.models.symmetry import Axis
    from compress.passes.base import Whole

MOST_GROUPS = 256


@dataclass(frozen=True, kw_only=True)
class Reorder(ModelPass):
    """Put neurons with similarly distributed weights next to each other; the model computes what it did before.

    The neurons of an MLP are rows of the layers that make them and columns of the layer that reads them: both are put
    in the new order. So are the values of attention, within their head. `codebook` and `jlcm` with `grouping: runs`
    then give each run of neighbouring rows a table, and store where runs end instead of a number for every row.

    Source: Yvinec, Dapogny and Bailly, "Network Memory Footprint Compression Through Jointly Learnable Codebooks and
    Mappings", ICLR 2024, arXiv 2309.17361: neurons are clustered by the distribution of their weights, and the order is
    folded into the next layer. Differs from the paper in: what neurons are clustered by (quantiles) is a
    reconstruction, and layers that share neurons, such as gate and up, are clustered together.

    Args:
        groups: of neurons, 2 to 256, put one after the other.

    Example:
        >>> import compress
        >>> model, _ = compress.demo.load()
        >>> result = compress.apply(model, [compress.Reorder(groups=4)])
        >>> sorted({name.split(".")[-1] for name in result.weights})
        ['down_proj', 'gate_proj', 'o_proj', 'up_proj', 'v_proj']
    """

    groups: Annotated[int, Ge(2), Le(MOST_GROUPS)] = 16

    key: ClassVar[str] = "reorder"
    accepts: ClassVar[frozenset[str]] = frozenset({"dense"})
    preserves: ClassVar[bool] = True

    def check(self) -> Iterator[OptionError]:
        yield from super().check()
        if self.overrides:
            yield OptionError("overrides", "layers that share neurons share all options")

    def produces(self, kind: str) -> str:
        return kind

    def run(self, model: Whole) -> Iterator[tuple[str, Edit]]:
        names, load = model.names, model.load
        orders: dict[Axis, Tensor] = {}

        def order(axis: Axis) -> Tensor:
            if axis not in orders:
                orders[axis] = sorted_by_group([load(n).weight for n in axis.makers], axis, self.groups)
            return orders[axis]

        for name in names:
            target = load(name)
            weight = target.weight
            if target.rows is not None:
                weight = weight[target.rows.rows(order(target.rows))]
            if target.columns is not None:
                weight = weight[:, target.columns.columns(order(target.columns))]
            yield name, Edit(weight=weight)


def sorted_by_group(weights: list[Tensor], axis: Axis, groups: int) -> Tensor:
    """The order of an axis's channels.

    Args:
        weights: (O, I) each, of all its makers.
        axis: the channels, O = H * S of them.
        groups: at most this many.

    Returns:
        (H, S) int64: which channel of a head comes first. Groups follow one another from the narrowest distribution to
        the widest, and channels of a group keep their order.
    """
    # Makers of different scale count the same.
    features = torch.cat([quantiles(w) / w.square().mean().sqrt().clamp(min=1e-12) for w in weights], dim=1)
    label = group(features, groups).long()
    width = features.square().sum(1)
    mean = torch.zeros(int(label.max()) + 1).index_add_(0, label, width) / torch.bincount(label)
    return mean[label].view(axis.heads, axis.size).argsort(dim=1, stable=True)
