"""What becomes of the input of a layer while the layer runs, a grid or a threshold: kept beside its weight.

| grid        | scale    | what becomes of an input                                                                  |
|-------------|----------|-------------------------------------------------------------------------------------------|
| `int`       | `token`  | 2**bits even steps over the range of each token, found when the token comes: dynamic      |
| `int`       | `tensor` | 2**bits even steps over the range that calibration saw; what lies outside is cut: static  |
| `olive`     | `tensor` | outlier-victim pairs along the last dimension, the scale from calibration: static         |
| `power`     | `tensor` | 2**bits - 1 levels that a power spaces, exponent and scale from calibration: static       |
| `fp8`       | `token`  | an E4M3 number times a scale by which the token's largest number is 448: dynamic          |
| `fp8`       | `tensor` | the same with one scale, by which the largest number that calibration saw is: static      |
| `threshold` | `tensor` | zero where it is no larger than the threshold of its channel, else as it is: static       |

Zero is on every grid. Stored, for static ones only: `input_scale` float32 (1,), for `int` `input_zero_point` uint8
(1,), for `power` `input_exponent` float32 (1,), for `threshold` nothing but `input_threshold` float32 (C,). Values are
rounded in float32 and given back in the type they came in, as a reference for integer arithmetic.

Source: affine ranges as in Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", 2017, arXiv 1712.05877; one dynamic range per token as in Yao et al., "ZeroQuant",
2022, arXiv 2206.01861; pairs as in Guo et al., "OliVe", ISCA 2023, arXiv 2304.07493; powers as in Yvinec et al.,
"PowerQuant", ICLR 2023, arXiv 2301.09858; E4M3 as in Micikevicius et al., "FP8 Formats for Deep Learning", 2022, arXiv
2209.05433; thresholds as in Liu et al., "TEAL", 2024, arXiv 2408.14690. Differs from the paper in: OliVe's and
PowerQuant's unsigned types for inputs without negative values are left out; a power grid's inputs have an exponent of
their own.

Shapes: C channels, the last dimension; an input is (..., C). T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, Self

from compress.encodings.input_grids import (
    TensorFloats,
    TensorPairs,
    TensorPower,
    TensorSteps,
    Threshold,
    TokenFloats,
    TokenSteps,
)
from compress.encodings.stated import made_from

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from compress.encodings.base import StoredShapes
    from compress.encodings.input_grids import (
        Criterion,
        GridKind,
        InputGrid,
        Scale,
    )
    from compress.encodings.outlier_victim import Normal

INPUT_GRIDS: dict[tuple[str, Scale], type[InputGrid]] = {
    ("int", "token"): TokenSteps,
    ("int", "tensor"): TensorSteps,
    ("olive", "tensor"): TensorPairs,
    ("power", "tensor"): TensorPower,
    ("fp8", "token"): TokenFloats,
    ("fp8", "tensor"): TensorFloats,
    ("threshold", "tensor"): Threshold,
}


@dataclass(frozen=True, kw_only=True)
class InputForm:
    """Everything about an input's grid that its stored tensors do not say; JSON-able.

    Attributes:
        bits: of a value, 2 to 8; on the olive grid 4 or 8, as floats 8. 0 where nothing is rounded.
        grid: `int`, `olive`, `power` or `fp8`; or `threshold`.
        scale: of each `token`, or one for the `tensor`.
        normal: the normal type of the olive grid, once calibration has chosen it.
        criterion: that thresholds were set by.
        skip: the share of the inputs that thresholds were set to skip.
    """

    bits: int = 0
    grid: GridKind | Literal["threshold"] = "int"
    scale: Scale = "token"
    normal: Normal | None = None
    criterion: Criterion | None = None
    skip: float | None = None

    @property
    def static(self) -> bool:
        """Whether the grid is fixed by calibration."""
        return self.scale == "tensor"

    def __str__(self) -> str:
        """The form in words, for reports."""
        return self.kind.words(self)

    @property
    def kind(self) -> type[InputGrid]:
        """What rounds."""
        return INPUT_GRIDS[self.grid, self.scale]

    def tensors(self, columns: int) -> StoredShapes:
        """Shape and type of what is stored, for a weight of so many columns."""
        return self.kind.stored(columns)

    def input_grid(self, tensors: Mapping[str, Tensor]) -> InputGrid:
        """The inverse of `InputGrid.tensors`; others among the tensors are left alone."""
        return self.kind(self, *(tensors[name] for name in self.kind.names()))

    def to_json(self) -> dict[str, Any]:
        """Only what differs from the defaults."""
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) != f.default}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`.

        Raises:
            ValueError: an unknown field or value: the file was written by a newer version.
        """
        form = made_from(cls, data, "an input's grid")
        if (form.grid, form.scale) not in INPUT_GRIDS or not form.kind.knows(form):
            raise ValueError(f"the grid {dict(data)!r:.200} of an input is not known to this version")
        return form


def fit_inputs(form: InputForm, low: float, high: float, sample: Tensor) -> InputGrid:
    """The grid that calibration fixes.

    Args:
        form: what is asked for.
        low: the smallest value seen,
        high: the largest.
        sample: (T, C) float32, some of the inputs: the olive grid takes the type and scale with the least squared error
            on them.
    """
    return form.kind.fit(form, low, high, sample)
