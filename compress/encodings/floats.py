"""Floats of 4 or 8 bits in blocks that share a scale: FP8, MXFP4 and NVFP4.

Value = number * scale, times `outer_scale` where scales have one. The types of scales:

| scales               | type, shape         | a scale says                                                        |
|----------------------|---------------------|---------------------------------------------------------------------|
| `float16`, `float32` | float (R, G)        | itself                                                              |
| `e8m0`               | uint8 (R, G)        | 2**(byte - 127): MXFP4                                              |
| `e4m3`               | uint8 (R, G)        | its bits are an E4M3 number, times `outer_scale` float32 (1,): NVFP4 |

Sources: MXFP4 of Rouhani et al., "Microscaling Data Formats for Deep Learning", 2023, arXiv 2310.10537, and the OCP
Microscaling Formats specification 1.0, section 6.3; NVFP4 of NVIDIA, "Pretraining Large Language Models with NVFP4",
2025, arXiv 2509.25149; that a block may do better with its largest weight at 4 than at 6: Cook et al., "Four Over Six:
More Accurate NVFP4 Quantization with Adaptive Block Scaling", 2025, arXiv 2512.02010. Differs from the paper in: the
outer scale is a power of two, so that files which keep its inverse say exactly the same numbers; the mse search tries
every scale around the usual one, not two of them.

Shapes: O = out features, I = in features, R = rows of scales, G = groups of columns: a scale is of O / R rows and I / G
columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, Self

from compress.encodings.base import Encoding, Form
from compress.encodings.minifloat import MINIFLOATS
from compress.encodings.pieces import rows_in_piece
from compress.encodings.uniform import CHUNK, SEARCH_NORM, narrowest, stored_scale
from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from compress.encodings.base import StoredShapes
    from compress.encodings.lookup import BlockScale, Lookup, Table
    from compress.encodings.minifloat import Minifloat, Number
    from compress.encodings.uniform import Search

FLOATS = ("float16", "float32")
SCALES = (*FLOATS, "e8m0", "e4m3")
SHARES = tuple(k / 20 for k in range(20, 9, -1))  # of the usual scale: those that the searches try
EXPONENTS = (0, 1, -1)  # powers of two that the searches try, counted from the usual one
STEPS = (0, *range(5, 0, -1), *range(-1, -9, -1))  # E4M3 scales that they try: from 1.5 of the usual one to half of it
LARGEST_SCALE = 256  # of E4M3: half as large again, which the searches try, E4M3 holds too
HALF, MOST_EXPONENT = 127, 254  # the byte of an E8M0 scale of 1, and that of the largest


@dataclass(frozen=True, kw_only=True)
class FloatForm(Form):
    """Stored: `scale` (R, G), floats or bytes; with E4M3 scales `outer_scale` float32 (1,).

    Attributes:
        number: what codes are.
        groups: G.
        row_blocks: R; None where every row has scales of its own.
        scale_type: what scales are.
    """

    number: Number
    groups: int = 1
    row_blocks: int | None = None
    scale_type: str = "float16"
    family: ClassVar[str] = "float"
    floats: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.number not in MINIFLOATS or self.bits != self.kind.bits or self.scale_type not in SCALES:
            raise ValueError(
                f"{self.number!r:.100} of {self.bits} bits with scales of type {self.scale_type!r:.100} are not known "
                f"to this version; it reads {', '.join(f'{n} of {f.bits} bits' for n, f in MINIFLOATS.items())}, with "
                f"scales of type {', '.join(SCALES)}"
            )

    @property
    def kind(self) -> Minifloat:
        """The kind of number that codes are."""
        return MINIFLOATS[self.number]

    def tables(self, shape: tuple[int, int]) -> StoredShapes:
        dtype = getattr(torch, self.scale_type) if self.scale_type in FLOATS else torch.uint8
        found: StoredShapes = {"scale": ((self.row_blocks or shape[0], self.groups), dtype)}
        if self.scale_type == "e4m3":
            found["outer_scale"] = ((1,), torch.float32)
        return found

    def encoding(self, codes: Tensor, tables: Mapping[str, Tensor]) -> Floats:
        return Floats(codes, tables["scale"], tables.get("outer_scale"), self.number)

    def table(self, tensors: Mapping[str, Tensor], device: torch.device) -> Table:
        return self.kind.table(device)

    def scale_table(self, device: torch.device) -> Tensor | None:
        return None if self.scale_type in FLOATS else _scale_table(self.scale_type, device)


@dataclass(frozen=True)
class Floats(Encoding):
    """Codes that are the bits of small floats.

    Attributes:
        codes: (O, I) uint8.
        scale: (R, G) float16 or float32; or uint8, E4M3 where there is an outer scale and else E8M0.
        outer_scale: (1,) float32 or None.
        number: what codes are.
    """

    codes: Tensor
    scale: Tensor
    outer_scale: Tensor | None
    number: Number

    @property
    def form(self) -> FloatForm:
        scale_type = "e8m0" if self.outer_scale is None else "e4m3"
        if self.scale.is_floating_point():
            scale_type = str(self.scale.dtype).removeprefix("torch.")
        rows, groups = self.scale.shape
        return FloatForm(
            bits=MINIFLOATS[self.number].bits,
            number=self.number,
            groups=groups,
            row_blocks=None if rows == len(self.codes) else rows,
            scale_type=scale_type,
        )

    def tables(self) -> dict[str, Tensor]:
        found = {"scale": self.scale.contiguous()}
        return found if self.outer_scale is None else {**found, "outer_scale": self.outer_scale}

    def dequantize(self) -> Tensor:
        lookup = self.lookup()
        units, scale = lookup.units(self.codes), _scale_of(lookup).of()
        return units.view(len(units), scale.shape[1], -1).mul_(scale[..., None]).view(units.shape)

    def rows(self, part: slice) -> Self:
        scale, each = self.scale, len(self.codes) // len(self.scale)
        if len(scale) > 1:
            scale = scale[part] if each == 1 else scale.repeat_interleave(each, 0)[part]
            scale = narrowest(scale) if scale.is_floating_point() else scale
        return replace(self, codes=self.codes[part], scale=scale)

    def above(self, others: Sequence[Self]) -> Self:
        codes, scale = (torch.cat([getattr(each, name) for each in (self, *others)]) for name in ("codes", "scale"))
        return replace(self, codes=codes, scale=narrowest(scale) if scale.is_floating_point() else scale)

    def idle(self) -> Tensor:
        return torch.zeros(1, 1, dtype=torch.uint8, device=self.codes.device).expand(self.codes.shape)

    def defect(self) -> str | None:
        kind, scale = self.form.kind, _scale_of(self.lookup()).of()
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            return "scales that are not positive and finite"
        magnitudes = self.codes & 2 ** (kind.bits - 1) - 1
        return self._codes_defect() or ("codes that are no numbers" if int(magnitudes.max()) >= kind.count else None)


def fit(
    weight: Tensor, form: FloatForm, *, search: Search = "minmax", importance: Tensor | None = None
) -> dict[str, Tensor]:
    """The scales of a weight.

    Args:
        weight: (O, I) float32.
        form: how the weight is to be stored. Which type scales in floats need is found here.
        search: `minmax` puts the largest weight of a block at the largest number, with E8M0 scales at the largest power
            of two; `mse` tries scales around that and keeps the one with the least sum of |error|**2.4; `weighted` the
            one with the least sum of importance * error**2.
        importance: (I,) of every column, for a weighted search.

    Returns:
        What is stored beside the codes.
    """
    if search == "weighted" and importance is None:
        raise ValueError("a weighted search needs the importance of every column")
    rows, _ = weight.shape
    blocks = weight.abs().view(form.row_blocks or rows, -1, form.groups, weight.shape[1] // form.groups)
    largest = blocks.amax((1, 3))
    beside = {"outer_scale": _outer(largest, form.kind)} if form.scale_type == "e4m3" else {}
    tried = _tried(largest, form, beside)
    best = next(tried)
    if search != "minmax":
        own = importance if search == "weighted" else None
        least = _lost(weight, form, {**beside, "scale": best}, own)
        for scale in tried:
            lost = _lost(weight, form, {**beside, "scale": scale}, own)
            better = lost < least
            least, best = torch.where(better, lost, least), torch.where(better, scale, best)
    return {"scale": narrowest(best) if best.is_floating_point() else best, **beside}


def quantize(weight: Tensor, form: FloatForm, tables: Mapping[str, Tensor]) -> Floats:
    """(O, I) float32 -> every weight at the nearest number that its scale makes of the codes."""
    rows, columns = weight.shape
    scales = _scale_of(form.lookup((rows, columns), tables))
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    for part in _pieces(weight):
        codes[part] = form.kind.codes(form.kind.round(_in_units(weight[part], scales.of(part)))).view(-1, columns)
    return form.encoding(codes, tables)


def _tried(largest: Tensor, form: FloatForm, beside: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """Scales (R, G) to try, as they are stored, the usual one first; `largest` (R, G) is the largest weight of each."""
    wanted = largest / form.kind.largest
    if form.scale_type in FLOATS:
        wanted = wanted.masked_fill(wanted == 0, 1.0)  # nothing but zeros: any scale says zero
        yield from (stored_scale(wanted * share) for share in SHARES)
    elif form.scale_type == "e8m0":
        top = torch.frexp(torch.tensor(form.kind.largest)).exponent
        usual = torch.frexp(largest).exponent - top + HALF
        yield from ((usual + step).clamp(1, MOST_EXPONENT).to(torch.uint8) for step in EXPONENTS)
    else:
        inner = MINIFLOATS["e4m3"]
        usual = inner.codes(inner.round(wanted / beside["outer_scale"])).int()
        yield from ((usual + step).clamp(1, inner.count - 1).to(torch.uint8) for step in STEPS)


def _outer(largest: Tensor, kind: Minifloat) -> Tensor:
    """(1,) float32: the power of two that makes the largest scale about `LARGEST_SCALE`, and no larger."""
    top = (largest.amax() / (kind.largest * LARGEST_SCALE)).view(1)
    made = torch.ldexp(torch.ones_like(top), torch.frexp(top).exponent.clamp(-HALF + 1, HALF))
    return torch.where(top > 0, made, 1.0)


def _lost(weight: Tensor, form: FloatForm, tables: Mapping[str, Tensor], importance: Tensor | None) -> Tensor:
    """(R, G): what rounding loses in every block."""
    rows, columns = weight.shape
    scales = _scale_of(form.lookup((rows, columns), tables))
    found = torch.empty(rows, form.groups)
    weighed = None if importance is None else importance.reshape(1, form.groups, -1)
    for part in _pieces(weight):
        scale = scales.of(part)
        unit = _in_units(weight[part], scale)
        error = form.kind.round(unit).sub_(unit).mul_(scale[..., None])
        if weighed is None:
            found[part] = error.abs_().pow_(SEARCH_NORM).sum(-1)
        else:
            found[part] = torch.linalg.vecdot(error.square_(), weighed.expand_as(error))
    return found.view(form.row_blocks or rows, -1, form.groups).sum(1)


def _in_units(weight: Tensor, scale: Tensor) -> Tensor:
    """Some rows (r, I) -> (r, G, I / G) in units of their scales, (r, G) or (1, G)."""
    return weight.reshape(len(weight), scale.shape[1], -1) / scale[..., None]


def _pieces(weight: Tensor) -> Iterator[slice]:
    """Rows to work on at once: temporaries stay in the cache."""
    rows, columns = weight.shape
    step = rows_in_piece(CHUNK, columns, weight.device)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _scale_of(lookup: Lookup) -> BlockScale:
    assert lookup.scale is not None
    return lookup.scale


@lru_cache(maxsize=16)
def _scale_table(scale_type: str, device: torch.device) -> Tensor:
    """(256,) float32: what the bytes of scales mean; one that is no number is never written, and stands for zero."""
    with torch.inference_mode(False):
        if scale_type == "e4m3":
            return MINIFLOATS["e4m3"].table(device).values.flatten()
        powers = torch.arange(MOST_EXPONENT + 2, dtype=torch.float64, device="cpu").sub_(HALF).exp2()
        powers[-1] = 0.0
        return powers.float().to(device)


__all__ = ["FloatForm", "Floats", "fit", "quantize"]
