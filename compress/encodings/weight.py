"""One weight as it is kept: dense, sparse, quantized, or sparse and quantized; and its tensors on disk.

Layout `compress-1`, for a weight of O rows and I columns:

| tensor       | present when         | type, shape                                                                 |
|--------------|----------------------|-----------------------------------------------------------------------------|
| `mask`       | sparse               | uint8 (O, ceil(I/8)), bit = 1 where the weight is kept                       |
| `values`     | sparse, not quantized| the kept values, row after row, (K,)                                         |
| `codes`      | quantized            | uint8 (O, ceil(I*bits/8)); sparse: the K kept codes as one stream            |
| `scale`      | quantized            | float16 or float32 (R, G)                                                    |
| `zero_point` | quantized, affine    | uint8 (R, ceil(G*bits/8)), packed as the codes are                           |

Streams are those of `bits.py`. The mask is stored, never inferred: a kept weight may be zero.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from compress.encodings.bits import pack_bits, row_bytes, unpack_bits
from compress.encodings.uniform import Uniform

LAYOUT = "compress-1"


@dataclass(frozen=True)
class Weight:
    """A weight matrix (O, I).

    Attributes:
        values: (O, I) in its stored type, zero where masked; None when quantized.
        mask: (O, I) bool, True = kept; None when dense.
        encoding: the codes, or None. Codes under a masked position say zero.
    """

    values: Tensor | None = None
    mask: Tensor | None = None
    encoding: Uniform | None = None

    def dequantize(self) -> Tensor:
        """(O, I) float32, exactly zero where masked. May share memory with `values`: not to be written to."""
        if self.encoding is None:
            assert self.values is not None
            return self.values.float()
        dense = self.encoding.dequantize()
        return dense if self.mask is None else dense.masked_fill_(~self.mask, 0.0)

    def rows(self, part: slice) -> "Weight":
        """Some of its rows, sharing memory."""
        e = self.encoding
        if e is not None and e.scale.shape[0] > 1:
            e = replace(e, codes=e.codes[part], scale=e.scale[part], zero_point=e.zero_point[part])
        elif e is not None:
            e = replace(e, codes=e.codes[part])
        values = None if self.values is None else self.values[part]
        return Weight(values, None if self.mask is None else self.mask[part], e)

    @property
    def kind(self) -> str:
        """`dense`, `sparse`, `quantized` or `sparse-quantized`."""
        if self.encoding is None:
            return "dense" if self.mask is None else "sparse"
        return "quantized" if self.mask is None else "sparse-quantized"


@dataclass(frozen=True)
class Spec:
    """Everything about a packed weight that its tensors do not say; JSON-able."""

    shape: tuple[int, int]
    bits: int | None = None
    groups: int = 1
    per_tensor: bool = False
    symmetric: bool = False
    scale_dtype: str = "float16"
    kept: int | None = None  # number of kept weights; None when dense
    value_dtype: str = "float32"
    layout: str = LAYOUT

    def to_json(self) -> dict[str, Any]:
        """Only what differs from the defaults, and the shape and layout."""
        plain = asdict(Spec((0, 0)))
        given = {k: v for k, v in asdict(self).items() if k == "layout" or v != plain[k]}
        return {**given, "shape": list(self.shape)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The inverse of `to_json`.

        Raises:
            ValueError: an unknown layout or field: the file was written by a newer version.
        """
        if data.get("layout") != LAYOUT:
            raise ValueError(f"weight layout {data.get('layout')!r} is not known to this version; it reads {LAYOUT!r}")
        unknown = set(data) - set(cls.__dataclass_fields__)
        if unknown:
            raise ValueError(f"fields {sorted(unknown)} of a packed weight are not known to this version")
        return cls(**{**data, "shape": tuple(data["shape"])})

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of every stored tensor."""
        rows, columns = self.shape
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        if self.kept is not None:
            found["mask"] = ((rows, row_bytes(columns, 1)), torch.uint8)
        if self.bits is None:
            shape: tuple[int, ...] = self.shape if self.kept is None else (self.kept,)
            found["values"] = (shape, getattr(torch, self.value_dtype))
            return found
        if self.kept is None:
            found["codes"] = ((rows, row_bytes(columns, self.bits)), torch.uint8)
        else:
            found["codes"] = ((row_bytes(self.kept, self.bits),), torch.uint8)
        scale_rows = 1 if self.per_tensor else rows
        found["scale"] = ((scale_rows, self.groups), getattr(torch, self.scale_dtype))
        if not self.symmetric:
            found["zero_point"] = ((scale_rows, row_bytes(self.groups, self.bits)), torch.uint8)
        return found

    @property
    def kind(self) -> str:
        """`dense`, `sparse`, `quantized` or `sparse-quantized`."""
        if self.bits is None:
            return "dense" if self.kept is None else "sparse"
        return "quantized" if self.kept is None else "sparse-quantized"

    @property
    def num_bytes(self) -> int:
        """Stored bytes, everything counted."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.tensors().values())


