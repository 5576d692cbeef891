"""The grid that the input of a layer is rounded to while the layer runs: kept beside its weight.

| grid    | scale    | what is rounded to                                                                        |
|---------|----------|-------------------------------------------------------------------------------------------|
| `int`   | `token`  | 2**bits even steps over the range of each token, found when the token comes: dynamic      |
| `int`   | `tensor` | 2**bits even steps over the range that calibration saw; what lies outside is cut: static  |
| `olive` | `tensor` | outlier-victim pairs along the last dimension, the scale from calibration: static         |

Zero is on every grid. Stored, for static ones only: `input_scale` float32 (1,), and for `int` `input_zero_point` uint8
(1,). Values are rounded in float32 and given back in the type they came in, as a reference for integer arithmetic.

Source: affine ranges as in Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", 2017, arXiv 1712.05877; one dynamic range a token as in Yao et al., "ZeroQuant",
2022, arXiv 2206.01861; pairs as in Guo et al., "OliVe", ISCA 2023, arXiv 2304.07493. Differs from the paper in: OliVe's
unsigned types for inputs without negative values are left out.

Shapes: C channels, the last dimension; an input is (..., C). T tokens.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from compress.encodings.outlier_victim import quantize_dequantize, search
from compress.lazy import function, torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from compress.encodings.base import Stored
    from compress.encodings.outlier_victim import Normal

Grid = Literal["int", "olive"]
Scale = Literal["token", "tensor"]

OLIVE: dict[int, tuple[Normal, ...]] = {4: ("int4", "flint4"), 8: ("int8",)}  # bits -> the types to choose from


@dataclass(frozen=True, kw_only=True)
class InputForm:
    """Everything about an input's grid that its stored tensors do not say; JSON-able.

    Attributes:
        bits: of a value, 2 to 8; on the olive grid 4 or 8.
        grid: `int` or `olive`.
        scale: of each `token`, or one for the `tensor`.
        normal: the normal type of the olive grid, once calibration has chosen it.
    """

    bits: int
    grid: Grid = "int"
    scale: Scale = "token"
    normal: Normal | None = None

    @property
    def static(self) -> bool:
        """Whether the grid is fixed by calibration."""
        return self.scale == "tensor"

    def __str__(self) -> str:
        """In words, for reports."""
        kind = f"int{self.bits}" if self.grid == "int" else f"olive {self.normal or f'{self.bits} bits'}"
        return f"{kind} per {self.scale}"

    def tensors(self) -> Stored:
        """Shape and type of what is stored."""
        if not self.static:
            return {}
        scale: Stored = {"input_scale": ((1,), torch.float32)}
        return scale if self.grid == "olive" else scale | {"input_zero_point": ((1,), torch.uint8)}

    def inputs(self, tensors: Mapping[str, Tensor]) -> Inputs:
        """The inverse of `Inputs.tensors`; others among the tensors are left alone."""
        return Inputs(self, tensors.get("input_scale"), tensors.get("input_zero_point"))

    def to_json(self) -> dict[str, Any]:
        """Only what differs from the defaults."""
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) != f.default}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`.

        Raises:
            ValueError: an unknown field or value: the file was written by a newer version.
        """
        known = {f.name for f in fields(cls)}
        if set(data) - known:
            raise ValueError(f"fields {sorted(set(data) - known)} of an input's grid are not known to this version")
        if {f.name for f in fields(cls) if f.default is MISSING} - set(data):
            raise ValueError("the bits of an input's grid are missing")
        form = cls(**data)
        olive = form.grid == "olive" and form.static and form.normal in OLIVE.get(form.bits, ())
        if not (olive or (form.grid == "int" and form.scale in get_args(Scale) and form.normal is None)):
            raise ValueError(f"the grid {dict(data)} of an input is not known to this version")
        return form


@dataclass(frozen=True)
class Inputs:
    """The grid of a layer's input.

    Attributes:
        form: what the tensors do not say.
        scale: (1,) float32, positive; None when dynamic.
        zero_point: (1,) uint8; None when dynamic or on the olive grid.
    """

    form: InputForm
    scale: Tensor | None = None
    zero_point: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, as tensors of their own: layers fed alike may share a grid, files share nothing."""
        found = {"input_scale": self.scale, "input_zero_point": self.zero_point}
        return {name: value.clone() for name, value in found.items() if value is not None}

    def apply(self, x: Tensor) -> Tensor:
        """An input (..., C) of any float type, rounded: same shape and type. Gradients pass as if it had not been."""
        if torch.is_grad_enabled() and x.requires_grad:
            passed: Tensor = function(_Straight).apply(x, self)
            return passed
        wide = x.float()
        if self.scale is None:
            return per_token(wide, self.form.bits).to(x.dtype)
        scale = self.scale.to(x.device)
        if self.form.grid == "int":
            assert self.zero_point is not None
            return on_steps(wide, scale, self.zero_point.to(x.device), self.form.bits).to(x.dtype)
        assert self.form.normal is not None
        rows = wide.reshape(-1, x.shape[-1])
        return quantize_dequantize(rows, scale[:, None], self.form.normal).view(x.shape).to(x.dtype)


class _Straight:
    @staticmethod
    def forward(ctx: Any, x: Tensor, inputs: Inputs) -> Tensor:
        return inputs.apply(x.detach())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def per_token(x: Tensor, bits: int) -> Tensor:
    """(..., C) float32 -> the same, each token on even steps over its own range."""
    scale, zero_point = steps(x.amin(-1, keepdim=True), x.amax(-1, keepdim=True), bits)
    return on_steps(x, scale, zero_point, bits)


def steps(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The smallest and largest values -> scale float32 and zero point uint8 of the same shape; zero is on the grid."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    scale = torch.where(scale > 0, scale, 1.0)  # nothing but zeros: any scale says zero
    return scale, (-low / scale).round_().clamp_(0, 2**bits - 1).to(torch.uint8)


def on_steps(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """(..., C) float32 -> the nearest of the 2**bits values (code - zero_point) * scale; the inputs are not changed."""
    zero = zero_point.float()
    return (x / scale).round_().add_(zero).clamp_(0, 2**bits - 1).sub_(zero).mul_(scale)


def fit_inputs(form: InputForm, low: float, high: float, sample: Tensor) -> Inputs:
    """The grid that calibration fixes.

    Args:
        form: what is asked for.
        low: the smallest value seen,
        high: the largest.
        sample: (T, C) float32, some of the inputs: the olive grid takes the type and scale with the least squared error
            on them.
    """
    if not form.static:
        return Inputs(form)
    if form.grid == "int":
        return Inputs(form, *steps(torch.tensor([low]), torch.tensor([high]), form.bits))
    found = [(normal, *search(sample, normal, per="tensor")) for normal in OLIVE[form.bits]]
    normal, scale, _ = min(found, key=lambda f: float(f[2]))
    return Inputs(replace(form, normal=normal), scale.float().view(1))
