"""GPTQ: rounding with the error of every column repaired in the columns after it.

Shapes: O rows, I columns, G groups of columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

from annotated_types import Ge, Gt, Le

from compress.encodings import Uniform, fit
from compress.encodings.uniform import narrowest
from compress.errors import SolveError
from compress.lazy import torch
from compress.passes.base import Edit
from compress.passes.quantize.compensated import Way, on_floats, on_super_blocks, refuse_infinite
from compress.passes.quantize.grid import UniformPass
from compress.passes.quantize.rtn import Rtn
from compress.passes.solvers.descent import descend
from compress.passes.solvers.drift import made_up
from compress.passes.solvers.obs import Factor, compensate
from compress.passes.solvers.projections import Rounding

if TYPE_CHECKING:
    from torch import Tensor

    from compress.calibration.statistics import Need
    from compress.encodings import Encoding
    from compress.passes.base import Target


@dataclass(frozen=True, kw_only=True)
class Gptq(UniformPass):
    """Round column by column; each column's rounding error is compensated in the columns still to come.

    Masked weights stay zero and their loss is compensated too. Scales are kept for every group.

    Source: Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative
    Pre-trained Transformers", 2022, arXiv 2210.17323. Differs from the paper in: one Cholesky factor of H instead of
    its inverse (the same numbers, see `passes/solvers/obs.py`); a group that begins inside a tile sees the corrections
    of that tile; weights of dead inputs are rounded, not zeroed; act_order is on by default.

    Args:
        damping: added to the diagonal of the Gram matrix, as a share of its mean.
        act_order: columns with the largest inputs first. Groups keep their places and their scales are fitted
            beforehand (static groups), so the result needs no column index. Without it, scales of a group are fitted to
            the weights as they stand when the group, or the super-block, begins; those of floats always beforehand.
        tile: columns worked on at once; speed only.
        rounds: of coordinate descent over the finished codes (see `passes/solvers/descent.py`), each of which refits
            the scales of even steps first; no round makes the error on the calibration data larger. 0 is GPTQ as
            published.
        propagation: how much of what the layers before it have changed in its inputs a layer makes up for, 0 to 1 (see
            `passes/solvers/drift.py`). Above 0 the original model is run beside the compressed one. Experts, layers
            that blocks share and what lies outside the blocks do not make up for anything.
        scale_search: `weighted` searches the range with the least squared error, every column weighted by the sum of
            squares of its inputs.

    Example:
        >>> import torch, compress
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 8))
        >>> result = compress.apply(model, [compress.Gptq(bits=3)], calibration=torch.randn(16, 64))
        >>> result.weights["0"].encoding.bits
        3
    """

    damping: Annotated[float, Gt(0)] = 0.01
    act_order: bool = True
    tile: Annotated[int, Ge(1)] = 128
    rounds: Annotated[int, Ge(0)] = 0
    propagation: Annotated[float, Ge(0), Le(1)] = 0.0

    key: ClassVar[str] = "gptq"
    weighs_columns: ClassVar[bool] = True

    @property
    def needs(self) -> Need:
        return "gram"

    @property
    def propagates(self) -> bool:
        return self.propagation > 0 or any(o.options.get("propagation") for o in self.overrides)

    def run(self, target: Target) -> Edit:
        statistics = target.statistics
        if statistics is None or statistics.gram is None:
            raise SolveError("no input ever reached this layer")
        rows, columns = target.weight.shape
        other = self.fitting((rows, columns))
        if other is not self:
            return other.run(target)
        weight, drift = target.weight, statistics.drift
        if self.propagates and drift is not None:
            weight = made_up(weight, statistics.gram, drift, self.propagation, self.damping)
        encoding: Encoding
        if self.grid == "int":
            codes, scale, zero, dead = solve(
                weight,
                statistics.gram,
                target.mask,
                bits=self.bits,
                group_size=None if self.departure((rows, columns)) else self.group_size,
                damping=self.damping,
                act_order=self.act_order,
                tile=self.tile,
                rounds=self.rounds,
                grid=self,
            )
            encoding = Uniform(codes, scale, zero, self.bits, self.symmetric)
        elif self.has_super_blocks:
            encoding, dead = on_super_blocks(self, self._way, weight, statistics.gram, target.mask)
        else:
            encoding, dead = on_floats(self, self._way, weight, statistics.gram, target.mask)
        return Edit(encoding=encoding, mask=target.mask, notes={"dead_inputs": dead} if dead else {})

    @property
    def _way(self) -> Way:
        return Way(self.damping, self.act_order, self.tile, self.rounds)

    def stand_in(self) -> Rtn:
        return Rtn(
            bits=self.bits,
            group_size=self.group_size,
            granularity=self.granularity,
            fallback=self.fallback,
            symmetric=self.symmetric,
            grid=self.grid,
            scale_search="mse" if self.scale_search == "weighted" else self.scale_search,
        )


def solve(
    weight: Tensor,
    gram: Tensor,
    mask: Tensor | None = None,
    *,
    bits: int,
    group_size: int | None,
    damping: float,
    act_order: bool,
    tile: int,
    grid: UniformPass,
    rounds: int = 0,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """The algorithm on plain tensors.

    Args:
        weight: (O, I) float32.
        gram: (I, I) float32, sum of x x^T.
        mask: (O, I) bool, True = kept.

    Returns:
        codes (O, I) uint8, scale (R, G), zero point (R, G) uint8, number of dead inputs.

    Raises:
        SolveError: not positive definite, or a result that is not finite.
    """
    rows, columns = weight.shape
    order = torch.argsort(gram.diagonal(), descending=True, stable=True) if act_order else torch.arange(columns)
    factor = Factor(gram, damping, order if act_order else None)
    width = columns if group_size is None else group_size
    importance = gram.diagonal()
    static = act_order or group_size is None
    scale, zero = grid.even_grid(weight, importance) if static else _empty_grid(rows, columns // width)
    scales, zeros = (t.T.float().contiguous() for t in (scale, zero))  # (G, R): a group is contiguous

    def begin(start: int, current: Tensor) -> None:
        own = importance[start : start + width]
        found = fit(current, bits, symmetric=grid.symmetric, search=grid.scale_search, importance=own)
        rounding.put(start // width, found[0][:, 0], found[1][:, 0])

    codes = torch.empty(columns, rows, dtype=torch.uint8)
    kept = None if mask is None else mask.T.contiguous()[order]
    rounding = Rounding(scales, zeros, order // width, 2**bits - 1, kept, codes)
    every = columns if static else width
    lost = compensate(weight, factor, tile=tile, every=every, begin=None if static else begin, project=rounding)
    refuse_infinite(lost)
    if act_order:
        codes = codes[torch.argsort(order)]
    if rounds:
        kept = None if mask is None else mask.T.contiguous()
        rounding = replace(rounding, group=torch.arange(columns) // width, codes=codes, kept=kept)
        descend(weight, gram, damping, rounding, rounds)
    codes = codes.T.contiguous()
    return codes, narrowest(scales.T.contiguous()), zeros.T.to(torch.uint8).contiguous(), factor.num_dead


def _empty_grid(rows: int, groups: int) -> tuple[Tensor, Tensor]:
    return torch.empty(rows, groups), torch.empty(rows, groups)