def spec_of(weight: Weight) -> Spec:
    """The spec a weight has when packed."""
    kept = None if weight.mask is None else int(weight.mask.sum())
    e = weight.encoding
    if e is None:
        assert weight.values is not None
        return Spec(_shape(weight.values), kept=kept, value_dtype=str(weight.values.dtype).removeprefix("torch."))
    return Spec(
        _shape(e.codes),
        bits=e.bits,
        groups=e.scale.shape[1],
        per_tensor=e.scale.shape[0] == 1 < e.codes.shape[0],
        symmetric=e.symmetric,
        scale_dtype=str(e.scale.dtype).removeprefix("torch."),
        kept=kept,
    )


def pack(weight: Weight) -> tuple[Spec, dict[str, Tensor]]:
    """A weight -> its spec and its stored tensors."""
    tensors: dict[str, Tensor] = {}
    if weight.mask is not None:
        tensors["mask"] = pack_bits(weight.mask.to(torch.uint8), 1)
    e = weight.encoding
    if e is None:
        assert weight.values is not None
        tensors["values"] = weight.values.contiguous() if weight.mask is None else weight.values[weight.mask]
        return spec_of(weight), tensors
    if weight.mask is None:
        tensors["codes"] = pack_bits(e.codes, e.bits)
    else:
        tensors["codes"] = pack_bits(e.codes[weight.mask][None], e.bits)[0]
    tensors["scale"] = e.scale.contiguous()
    if not e.symmetric:
        tensors["zero_point"] = pack_bits(e.zero_point, e.bits)
    return spec_of(weight), tensors


def unpack(spec: Spec, tensors: dict[str, Tensor]) -> Weight:
    """The inverse of `pack`, on whatever device the tensors are."""
    rows, columns = spec.shape
    mask = None
    if spec.kept is not None:
        mask = unpack_bits(tensors["mask"], 1, columns).bool()
    if spec.bits is None:
        values = tensors["values"]
        if mask is not None:
            values = torch.zeros(spec.shape, dtype=values.dtype, device=values.device).masked_scatter_(mask, values)
        return Weight(values, mask)
    scale = tensors["scale"]
    if spec.symmetric:
        zero = torch.full(scale.shape, 2 ** (spec.bits - 1), dtype=torch.uint8, device=scale.device)
    else:
        zero = unpack_bits(tensors["zero_point"], spec.bits, spec.groups)
    if mask is None:
        codes = unpack_bits(tensors["codes"], spec.bits, columns)
    else:
        assert spec.kept is not None
        kept = unpack_bits(tensors["codes"][None], spec.bits, spec.kept)[0]
        codes = zero.repeat_interleave(columns // spec.groups, dim=1).expand(rows, columns).clone()
        codes.masked_scatter_(mask, kept)
    return Weight(mask=mask, encoding=Uniform(codes, scale, zero, spec.bits, spec.symmetric))


def _shape(values: Tensor) -> tuple[int, int]:
    rows, columns = values.shape
    return rows, columns


__all__ = ["LAYOUT", "Spec", "Weight", "pack", "spec_of", "unpack"]
