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

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args

from compress.encodings.outlier_victim import quantize_dequantize, search
from compress.encodings.power import PowerGrid, fit_exponent, fit_scale, profile
from compress.encodings.rounded_inputs import (
    E4M3,
    affine_steps,
    float_scale,
    on_floats,
    on_steps,
    per_token,
    power_grid,
)
from compress.encodings.stated import made_from
from compress.lazy import function, torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from compress.encodings.base import StoredShapes
    from compress.encodings.outlier_victim import Normal

GridKind = Literal["int", "olive", "power", "fp8"]
Scale = Literal["token", "tensor"]
Criterion = Literal["wina", "teal"]

OLIVE: dict[int, tuple[Normal, ...]] = {4: ("int4", "flint4"), 8: ("int8",)}  # bits -> the types to choose from


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


@dataclass(frozen=True)
class InputGrid(ABC):
    """What a layer makes of its input. The fields after the form are stored, as `input_` and their name.

    Attributes:
        form: what the tensors do not say.
        paired: neighbouring channels are rounded together.
        per_column: there is a number for each column of the weight.
    """

    form: InputForm
    paired: ClassVar[bool] = False
    per_column: ClassVar[bool] = False

    @property
    def static(self) -> bool:
        """Whether it is fixed by calibration."""
        return self.form.static

    @classmethod
    @abstractmethod
    def fit(cls, form: InputForm, low: float, high: float, sample: Tensor) -> Self:
        """The grid that calibration fixes for a form of this kind; see `fit_inputs`."""

    @classmethod
    @abstractmethod
    def stored(cls, columns: int) -> StoredShapes:
        """Shape and type of what is stored, for a weight of so many columns."""

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """What is stored is called."""
        return tuple(f"input_{field.name}" for field in fields(cls)[1:])

    @classmethod
    def knows(cls, form: InputForm) -> bool:
        """Whether a form that a file states is one of this kind, in all that stands in it."""
        return form.bits > 0 and form.normal is None and form.criterion is None and form.skip is None

    @classmethod
    def words(cls, form: InputForm) -> str:
        """What a form is, for reports."""
        return f"{form.grid}{form.bits} per {form.scale}"

    @abstractmethod
    def rounded(self, x: Tensor) -> Tensor:
        """An input (..., C) float32 -> the same, rounded."""

    def tensors(self) -> dict[str, Tensor]:
        """Copies of what is stored: layers with the same inputs may share a grid, files share nothing."""
        return {name: getattr(self, name.removeprefix("input_")).clone() for name in self.names()}

    def apply(self, x: Tensor) -> Tensor:
        """An input (..., C) of any float type, rounded: same shape and type. Gradients pass as if it had not been."""
        if torch.is_grad_enabled() and x.requires_grad:
            passed: Tensor = function(_Straight).apply(x, self)
            return passed
        return self.rounded(x.float()).to(x.dtype)


@dataclass(frozen=True)
class TokenSteps(InputGrid):
    """Even steps over the range of each token, found when it comes."""

    @classmethod
    def fit(cls, form: InputForm, low: float, high: float, sample: Tensor) -> Self:
        return cls(form)

    @classmethod
    def stored(cls, columns: int) -> StoredShapes:
        return {}

    def rounded(self, x: Tensor) -> Tensor:
        return per_token(x, self.form.bits)


@dataclass(frozen=True)
class TensorSteps(InputGrid):
    """Even steps over the range that calibration saw; what lies outside is cut.

    Attributes:
        scale: (1,) float32, positive.
        zero_point: (1,) uint8.
    """

    scale: Tensor
    zero_point: Tensor

    @classmethod
    def fit(cls, form: InputForm, low: float, high: float, sample: Tensor) -> Self:
        return cls(form, *affine_steps(torch.tensor([low]), torch.tensor([high]), form.bits))

    @classmethod
    def stored(cls, columns: int) -> StoredShapes:
        return {"input_scale": ((1,), torch.float32), "input_zero_point": ((1,), torch.uint8)}

    def rounded(self, x: Tensor) -> Tensor:
        return on_steps(x, self.scale.to(x.device), self.zero_point.to(x.device), self.form.bits)


@dataclass(frozen=True)
class TensorPairs(InputGrid):
    """Outlier-victim pairs along the last dimension.

    Attributes:
        scale: (1,) float32, positive.
    """

    scale: Tensor
    paired: ClassVar[bool] = True

    @classmethod
    def fit(cls, form: InputForm, low: float, high: float, sample: Tensor) -> Self:
        found = [(normal, *search(sample, normal, per="tensor")) for normal in OLIVE[form.bits]]
        normal, scale, _ = min(found, key=lambda f: float(f[2]))
        return cls(replace(form, normal=normal), scale.float().view(1))

    @classmethod
    def stored(cls, columns: int) -> StoredShapes:
        return {"input_scale": ((1,), torch.float32)}

    @classmethod
    def knows(cls, form: InputForm) -> bool:
        return form.normal in OLIVE.get(form.bits, ()) and super().knows(replace(form, normal=None))

    @classmethod
    def words(cls, form: InputForm) -> str:
        return f"olive {form.normal or f'{form.bits} bits'} per {form.scale}"

    def rounded(self, x: Tensor) -> Tensor:
        assert self.form.normal is not None
        rows = x.reshape(-1, x.shape[-1])
        return quantize_dequantize(rows, self.scale.to(x.device)[:, None], self.form.normal).view(x.shape)


