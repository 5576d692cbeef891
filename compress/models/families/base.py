"""Everything that is known of a kind of model, in one place, found by what a model contains and not by its name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from torch import Tensor, nn

    from compress.models.norms import Norm
    from compress.models.site import Site
    from compress.models.symmetry import Axis, Units
    from compress.models.towers import Tower


class Family(Protocol):
    """A kind of model. Stateless: a model is an argument, and may have its parameters on the meta device."""

    def matches(self, model: nn.Module) -> bool:
        """Whether a model is of this kind."""

    def towers(self, model: nn.Module) -> tuple[Tower, ...]:
        """The lists of its repeated modules, in the order of the model."""

    def sites(self, model: nn.Module) -> Iterator[Site]:
        """The matrices that passes may change, in the order of the model; in no block yet."""

    def axes(self, model: nn.Module, sites: Collection[str]) -> tuple[Axis, ...]:
        """Channels between some sites whose order is free, for passes that work on matrices alone."""

    def symmetry(self, model: nn.Module, tied: Mapping[str, str]) -> Iterator[Units]:
        """What of a model may be put in another order. `tied`: parameter -> the name its value is kept under."""

    def residual(self, model: nn.Module, tied: Mapping[str, str]) -> Iterator[Units]:
        """Channels of its residual stream, where their order is free; see `symmetry`."""

    def norms(self, model: nn.Module) -> Iterator[Norm]:
        """Its norms whose scale may be moved into the layers that read them."""

    def forward(self, model: nn.Module, batch: Tensor) -> Any:
        """Run a model on a batch, as the samples of its data sets are."""
