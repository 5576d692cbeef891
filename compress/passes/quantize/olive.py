"""OliVe: outliers kept at the cost of their neighbours.

Shapes: O rows, I columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from annotated_types import Gt

from compress.encodings import OutlierVictim, OutlierVictimForm
from compress.encodings.outlier_victim import PAIR_TYPES, DoubleOutlier, encode, search
from compress.lazy import torch
from compress.passes.base import Edit, OptionError
from compress.passes.quantize.activations import ActivationOptions
from compress.passes.quantize.embeddings import EmbeddingOptions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from compress.encodings.outlier_victim import Normal
    from compress.passes.base import Target


@dataclass(frozen=True, kw_only=True)
class Olive(ActivationOptions, EmbeddingOptions):
    """Round to nearest in outlier-victim pairs, the scale of every row searched.

    A weight too large for the grid of its row is kept in a wider type in its own slot, and its neighbour becomes zero.
    Data-free. Masked weights stay zero, and are the cheapest victims.

    Source: Guo et al., "OliVe: Accelerating Large Language Models via Hardware-friendly Outlier-Victim Pair
    Quantization", ISCA 2023, arXiv 2304.07493. Differs from the paper in: inputs are rounded only where
    `activation_bits` says so; pairs run along the inputs of every layer, and an odd last column is always normal; under
    a mask the search reaches from the row with its zeros to what is kept; matrices are rescued with 8 bits one by one,
    by `overrides` or by their own error, not as the last and the worst of the model. The order of a pair's halves and
    the limit of 2^15 at 8 bits are reconstructions. Where the public code differs, 8 bits are as in the paper (E4M3)
    and double outliers an option.

    Args:
        bits: 4 or 8.
        normal: the type of the weights that are no outliers, at 4 bits: `int4`, `flint4`, or `auto` for the one with
            the lower squared error, chosen for each matrix. At 8 bits it is int8.
        double_outlier: where both of a pair are outliers, the `larger` is kept, as in the paper, or the `even` column,
            as in its public code.
        lower: the search of a row's scale begins here, in multiples of its three-sigma threshold |mean| + 3 deviations;
            the largest normal value is put there.
        upper: where the search ends.
        step: between two candidates.
        rescue_error: a matrix whose relative error ||Q - W|| / ||W|| at 4 bits is above this gets 8 bits; None: never.

    Example:
        >>> import torch, compress
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 8))
        >>> result = compress.apply(model, [compress.Olive(normal="int4")])
        >>> result.weights["0"].encoding.form
        OutlierVictimForm(bits=4, normal='int4', scale_dtype='float16')
    """

    bits: Literal[4, 8] = 4
    normal: Literal["auto", "int4", "flint4"] = "auto"
    double_outlier: DoubleOutlier = "larger"
    lower: Annotated[float, Gt(0)] = 0.75
    upper: float = 2.5
    step: Annotated[float, Gt(0)] = 0.02
    rescue_error: Annotated[float, Gt(0)] | None = None

    key: ClassVar[str] = "olive"

    def check(self) -> Iterator[OptionError]:
        yield from super().check()
        if self.upper <= self.lower:
            yield OptionError("upper", f"{self.upper} is not above lower, {self.lower}")

    def produces(self, kind: str) -> str:
        return "quantized" if kind == "dense" else "sparse-quantized"

    def form(self, shape: tuple[int, int]) -> OutlierVictimForm:
        # Both 4-bit types have the same size; which one it is, and whether it is rescued, only the weights can say.
        return OutlierVictimForm(bits=self.bits, normal=self._types[0])

    def run(self, target: Target) -> Edit:
        weight, mask = target.weight, target.mask
        encoding, error = self._solve(weight, mask, self._types)
        notes: dict[str, float] = {}
        if self.bits == 4 and self.rescue_error is not None and error > self.rescue_error:
            notes["rescued_error"] = error
            encoding, _ = self._solve(weight, mask, ("int8",))
        victims = encoding.codes == PAIR_TYPES[encoding.normal].identifier
        return Edit(encoding=encoding, mask=mask, notes={**notes, "victims": float(victims.float().mean())})

    def stand_in(self) -> Self:
        return self

    @property
    def _types(self) -> tuple[Normal, ...]:
        if self.bits == 8:
            return ("int8",)
        return ("int4", "flint4") if self.normal == "auto" else (self.normal,)

    def _solve(self, weight: Tensor, mask: Tensor | None, types: tuple[Normal, ...]) -> tuple[OutlierVictim, float]:
        return solve(
            weight,
            mask,
            types=types,
            double_outlier=self.double_outlier,
            lower=self.lower,
            upper=self.upper,
            step=self.step,
        )


def solve(
    weight: Tensor,
    mask: Tensor | None = None,
    *,
    types: tuple[Normal, ...],
    double_outlier: DoubleOutlier,
    lower: float,
    upper: float,
    step: float,
) -> tuple[OutlierVictim, float]:
    """The algorithm on plain tensors: search each row's scale in every type, keep the better type, encode.

    Args:
        weight: (O, I) float32, zero where masked.
        mask: (O, I) bool, True = kept.
        types: to choose from; the first of equals wins.

    Returns:
        the encoding, and its relative error.
    """
    found = []
    for normal in types:
        scale, error = search(
            weight, normal, mask=mask, double_outlier=double_outlier, lower=lower, upper=upper, step=step
        )
        found.append((float(error.sum()), normal, scale))
    lost, normal, scale = min(found, key=lambda f: f[0])
    codes = encode(weight, scale, normal, double_outlier)
    size = float(torch.linalg.vector_norm(weight, dtype=torch.float64))
    return OutlierVictim(codes, scale, normal), math.sqrt(lost) / size if size else 0.0
