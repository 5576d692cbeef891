"""The grids of a layer's input, one class each; what they are for stands in `inputs.py`.

Shapes: C channels, the last dimension; an input is (..., C). T tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args

from compress.encodings.minifloat import MINIFLOATS
from compress.encodings.outlier_victim import quantize_dequantize, search
from compress.encodings.power import KEPT_TABLES, PowerGrid, fit_exponent, fit_scale, profile
from compress.lazy import function, torch

if TYPE_CHECKING:
    from torch import Tensor

    from compress.encodings.base import StoredShapes
    from compress.encodings.inputs import InputForm
    from compress.encodings.outlier_victim import Normal

GridKind = Literal["int", "olive", "power", "fp8"]
Scale = Literal["token", "tensor"]
Criterion = Literal["wina", "teal"]

E4M3 = MINIFLOATS["e4m3"]
OLIVE: dict[int, tuple[Normal, ...]] = {4: ("int4", "flint4"), 8: ("int8",)}  # bits -> the types to choose from


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
class TokenFloats(InputGrid):
    """E4M3 numbers, by the largest number of each token."""

    @classmethod
    def fit(cls, form: InputForm, low: float, high: float, sample: Tensor) -> Self:
        return cls(form)

    @classmethod
    def stored(cls, columns: int) -> StoredShapes:
        return {}

    @classmethod
    def knows(cls, form: InputForm) -> bool:
        return form.bits == E4M3.bits and super().knows(form)

    def rounded(self, x: Tensor) -> Tensor:
        return on_floats(x, float_scale(x.abs().amax(-1, keepdim=True)))


@dataclass(frozen=True)
class TensorFloats(InputGrid):
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

    @classmethod
    def knows(cls, form: InputForm) -> bool:
        return form.bits == E4M3.bits and super().knows(form)

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


@lru_cache(maxsize=KEPT_TABLES)
def power_grid(bits: int, exponent: float, device: torch.device) -> PowerGrid:
    """The levels of an exponent on a device, made once and outside of any mode."""
    with torch.inference_mode(False), device:
        made = PowerGrid(bits, exponent, "zero")
        _ = made.values, made.borders
    return made


class _Straight:
    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: InputGrid) -> Tensor:
        return grid.apply(x.detach())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def per_token(x: Tensor, bits: int) -> Tensor:
    """(..., C) float32 -> the same, each token on even steps over its own range."""
    scale, zero_point = affine_steps(x.amin(-1, keepdim=True), x.amax(-1, keepdim=True), bits)
    return on_steps(x, scale, zero_point, bits)


def affine_steps(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The smallest and largest values -> scale float32 and zero point uint8 of the same shape; zero is on the grid."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    scale = torch.where(scale > 0, scale, 1.0)  # nothing but zeros: any scale says zero
    return scale, (-low / scale).round_().clamp_(0, 2**bits - 1).to(torch.uint8)


def on_steps(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """(..., C) float32 -> the nearest of the 2**bits values (code - zero_point) * scale; the inputs are not changed."""
    zero = zero_point.float()
    return (x / scale).round_().add_(zero).clamp_(0, 2**bits - 1).sub_(zero).mul_(scale)


def float_scale(largest: Tensor) -> Tensor:
    """The largest magnitudes -> the scales by which they are the largest E4M3 number, float32 of the same shape."""
    scale = largest.float() / E4M3.largest
    return torch.where(scale > 0, scale, 1.0)  # nothing but zeros: any scale says zero


def on_floats(x: Tensor, scale: Tensor) -> Tensor:
    """(..., C) float32 -> the nearest E4M3 number times its scale; the inputs are not changed."""
    return E4M3.round(x / scale).mul_(scale)
