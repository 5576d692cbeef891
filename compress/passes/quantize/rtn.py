"""Round to nearest: no data, no compensation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from compress.passes.base import Edit
from compress.passes.quantize.grid import UniformPass

if TYPE_CHECKING:
    from compress.passes.base import Target


@dataclass(frozen=True, kw_only=True)
class Rtn(UniformPass):
    """Round every weight to the nearest point of its grid.

    Data-free and fast; the baseline of every other quantizer. Masked weights stay zero: zero is always on the grid.

    Source: folklore; ranges and the mse search as in Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ", 2022, arXiv
    2210.17323 (public code); floats as in `encodings/floats.py`.

    Example:
        >>> import torch, compress
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 8))
        >>> result = compress.apply(model, [compress.Rtn(bits=4, group_size=32)])
        >>> result.weights["0"].kind
        'quantized'
    """

    key: ClassVar[str] = "rtn"

    def run(self, target: Target) -> Edit:
        return Edit(encoding=self.nearest(target.weight), mask=target.mask)

    def stand_in(self) -> Self:
        return self
