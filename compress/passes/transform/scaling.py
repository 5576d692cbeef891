"""A pass that scales the channels between layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from compress.lazy import torch
from compress.models.channels import channels_of
from compress.passes.base import OptionError, Pass, Reach

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from compress.calibration.statistics import Statistics
    from compress.models.channels import Channels
    from compress.models.graph import Graph


@dataclass(frozen=True)
class ChannelsSeen:
    """What a ScalingPass works on: channels, and the layers that read them.

    Shapes: O outputs and I inputs of a reading layer, C channels of w columns each.

    Attributes:
        weights: (O, I) float32 of every reading layer.
        columns: (C, w) int64, which columns each channel is; all I of them.
        statistics: of the inputs that the layers share.
    """

    weights: tuple[Tensor, ...]
    columns: Tensor
    statistics: Statistics

    def of_channels(self, values: Tensor) -> Tensor:
        """(I,) of columns -> (C,): the largest that a channel has."""
        return values[self.columns].amax(1)

    def of_columns(self, scales: Tensor) -> Tensor:
        """(C,) of channels -> (I,)."""
        wide = torch.empty(self.columns.numel(), dtype=scales.dtype)
        wide[self.columns] = scales[:, None].expand(self.columns.shape)
        return wide


@dataclass(frozen=True)
class Scaled:
    """What a ScalingPass makes of them.

    Attributes:
        scales: (C,) positive float32: the columns of a channel are multiplied with it, and what makes it is divided.
        weights: (O, I) float32 of every reading layer, its columns scaled.
        notes: facts for the report.
    """

    scales: Tensor
    weights: tuple[Tensor, ...]
    notes: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ScalingPass(Pass):
    """A pass that multiplies the columns of all layers that read a channel, and divides what makes the channel.

    `include` and `exclude` choose layers that read channels; those that share their inputs go together.
    """

    reach: ClassVar[Reach] = "channels"
    accepts: ClassVar[frozenset[str]] = frozenset({"dense"})

    def produces(self, kind: str) -> str:
        return kind

    def check(self) -> Iterator[OptionError]:
        if self.overrides:
            yield OptionError("overrides", "layers that share their inputs share their scales; choose with include")

    def chosen(self, graph: Graph) -> tuple[Channels, ...]:
        """The channels of a model whose readers are all selected."""
        return tuple(c for c in channels_of(graph) if all(self.selects(name, in_block=True) for name in c.readers))

    def run(self, seen: ChannelsSeen) -> Scaled:
        """The scales of some channels, and what the layers that read them become."""
        raise NotImplementedError


__all__ = ["ChannelsSeen", "Scaled", "ScalingPass"]
