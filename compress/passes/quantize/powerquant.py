"""PowerQuant: levels spaced by a power, its exponent searched without data.

Shapes: O rows, I columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from annotated_types import Ge, Gt, Le

from compress.encodings import PowerForm
from compress.encodings.power import EXPONENTS, PowerGrid, fit_exponent, fit_scale, nearest, profile
from compress.encodings.uniform import SEARCH_NORM, Search
from compress.passes.base import Edit
from compress.passes.quantize.embeddings import EmbeddingOptions
from compress.passes.quantize.grid import GridOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compress.encodings import Power
    from compress.encodings.power import Levels, Profile
    from compress.passes.base import Target


@dataclass(frozen=True, kw_only=True)
class PowerOptions(GridOptions):
    """Rounds to levels that a power spaces.

    Args:
        levels: `zero` has a level at zero and 2**bits - 1 in all; `half` has 2**bits, the smallest half a step on
            either side of zero; `auto` is the layout with the lower error.
        scale_search: `mse` searches the range with the least error; `minmax` puts the highest level at the largest
            magnitude.
        norm: what least error means, for exponent, layout and range: the sum of |error|**norm.
    """

    levels: Literal["auto", "zero", "half"] = "auto"
    scale_search: Search = "mse"
    norm: Annotated[float, Gt(0)] = SEARCH_NORM

    def form(self, shape: tuple[int, int]) -> PowerForm:
        # Both layouts have the same size; which one it is, only the weights can say.
        per_tensor = self.granularity == "tensor"
        levels = "zero" if self.levels == "auto" else self.levels
        return PowerForm(bits=self.bits, groups=self.groups(shape[1]), per_tensor=per_tensor, levels=levels)

    def profile(self, target: Target) -> Profile:
        """What exponent and layout depend on."""
        weight, per_tensor = target.weight, self.granularity == "tensor"
        groups = self.groups(weight.shape[1])
        return profile(weight, groups=groups, per_tensor=per_tensor, mask=target.mask, norm=self.norm)

    def grid(self, profiles: Sequence[Profile], exponent: float | None = None) -> PowerGrid:
        """The grid with the least error for one matrix, or several; with a given exponent, the better layout."""
        return solve(
            profiles,
            self.bits,
            levels=("zero", "half") if self.levels == "auto" else (self.levels,),
            exponent=exponent,
            search=self.scale_search,
            norm=self.norm,
        )

    def encoded(self, target: Target, grid: PowerGrid) -> Power:
        """The whole matrix rounded to nearest on a grid, with scales fitted to it."""
        weight, mask = target.weight, target.mask
        scale = fit_scale(
            weight,
            grid,
            groups=self.groups(weight.shape[1]),
            per_tensor=self.granularity == "tensor",
            mask=mask,
            search=self.scale_search,
            norm=self.norm,
        )
        return nearest(weight, scale, grid, mask)

    def nearest(self, target: Target, grid: PowerGrid) -> Edit:
        """The matrix rounded to nearest on a grid, as an edit."""
        return Edit(encoding=self.encoded(target, grid), mask=target.mask, notes={"exponent": grid.exponent})


@dataclass(frozen=True, kw_only=True)
class PowerQuant(PowerOptions, EmbeddingOptions):
    """Round to levels that a power spaces: denser near zero, where most weights are.

    Data-free. The exponent is the one with the least error of the matrix. Masked weights stay zero and count nowhere.

    Source: Yvinec, Dapogny, Cord and Bailly, "PowerQuant: Automorphism Search for Non-Uniform Quantization", ICLR 2023,
    arXiv 2301.09858. Differs from the paper in: inputs are rounded apart, with an exponent of their own; a weight goes
    to the nearest level, which rounding its power does not always find; an exponent for each matrix, not one for the
    network (see `PowerQuantShared`); ranges are searched too; `half` levels; golden section instead of Nelder-Mead. The
    norm, and scale groups smaller than a matrix, are reconstructions.

    Args:
        exponent: from 0.1 to 1.5; below 1 levels are denser near zero, at 1 they are evenly spaced. None: searched.

    Example:
        >>> import torch, compress
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 8))
        >>> result = compress.apply(model, [compress.PowerQuant(bits=3, levels="half")])
        >>> result.weights["0"].encoding.form
        PowerForm(bits=3, groups=1, per_tensor=False, levels='half', scale_dtype='float16')
    """

    exponent: Annotated[float, Ge(EXPONENTS[0]), Le(EXPONENTS[-1])] | None = None

    key: ClassVar[str] = "powerquant"

    def run(self, target: Target) -> Edit:
        return self.nearest(target, self.grid([self.profile(target)], self.exponent))

    def stand_in(self) -> Self:
        return self


def solve(
    profiles: Sequence[Profile],
    bits: int,
    *,
    levels: Sequence[Levels] = ("zero", "half"),
    exponent: float | None = None,
    search: Search = "mse",
    norm: float = SEARCH_NORM,
) -> PowerGrid:
    """The algorithm: the exponent and the layout with the least sum, over weights, of ||W - rounded W||_norm.

    Args:
        profiles: of the (O, I) weights that will have this grid, made with the same norm.
        bits: 2 to 8.
        levels: layouts to choose from; of equals, the first.
        exponent: a given one; None searches it.
        search: whether ranges will be searched too (`mse`) or be the largest magnitudes (`minmax`).
        norm: positive.
    """
    found = []
    for layout in levels:
        best, error = fit_exponent(profiles, bits, layout, exponent=exponent, search=search, norm=norm)
        found.append((error, PowerGrid(bits, best, layout)))
    return min(found, key=lambda f: f[0])[1]
