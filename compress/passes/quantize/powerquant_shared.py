"""PowerQuant with one exponent for many matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from compress.passes.base import ModelPass, OptionError
from compress.passes.names import block_of
from compress.passes.quantize.powerquant import PowerOptions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compress.encodings.power import PowerGrid
    from compress.passes.base import Edit, Whole


@dataclass(frozen=True, kw_only=True)
class PowerQuantShared(PowerOptions, ModelPass):
    """Round to levels that a power spaces, with one exponent and one layout of levels for all matrices or for a block.

    Otherwise as `PowerQuant`. Every matrix is read twice, one at a time: for the search, and to be rounded.

    Source: Yvinec, Dapogny, Cord and Bailly, "PowerQuant: Automorphism Search for Non-Uniform Quantization", ICLR 2023,
    arXiv 2301.09858. Differs from the paper in: as `PowerQuant`, but with the paper's one exponent for the network.

    Args:
        share: `global` is one exponent for all matrices of the pass; `block` one for each block, which is the layers
            whose names agree up to their first number, such as `model.layers.3`.

    Example:
        >>> import torch, compress
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.Linear(8, 64))
        >>> result = compress.apply(model, [compress.PowerQuantShared(bits=3)])
        >>> len({float(w.encoding.exponent) for w in result.weights.values()})
        1
    """

    share: Literal["global", "block"] = "global"

    key: ClassVar[str] = "powerquant_shared"

    def check(self) -> Iterator[OptionError]:
        yield from super().check()
        if self.overrides:
            yield OptionError(
                "overrides", "layers that share an exponent share all options; use several passes with include, exclude"
            )

    def run(self, model: Whole) -> Iterator[tuple[str, Edit]]:
        names, load = model.names, model.load
        sharing: dict[str, list[str]] = {}
        for name in names:
            sharing.setdefault(self._shared_by(name), []).append(name)
        grids: dict[str, PowerGrid] = {}
        for name in names:
            shared_by = self._shared_by(name)
            if shared_by not in grids:
                grids[shared_by] = self.grid([self.profile(load(n)) for n in sharing[shared_by]])
            yield name, self.nearest(load(name), grids[shared_by])

    def _shared_by(self, name: str) -> str:
        if self.share == "global":
            return ""
        return block_of(name)
