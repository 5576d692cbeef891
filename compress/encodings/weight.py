"""One weight as it is kept: dense, sparse, quantized, sparse and quantized, or two factors; its tensors on disk.

Layout `compress-1`, for a weight of O rows and I columns:

| tensor    | present when          | type, shape                                                         |
|-----------|-----------------------|---------------------------------------------------------------------|
| `mask`    | sparse                | uint8 (O, ceil(I/8)), bit = 1 where the weight is kept              |
| `pattern` | N of every M kept     | uint8 (O, B), in place of `mask`: see `pattern.py`                  |
| `values`  | sparse, not quantized | the kept values, row after row, (K,)                                |
| `codes`   | quantized             | uint8 (O, ceil(I*bits/8)); sparse: the K kept codes as one stream   |
| tables    | quantized             | what the family needs beside its codes: see `tables` of each `Form` |

How the layer rounds its input, and a low-rank correction, stand beside them: see `inputs.py` and `low_rank.py`. A
weight that is nothing but its factors has none of these.

Streams are those of `bits.py`. The mask is stored, never inferred: a kept weight may be zero. A pattern is found in the
mask itself, whoever made it. A bitmap of such a mask is read too.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Self

from compress.encodings.bits import pack_bits, row_bytes, unpack_bits
from compress.encodings.codebook import CodebookForm
from compress.encodings.floats import FloatForm
from compress.encodings.inputs import InputForm
from compress.encodings.low_rank import LowRankForm
from compress.encodings.outlier_victim import OutlierVictimForm
from compress.encodings.pattern import Pattern, find_pattern
from compress.encodings.power import PowerForm
from compress.encodings.stated import DTYPES, divides, made_from, whole
from compress.encodings.super_blocks import SuperBlockForm
from compress.encodings.uniform import UniformForm
from compress.lazy import functional, torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from compress.encodings.base import Encoding, Form, StoredShapes
    from compress.encodings.inputs import InputGrid
    from compress.encodings.low_rank import LowRankFactors

LAYOUT = "compress-1"
FACTORED = "low-rank"  # the kind of a weight that is nothing but its factors
FORMS: dict[str, type[Form]] = {
    form.family: form for form in (UniformForm, OutlierVictimForm, CodebookForm, PowerForm, FloatForm, SuperBlockForm)
}


@dataclass(frozen=True)
class Weight:
    """A weight matrix (O, I).

    Attributes:
        values: (O, I) in its stored type, zero where masked; None when quantized, or when factors are all there is.
        mask: (O, I) bool, True = kept; None when dense.
        encoding: the codes, or None. Codes under a masked position are the encoding's idle ones.
        inputs: what becomes of what it is multiplied with: the grid that it is rounded to, or thresholds; or None.
        low_rank: a correction added to all of it, or all of it; or None.
    """

    values: Tensor | None = None
    mask: Tensor | None = None
    encoding: Encoding | None = None
    inputs: InputGrid | None = None
    low_rank: LowRankFactors | None = None

    def dequantize(self) -> Tensor:
        """(O, I) float32 of all of it. May share memory with `values`: not to be written to."""
        if self.low_rank is None:
            return self.base()
        return self.low_rank.product() if self.factored else self.base() + self.low_rank.product()

    def base(self) -> Tensor:
        """(O, I) float32 without the correction, exactly zero where masked; as `dequantize` otherwise."""
        if self.encoding is None:
            if self.factored:
                assert self.low_rank is not None
                return torch.zeros(self.low_rank.shape, device=self.low_rank.device)
            assert self.values is not None
            return self.values.float()
        dense = self.encoding.dequantize()
        return dense if self.mask is None else dense.masked_fill_(~self.mask, 0.0)

    def rows(self, part: slice) -> Weight:
        """Some of its rows, sharing memory."""
        return Weight(
            None if self.values is None else self.values[part],
            None if self.mask is None else self.mask[part],
            None if self.encoding is None else self.encoding.rows(part),
            self.inputs,
            None if self.low_rank is None else self.low_rank.rows(part),
        )

    @property
    def factored(self) -> bool:
        """Whether its factors are all there is."""
        return self.values is None and self.encoding is None

    @property
    def kind(self) -> str:
        """`dense`, `sparse`, `quantized` or `sparse-quantized`, with `-compensated` if corrected; or `low-rank`."""
        if self.factored:
            return FACTORED
        return _kind(self.encoding is not None, self.mask is not None, self.low_rank is not None)


def _kind(quantized: bool, sparse: bool, corrected: bool) -> str:
    base = ("sparse-quantized" if sparse else "quantized") if quantized else "sparse" if sparse else "dense"
    return f"{base}-compensated" if corrected else base


@dataclass(frozen=True)
class Spec:
    """Everything about a packed weight that its tensors do not say; JSON-able."""

    shape: tuple[int, int]
    form: Form | None = None  # of its codes; None when not quantized
    kept: int | None = None  # number of kept weights; None when dense
    value_dtype: str | None = "float32"  # None where there are no values: factors are all there is
    inputs: InputForm | None = None  # of the grid or threshold of its inputs; None when they are as they come
    low_rank: LowRankForm | None = None  # of its correction
    pattern: Pattern | None = None  # that its mask is stored with; None when it is a bitmap, or dense

    def to_json(self) -> dict[str, Any]:
        """Flat; only what differs from the defaults, beside shape and layout."""
        data: dict[str, Any] = {"shape": list(self.shape), "layout": LAYOUT}
        if self.form is not None:
            data["encoding"] = self.form.family
            data |= {f.name: v for f in fields(self.form) if (v := getattr(self.form, f.name)) != f.default}
        elif self.value_dtype != "float32":
            data["value_dtype"] = self.value_dtype
        if self.inputs is not None:
            data["inputs"] = self.inputs.to_json()
        if self.low_rank is not None:
            data["low_rank"] = self.low_rank.to_json()
        if self.pattern is not None:
            data["pattern"] = str(self.pattern)
        return data if self.kept is None else {**data, "kept": self.kept}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`.

        Raises:
            ValueError: an unknown layout, encoding, pattern or field: the file was written by a newer version.
        """
        rest = dict(data)
        layout, family = rest.pop("layout", None), rest.pop("encoding", None)
        if layout != LAYOUT:
            raise ValueError(f"weight layout {layout!r:.100} is not known to this version; it reads {LAYOUT!r}")
        own: dict[str, Any] = {k: rest.pop(k) for k in ("shape", "kept", "value_dtype") if k in rest}
        if "inputs" in rest:
            own["inputs"] = InputForm.from_json(rest.pop("inputs"))
        if "low_rank" in rest:
            own["low_rank"] = LowRankForm.from_json(rest.pop("low_rank"))
        if "pattern" in rest:
            own["pattern"] = Pattern.parse(rest.pop("pattern"))
            if "kept" not in own:
                raise ValueError(f"the number of kept weights is missing beside the pattern {own['pattern']}")
        if family is not None and (not isinstance(family, str) or family not in FORMS):
            raise ValueError(f"encoding {family!r:.100} is not known to this version; it reads {sorted(FORMS)}")
        if rest and not family:
            raise ValueError(f"fields {sorted(map(str, rest))} of a packed weight are not known to this version")
        form = made_from(FORMS[family], rest, "a packed weight") if family else None
        if not family and own.get("value_dtype", "") is None and ("low_rank" not in own or "kept" in own):
            raise ValueError("a packed weight without values has a low-rank form, and no mask")
        own["shape"] = _stated_shape(own)
        _check_parts(own["shape"], form, own)
        return cls(form=form, **own)

    def tensors(self) -> StoredShapes:
        """Shape and type of every stored tensor."""
        rows, columns = self.shape
        last = {} if self.inputs is None else self.inputs.tensors(columns)
        if self.low_rank is not None:
            last = last | self.low_rank.tensors(self.shape)
        found: StoredShapes = {}
        if self.pattern is not None:
            found["pattern"] = ((rows, self.pattern.row_bytes(columns)), torch.uint8)
        elif self.kept is not None:
            found["mask"] = ((rows, row_bytes(columns, 1)), torch.uint8)
        if self.form is None:
            shape: tuple[int, ...] = self.shape if self.kept is None else (self.kept,)
            if self.value_dtype is not None:
                found["values"] = (shape, getattr(torch, self.value_dtype))
            return found | last
        if self.kept is None or self.form.stores_idle:
            found["codes"] = ((rows, row_bytes(columns, self.form.bits)), torch.uint8)
        else:
            found["codes"] = ((row_bytes(self.kept, self.form.bits),), torch.uint8)
        return found | self.form.tables(self.shape) | last

    def streams(self) -> dict[str, tuple[int, int]]:
        """Every stored tensor that is a stream of codes -> bits of a code, codes in a row."""
        columns = self.shape[1]
        found: dict[str, tuple[int, int]] = {}
        if self.pattern is not None:
            found["pattern"] = self.pattern.bits, self.pattern.words(columns)
        elif self.kept is not None:
            found["mask"] = 1, columns
        if self.form is not None:
            as_one = self.kept is not None and not self.form.stores_idle
            found["codes"] = self.form.bits, self.kept if as_one and self.kept is not None else columns
        if self.low_rank is not None and self.low_rank.bits is not None:
            shapes = self.low_rank.shapes(self.shape)
            found |= {f"lora_{side}_codes": (self.low_rank.bits, shape[1]) for side, shape in shapes.items()}
        return found

    def mask(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """(O, I) bool, True = kept, from the stored tensors; None when dense."""
        if self.pattern is not None:
            return self.pattern.unpack(tensors["pattern"], self.shape[1])
        return None if self.kept is None else unpack_bits(tensors["mask"], 1, self.shape[1]).bool()

    @property
    def kind(self) -> str:
        """The kind that the weight has: see `Weight.kind`."""
        factored = self.form is None and self.value_dtype is None
        return FACTORED if factored else _kind(self.form is not None, self.kept is not None, self.low_rank is not None)

    @property
    def is_dense(self) -> bool:
        """Whether its values are all there is: no mask, codes or factors, and no grid of its inputs."""
        return self.kind == "dense" and self.inputs is None

    @property
    def num_bytes(self) -> int:
        """Stored bytes, everything counted."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.tensors().values())


def _stated_shape(own: Mapping[str, Any]) -> tuple[int, int]:
    """The shape that a file states, and its other numbers checked against it."""
    shape, kept, dtype = own.get("shape"), own.get("kept", 0), own.get("value_dtype")
    if not (isinstance(shape, list | tuple) and len(shape) == 2 and all(map(whole, shape))):
        raise ValueError(f"shape {shape!r:.100} of a packed weight is not two whole numbers")
    if not whole(kept, shape[0] * shape[1], least=0):
        raise ValueError(f"{kept!r:.100} kept weights of a shape {shape}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"values of type {dtype!r:.100} are not known to this version")
    return shape[0], shape[1]


def _check_parts(shape: tuple[int, int], form: Form | None, own: Mapping[str, Any]) -> None:
    """Groups, runs and rows that share a table must fill a weight."""
    pattern, low_rank = own.get("pattern"), own.get("low_rank")
    columns, rows = {"columns": shape[1]}, {"rows": shape[0]}
    if form is not None and shape[1] % form.multiple:
        raise ValueError(f"{shape[1]} columns are not a multiple of {form.multiple}, a super-block")
    divides({"columns": getattr(form, "groups", 1)}, columns)
    divides({"rows": getattr(form, "period", 0)}, rows)
    divides({"rows": getattr(form, "row_blocks", None) or 0}, rows)
    divides({"columns": pattern.of if pattern else 1}, columns)
    divides({"columns": low_rank.a_groups if low_rank else 1}, columns)
    if pattern and own["kept"] * pattern.of != shape[0] * shape[1] * pattern.keep:
        raise ValueError(f"{own['kept']} kept weights do not fit the pattern {pattern} of a shape {shape}")


def spec_of(weight: Weight) -> Spec:
    """The spec a weight has when packed."""
    kept = None if weight.mask is None else int(weight.mask.count_nonzero())
    found: dict[str, Any] = {
        "kept": kept,
        "inputs": None if weight.inputs is None else weight.inputs.form,
        "low_rank": None if weight.low_rank is None else weight.low_rank.form,
        "pattern": None if weight.mask is None or kept is None else find_pattern(weight.mask, kept),
    }
    if weight.encoding is not None:
        return Spec(_shape(weight.encoding.codes), weight.encoding.form, **found)
    if weight.low_rank is not None and weight.factored:
        return Spec(weight.low_rank.shape, value_dtype=None, **found)
    assert weight.values is not None
    return Spec(_shape(weight.values), value_dtype=str(weight.values.dtype).removeprefix("torch."), **found)


def pack(weight: Weight) -> tuple[Spec, dict[str, Tensor]]:
    """A weight -> its spec and its stored tensors."""
    spec = spec_of(weight)
    tensors: dict[str, Tensor] = {} if weight.inputs is None else weight.inputs.tensors()
    if weight.low_rank is not None:
        tensors |= weight.low_rank.tensors()
    if weight.mask is not None and spec.pattern is not None:
        tensors["pattern"] = spec.pattern.pack(weight.mask)
    elif weight.mask is not None:
        tensors["mask"] = pack_bits(weight.mask.to(torch.uint8), 1)
    e = weight.encoding
    if weight.factored:
        return spec, tensors
    if e is None:
        assert weight.values is not None
        tensors["values"] = weight.values.contiguous() if weight.mask is None else weight.values[weight.mask]
        return spec, tensors
    if weight.mask is None or e.form.stores_idle:
        tensors["codes"] = pack_bits(e.codes, e.form.bits)
    else:
        tensors["codes"] = pack_bits(e.codes[weight.mask][None], e.form.bits)[0]
    return spec, tensors | e.tables()


def unpack(spec: Spec, tensors: Mapping[str, Tensor]) -> Weight:
    """The inverse of `pack`, on whatever device the tensors are."""
    columns = spec.shape[1]
    inputs = None if spec.inputs is None else spec.inputs.input_grid(tensors)
    low_rank = None if spec.low_rank is None else spec.low_rank.low_rank(tensors, spec.shape)
    mask = spec.mask(tensors)
    if spec.kind == FACTORED:
        return Weight(inputs=inputs, low_rank=low_rank)
    if spec.form is None:
        values = tensors["values"]
        if mask is not None:
            values = spread(values, mask)
        return Weight(values, mask, inputs=inputs, low_rank=low_rank)
    stored = tensors["codes"]
    if mask is None or spec.form.stores_idle:
        encoding = spec.form.encoding(unpack_bits(stored, spec.form.bits, columns), tensors)
        return Weight(mask=mask, encoding=encoding, inputs=inputs, low_rank=low_rank)
    assert spec.kept is not None
    codes = spread(unpack_bits(stored[None], spec.form.bits, spec.kept)[0], mask)
    encoding = spec.form.encoding(codes, tensors)
    torch.where(mask, codes, encoding.idle(), out=codes)
    return Weight(mask=mask, encoding=encoding, inputs=inputs, low_rank=low_rank)


def spread(values: Tensor, mask: Tensor) -> Tensor:
    """(K,) kept values, row after row, and an (O, I) mask that keeps K -> (O, I), zero where masked."""
    counted = mask.flatten().cumsum(0, dtype=torch.int32)
    counted *= mask.flatten()  # the zeroth is a zero put in front
    return functional.pad(values, (1, 0)).index_select(0, counted).view(mask.shape)


def _shape(values: Tensor) -> tuple[int, int]:
    rows, columns = values.shape
    return rows, columns


__all__ = ["FACTORED", "FORMS", "LAYOUT", "Spec", "Weight", "pack", "spec_of", "spread", "unpack"]
