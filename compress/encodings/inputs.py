"""The grid that the input of a layer is rounded to while the layer runs: kept beside its weight.

| grid    | scale    | what is rounded to                                                                        |
|---------|----------|-------------------------------------------------------------------------------------------|
| `int`   | `token`  | 2**bits even steps over the range of each token, found when the token comes: dynamic      |
| `int`   | `tensor` | 2**bits even steps over the range that calibration saw; what lies outside is cut: static  |
| `olive` | `tensor` | outlier-victim pairs along the last dimension, the scale from calibration: static         |
| `power` | `tensor` | 2**bits - 1 levels that a power spaces, exponent and scale from calibration: static       |

Zero is on every grid. Stored, for static ones only: `input_scale` float32 (1,), for `int` `input_zero_point` uint8
(1,), for `power` `input_exponent` float32 (1,). Values are rounded in float32 and given back in the type they came in,
as a reference for integer arithmetic.

Source: affine ranges as in Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", 2017, arXiv 1712.05877; one dynamic range per token as in Yao et al., "ZeroQuant",
2022, arXiv 2206.01861; pairs as in Guo et al., "OliVe", ISCA 2023, arXiv 2304.07493; powers as in Yvinec et al.,
"PowerQuant", ICLR 2023, arXiv 2301.09858. Differs from the paper in: OliVe's and PowerQuant's unsigned types for inputs
without negative values are left out; a power grid's inputs have an exponent of their own.

Shapes: C channels, the last dimension; an input is (..., C). T tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from compress.encodings.outlier_victim import quantize_dequantize, search
from compress.encodings.power import KEPT_TABLES, PowerGrid, fit_exponent, fit_scale, profile
from compress.encodings.stated import made_from
from compress.lazy import function, torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from compress.encodings.base import StoredShapes
    from compress.encodings.outlier_victim import Normal

GridKind = Literal["int", "olive", "power"]
Scale = Literal["token", "tensor"]

OLIVE: dict[int, tuple[Normal, ...]] = {4: ("int4", "flint4"), 8: ("int8",)}  # bits -> the types to choose from


@dataclass(frozen=True, kw_only=True)
class InputForm:
    """Everything about an input's grid that its stored tensors do not say; JSON-able.

    Attributes:
        bits: of a value, 2 to 8; on the olive grid 4 or 8.
        grid: `int`, `olive` or `power`.
        scale: of each `token`, or one for the `tensor`.
        normal: the normal type of the olive grid, once calibration has chosen it.
    """

    bits: int
    grid: GridKind = "int"
    scale: Scale = "token"
    normal: Normal | None = None

    @property
    def static(self) -> bool:
        """Whether the grid is fixed by calibration."""
        return self.scale == "tensor"

    def __str__(self) -> str:
        """The form in words, for reports."""
        return f"{self.kind.words(self)} per {self.scale}"

    @property
    def kind(self) -> type[InputGrid]:
        """What rounds."""
        return INPUT_GRIDS[self.grid, self.scale]

    def tensors(self) -> StoredShapes:
        """Shape and type of what is stored."""
        return self.kind.stored()

    def input_grid(self, tensors: Mapping[str, Tensor]) -> InputGrid:
        """The inverse of `InputGrid.tensors`; others among the tensors are left alone."""
        return self.kind(self, *(tensors[name] for name in self.tensors()))

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
        if (form.grid, form.scale) not in INPUT_GRIDS or form.normal not in form.kind.normals(form.bits):
            raise ValueError(f"the grid {dict(data)!r:.200} of an input is not known to this version")
        return form


@dataclass(frozen=True)
class InputGrid(ABC):
    """How a layer rounds its input. The fields after the form are stored, as `input_` and their name.

    Attributes:
        form: what the tensors do not say.
        paired: neighbouring channels are rounded together.
    """

    form: InputForm
    paired: ClassVar[bool] = False

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
    def stored(cls) -> StoredShapes:
        """Shape and type of what is stored."""

    @classmethod
    def normals(cls, bits: int) -> tuple[Normal | None, ...]:
        """The normal types that a form of so many bits may have."""
        return (None,)

    @classmethod
    def words(cls, form: InputForm) -> str:
        """What a form is, without its scale."""
        return f"int{form.bits}"

    @abstractmethod
    def rounded(self, x: Tensor) -> Tensor:
        """An input (..., C) float32 -> the same, rounded."""

    def tensors(self) -> dict[str, Tensor]:
        """Copies of what is stored: layers with the same inputs may share a grid, files share nothing."""
        return {name: getattr(self, name.removeprefix("input_")).clone() for name in self.stored()}

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
    def stored(cls) -> StoredShapes:
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
    def stored(cls) -> StoredShapes:
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
    def stored(cls) -> StoredShapes:
        return {"input_scale": ((1,), torch.float32)}

    @classmethod
    def normals(cls, bits: int) -> tuple[Normal | None, ...]:
        return OLIVE.get(bits, ())

    @classmethod
    def words(cls, form: InputForm) -> str:
        return f"olive {form.normal or f'{form.bits} bits'}"

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
    def stored(cls) -> StoredShapes:
        return {"input_scale": ((1,), torch.float32), "input_exponent": ((1,), torch.float32)}

    @classmethod
    def words(cls, form: InputForm) -> str:
        return f"power{form.bits}"

    def rounded(self, x: Tensor) -> Tensor:
        scale, grid = self.scale.to(x.device), power_grid(self.form.bits, float(self.exponent), x.device)
        codes = grid.nearest(x / scale)
        return grid.values.index_select(0, codes.flatten()).view(x.shape) * scale


@lru_cache(maxsize=KEPT_TABLES)
def power_grid(bits: int, exponent: float, device: torch.device) -> PowerGrid:
    """The levels of an exponent on a device, made once and outside of any mode."""
    with torch.inference_mode(False), device:
        made = PowerGrid(bits, exponent, "zero")
        _ = made.values, made.borders
    return made


INPUT_GRIDS: dict[tuple[GridKind, Scale], type[InputGrid]] = {
    ("int", "token"): TokenSteps,
    ("int", "tensor"): TensorSteps,
    ("olive", "tensor"): TensorPairs,
    ("power", "tensor"): TensorPower,
}


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
