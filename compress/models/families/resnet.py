"""ResNets: plain networks of convolutions, traced block by block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.models.families.transformers_model import Images
from compress.models.symmetry import is_code_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn

    from compress.models.symmetry import Units


class ResNet(Images):
    """Known by the class of its blocks; channels are free within each."""

    code = ("resnet",)

    def matches(self, model: nn.Module) -> bool:
        return super().matches(model) and any(is_code_of(module, self.code) for module in model.modules())

    def symmetry(self, model: nn.Module, tied: Mapping[str, str]) -> Iterator[Units]:
        from compress.models.tracing import trace  # imports torch.fx

        return (units for tower in self.towers(model) for block in tower.blocks for units in trace(model, block, tied))
