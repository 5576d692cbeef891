"""A low-rank correction beside a weight: value = base + B A, never folded into packed or masked codes; or B A alone.

Shapes: O = out features, I = in features, r = rank.

| tensor                                    | when             | type and shape                                    |
|-------------------------------------------|------------------|---------------------------------------------------|
| `lora_a`, `lora_b`                        | values           | float16 or float32, (r, I) and (O, r)             |
| `lora_a_codes`, `lora_a_scale`, and of b  | quantized        | codes and scales of a symmetric `uniform`         |
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Self

from compress.encodings.bits import pack_bits, row_bytes, unpack_bits
from compress.encodings.stated import made_from
from compress.encodings.uniform import UniformForm
from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from compress.encodings.base import StoredShapes
    from compress.encodings.uniform import Uniform

SIDES = ("a", "b")


@dataclass(frozen=True, kw_only=True)
class LowRankForm:
    """Everything about a correction that its tensors do not say; JSON-able.

    Attributes:
        rank: columns of B and rows of A.
        bits: of a code of either factor; None where values are stored.
        a_groups: groups of columns of A that share a scale, where it is quantized.
        a_dtype, b_dtype: of the values, or of the scales.
    """

    rank: int
    bits: int | None = None
    a_groups: int = 1
    a_dtype: str = "float16"
    b_dtype: str = "float16"

    def shapes(self, shape: tuple[int, int]) -> dict[str, tuple[int, int]]:
        """The shapes of A and of B."""
        return {"a": (self.rank, shape[1]), "b": (shape[0], self.rank)}

    def tensors(self, shape: tuple[int, int]) -> StoredShapes:
        """Shape and type of what is stored for an (out, in) weight."""
        found: StoredShapes = {}
        for side, (rows, columns) in self.shapes(shape).items():
            form = self.factor_form(side)
            if form is None:
                found[f"lora_{side}"] = ((rows, columns), getattr(torch, getattr(self, f"{side}_dtype")))
                continue
            found[f"lora_{side}_codes"] = ((rows, row_bytes(columns, form.bits)), torch.uint8)
            tables = form.tables((rows, columns))
            found.update({f"lora_{side}_{leaf}": entry for leaf, entry in tables.items()})
        return found

    def low_rank(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> LowRankFactors:
        """The inverse of `LowRankFactors.tensors`; others among the tensors are left alone."""
        made: dict[str, Tensor | Uniform] = {}
        for side, (_, columns) in self.shapes(shape).items():
            form = self.factor_form(side)
            if form is None:
                made[side] = tensors[f"lora_{side}"]
                continue
            prefix = f"lora_{side}_"
            tables = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            made[side] = form.encoding(unpack_bits(tables.pop("codes"), form.bits, columns), tables)
        return LowRankFactors(**made)

    def factor_form(self, side: str) -> UniformForm | None:
        """What codes of one factor mean; None where values are stored."""
        if self.bits is None:
            return None
        groups = self.a_groups if side == "a" else 1
        dtype: str = getattr(self, f"{side}_dtype")
        return UniformForm(bits=self.bits, groups=groups, symmetric=True, scale_dtype=dtype)

    def to_json(self) -> dict[str, Any]:
        """Only what differs from the defaults."""
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) != f.default}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`.

        Raises:
            ValueError: an unknown field: the file was written by a newer version.
        """
        return made_from(cls, data, "a low-rank correction")


@dataclass(frozen=True)
class LowRankFactors:
    """Two thin factors.

    Attributes:
        a: (r, I), values in their stored type or codes.
        b: (O, r), the same.
    """

    a: Tensor | Uniform
    b: Tensor | Uniform

    @property
    def form(self) -> LowRankForm:
        """What the tensors do not say."""
        bits = None if isinstance(self.a, torch.Tensor) else self.a.bits
        groups = 1 if isinstance(self.a, torch.Tensor) else self.a.form.groups
        kept_in = ((f if isinstance(f, torch.Tensor) else f.scale).dtype for f in (self.a, self.b))
        a_dtype, b_dtype = (str(dtype).removeprefix("torch.") for dtype in kept_in)
        return LowRankForm(rank=self.rank, bits=bits, a_groups=groups, a_dtype=a_dtype, b_dtype=b_dtype)

    @property
    def rank(self) -> int:
        """Columns of B and rows of A."""
        return len(_numbers(self.a))

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I), of the product."""
        a, b = _numbers(self.a), _numbers(self.b)
        return len(b), a.shape[1]

    @property
    def device(self) -> torch.device:
        """The device of the factors."""
        return _numbers(self.b).device

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, I) and B (O, r), float32."""
        a, b = (f.float() if isinstance(f, torch.Tensor) else f.dequantize() for f in (self.a, self.b))
        return a, b

    def product(self) -> Tensor:
        """B A, (O, I) float32."""
        a, b = self.factors()
        return b @ a

    def rows(self, part: slice) -> LowRankFactors:
        """The factors of some rows of the weight, sharing memory."""
        return LowRankFactors(self.a, self.b[part] if isinstance(self.b, torch.Tensor) else self.b.rows(part))

    def tensors(self) -> dict[str, Tensor]:
        """What is stored."""
        found: dict[str, Tensor] = {}
        for side in SIDES:
            factor: Tensor | Uniform = getattr(self, side)
            if isinstance(factor, torch.Tensor):
                found[f"lora_{side}"] = factor.contiguous()
            else:
                found[f"lora_{side}_codes"] = pack_bits(factor.codes, factor.bits)
                found.update({f"lora_{side}_{leaf}": t for leaf, t in factor.tables().items()})
        return found

    def defect(self, shape: tuple[int, int]) -> str | None:
        """What is impossible about it beside an (out, in) weight, or None."""
        for side, wanted in self.form.shapes(shape).items():
            factor: Tensor | Uniform = getattr(self, side)
            found = tuple(_numbers(factor).shape)
            if found != wanted:
                return f"a factor {side} of shape {found}, not {wanted}"
            if isinstance(factor, torch.Tensor):
                if not torch.isfinite(factor).all():
                    return f"a factor {side} that is not finite"
            elif factor.defect():
                return f"a factor {side} with {factor.defect()}"
        return None


def _numbers(factor: Tensor | Uniform) -> Tensor:
    """The values of a factor, or its codes."""
    return factor if isinstance(factor, torch.Tensor) else factor.codes
