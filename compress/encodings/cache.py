"""How keys and values are rounded as they enter a key-value cache: one scale for a layer's keys, one for its values.

| grid  | what becomes of a key or a value                                                                |
|-------|-------------------------------------------------------------------------------------------------|
| `fp8` | the nearest E4M3 number times a scale, by which the largest that calibration saw is 448         |
| `int` | the nearest of 2**bits whole numbers times a scale, by which it is the largest of those above 0 |

What lies outside is cut. Stored beside each attention layer, float32: `k_scale` and `v_scale`, (1,), or one for each
head of keys and values, (H,). Keys are rounded as they are multiplied, behind the rotary embedding.

Shapes: B samples, H heads of keys and values, T tokens, D numbers of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, Self

from compress.encodings.minifloat import MINIFLOATS
from compress.encodings.stated import made_from
from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from compress.encodings.base import StoredShapes

CacheNumbers = Literal["fp8", "int"]
Per = Literal["tensor", "head"]

SCALES = ("k_scale", "v_scale")
WIDTHS: dict[str, tuple[int, ...]] = {"fp8": (8,), "int": (4, 8)}  # grid -> the bits that it may have
E4M3 = MINIFLOATS["e4m3"]


@dataclass(frozen=True, kw_only=True)
class CacheForm:
    """Everything about the rounding of keys and values that its scales do not say; JSON-able.

    Attributes:
        heads: how many scales keys have, and values: 1, or one for each of their heads.
        bits: of a number.
        grid: `fp8` or `int`.
    """

    heads: int
    bits: int = 8
    grid: CacheNumbers = "fp8"

    def __str__(self) -> str:
        """The form in words, for reports."""
        return in_words(self.bits, self.grid, "tensor" if self.heads == 1 else "head")

    @property
    def largest(self) -> float:
        """What the largest number that calibration saw becomes, in units of the scale."""
        return E4M3.largest if self.grid == "fp8" else float(2 ** (self.bits - 1) - 1)

    def tensors(self) -> StoredShapes:
        """Shape and type of what is stored."""
        return dict.fromkeys(SCALES, ((self.heads,), torch.float32))

    def to_json(self) -> dict[str, Any]:
        """What `from_json` takes."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`.

        Raises:
            ValueError: an unknown field or value: the file was written by a newer version.
        """
        form = made_from(cls, data, "a key-value cache")
        if form.bits not in WIDTHS.get(form.grid, ()):
            raise ValueError(f"the grid {dict(data)!r:.200} of a key-value cache is not known to this version")
        return form


def in_words(bits: int, grid: CacheNumbers, per: Per) -> str:
    """How keys and values are rounded, for reports."""
    return f"{grid}{'' if grid == 'fp8' else bits} per {per}"


@dataclass(frozen=True)
class CacheGrid:
    """What a layer makes of its keys and values.

    Attributes:
        form: what the scales do not say.
        k_scale, v_scale: (1,) or (H,) float32, positive.
    """

    form: CacheForm
    k_scale: Tensor
    v_scale: Tensor

    @classmethod
    def fit(cls, keys: Tensor, values: Tensor, bits: int, grid: CacheNumbers, per: Per) -> Self:
        """The grid by which what calibration saw just fits.

        Args:
            keys: (H,) the largest magnitude of each head.
            values: the same.
            bits: of a number.
            grid: `fp8` or `int`.
            per: one scale for the `tensor`, or one for each `head`.
        """
        seen = [each.float().amax(0, keepdim=True) if per == "tensor" else each.float() for each in (keys, values)]
        form = CacheForm(heads=len(seen[0]), bits=bits, grid=grid)
        scales = (each / form.largest for each in seen)
        return cls(form, *(torch.where(s > 0, s, 1.0) for s in scales))  # nothing but zeros: any scale says zero

    def tensors(self) -> dict[str, Tensor]:
        """Copies of what is stored."""
        return {name: getattr(self, name).clone() for name in SCALES}

    def apply(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, T, D) of any float type, rounded; gradients pass as if they had not been."""
        return self._rounded(keys, self.k_scale), self._rounded(values, self.v_scale)

    def _rounded(self, x: Tensor, scale: Tensor) -> Tensor:
        exact, scale = x.detach().float(), scale.to(x.device)[:, None, None]
        if self.form.grid == "fp8":
            near = E4M3.round(exact / scale)
        else:
            near = (exact / scale).round_().clamp_(-self.form.largest - 1, self.form.largest)
        rounded = near.mul_(scale).to(x.dtype)
        return x + (rounded - x).detach() if torch.is_grad_enabled() and x.requires_grad else rounded


__all__ = ["SCALES", "WIDTHS", "CacheForm", "CacheGrid", "CacheNumbers", "Per", "in_words"]