@dataclass(frozen=True)
class TensorPower(InputGrid):
    """Levels that a power spaces: value = scale * sign(x) * |x|**(1 / exponent), x even from -1 to 1 with one at zero.

    Attributes:
        scale: (1,) float32, positive: the value of the highest level.
        exponent: (1,) float32, positive.
    """

    scale: Tensor
    exponent: Tensor

    @classmethod
    def fit(cls, form: InputForm, low: float, high: float, sample: Tensor) -> Self:
        found = profile(sample, per_tensor=True, norm=2.0)
        exponent, _ = fit_exponent([found], form.bits, "zero", norm=2.0)
        grid = PowerGrid(form.bits, exponent, "zero")
        scale = fit_scale(sample, grid, per_tensor=True, norm=2.0)
        return cls(form, scale.float().view(1), grid.stored_exponent)

    @classmethod
    def stored(cls, columns: int) -> StoredShapes:
        return {"input_scale": ((1,), torch.float32), "input_exponent": ((1,), torch.float32)}

    def rounded(self, x: Tensor) -> Tensor:
        scale, grid = self.scale.to(x.device), power_grid(self.form.bits, float(self.exponent), x.device)
        codes = grid.nearest(x / scale)
        return grid.values.index_select(0, codes.flatten()).view(x.shape) * scale


@dataclass(frozen=True)
class TokenFloats(TokenSteps):
    """E4M3 numbers, by the largest number of each token."""

    @classmethod
    def knows(cls, form: InputForm) -> bool:
        return form.bits == E4M3.bits and super().knows(form)

    def rounded(self, x: Tensor) -> Tensor:
        return on_floats(x, float_scale(x.abs().amax(-1, keepdim=True)))


@dataclass(frozen=True)
class TensorFloats(TokenFloats):
    """E4M3 numbers, by the largest number that calibration saw; what lies outside is cut.

    Attributes:
        scale: (1,) float32, positive.
    """

    scale: Tensor

    @classmethod
    def fit(cls, form: InputForm, low: float, high: float, sample: Tensor) -> Self:
        return cls(form, float_scale(torch.tensor([max(-low, high)])))

    @classmethod
    def stored(cls, columns: int) -> StoredShapes:
        return {"input_scale": ((1,), torch.float32)}

    def rounded(self, x: Tensor) -> Tensor:
        return on_floats(x, self.scale.to(x.device))


@dataclass(frozen=True)
class Threshold(InputGrid):
    """Nothing is rounded: what is no larger than the threshold of its channel is zero, and its column is not needed.

    Attributes:
        threshold: (C,) float32, not negative; infinite for a channel that is always skipped.
    """

    threshold: Tensor
    per_column: ClassVar[bool] = True

    @classmethod
    def fit(cls, form: InputForm, low: float, high: float, sample: Tensor) -> Self:
        return cls.of(form, sample, torch.ones(sample.shape[1], device=sample.device))

    @classmethod
    def of(cls, form: InputForm, sample: Tensor, importance: Tensor) -> Self:
        """One threshold on |x| times the importance of its channel, that the form's share of a sample does not exceed.

        Args:
            form: with the share that is to be skipped.
            sample: (T, C) float32 inputs.
            importance: (C,) float32, not negative.
        """
        assert form.skip is not None
        scores = (sample.abs() * importance).flatten()
        # Between two scores of the sample: at one of them, rounding elsewhere than here would decide.
        last = max(1, round(form.skip * len(scores)))
        ends = [scores.kthvalue(min(place, len(scores))).values for place in (last, last + 1)]
        return cls(form, torch.where(importance > 0, (ends[0] + ends[1]) / 2 / importance, torch.inf))

    @classmethod
    def stored(cls, columns: int) -> StoredShapes:
        return {"input_threshold": ((columns,), torch.float32)}

    @classmethod
    def knows(cls, form: InputForm) -> bool:
        return form.bits == 0 and form.normal is None and form.criterion in get_args(Criterion) and bool(form.skip)

    @classmethod
    def words(cls, form: InputForm) -> str:
        return f"{form.criterion} thresholds that skip {form.skip:.0%}"

    def rounded(self, x: Tensor) -> Tensor:
        return x.masked_fill(x.abs() <= self.threshold.to(x.device), 0.0)  # NaN stays


INPUT_GRIDS: dict[tuple[str, Scale], type[InputGrid]] = {
    ("int", "token"): TokenSteps,
    ("int", "tensor"): TensorSteps,
    ("olive", "tensor"): TensorPairs,
    ("power", "tensor"): TensorPower,
    ("fp8", "token"): TokenFloats,
    ("fp8", "tensor"): TensorFloats,
    ("threshold", "tensor"): Threshold,
}


class _Straight:
    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: InputGrid) -> Tensor:
        return grid.apply(x.detach())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


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
