"""Blocks of GGML: some neighbouring columns of a row with one float16 scale, and how codes lie in them.

| type     | columns | bits per weight | value                        |
|----------|---------|-----------------|------------------------------|
| `TQ2_0`  | 256     | 2.06            | d * level, level -1 to 1     |
| `Q4_0`   | 32      | 4.5             | d * level, level -8 to 7     |
| `IQ4_NL` | 32      | 4.5             | d * one of 16 fixed integers |
| `Q4_1`   | 32      | 5               | d * code + m, code 0 to 15   |
| `Q5_0`   | 32      | 5.5             | d * level, level -16 to 15   |
| `Q8_0`   | 32      | 8.5             | d * level, level -128 to 127 |

Super-blocks are written as they are: see `super_blocks.py`.

A level is a code's distance from its zero point. A scale of more columns than a block is repeated in each of them. `m`
is float16 too, and the minimum of a grid seldom is one: then the levels are kept instead, in a wider type.

Shapes: O = out features, I = in features, B = blocks per row, W = columns of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.encodings.bits import pack_bits
from compress.export.gguf import super_blocks as supers
from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import Tensor

    from compress.encodings import Encoding, Form, Spec
    from compress.encodings.lookup import Lookup

NON_LINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # of IQ4_NL, in units of d
SMALLEST = 32  # columns of the narrowest block
LEVELS = {"TQ2_0": 2, "Q4_0": 8, "Q5_0": 16, "Q8_0": 128}  # by type, how far below zero levels go; TQ2_0: one less
BYTES = {"Q4_0": 18, "IQ4_NL": 18, "Q4_1": 20, "Q5_0": 22, "Q8_0": 34}  # of 32 weights


@dataclass(frozen=True)
class Blocks:
    """A weight in blocks.

    Attributes:
        type: as GGML calls it.
        data: (O, bytes per row) uint8.
    """

    type: str
    data: Tensor


def misfit(spec: Spec) -> str | None:
    """Why codes fit no type whatever they are, and what would; None if they may."""
    form, columns = spec.form, spec.shape[1]
    if columns % SMALLEST:
        return f"rows of {columns} weights, which are no whole blocks of {SMALLEST}; `exclude` it in the quantizer"
    assert form is not None
    tables = form.tables(spec.shape)
    if form.super_blocks:
        if spec.kept is not None and "offset" in tables:
            return "pruned weights in super-blocks that have offsets, so that no code is zero; q3_k and q6_k have none"
        return None
    if "table" in tables:
        if tables["table"][0] == (1, len(NON_LINEAR)) and "scale" in tables and spec.kept is None:
            return None
        return "a codebook, and only that of IQ4_NL is known; use a uniform quantizer such as rtn or gptq"
    if not form.steps:
        return f"{form.family} codes; use a uniform quantizer such as rtn or gptq"
    (_, groups), scale_dtype = tables["scale"]
    if columns // groups % SMALLEST:
        return f"groups of {columns // groups} weights; group_size: {SMALLEST} would fit, and every multiple of it"
    if form.bits == 8 and "zero_point" in tables:
        return "asymmetric codes of 8 bits; with symmetric: true they fit Q8_0"
    if scale_dtype != torch.float16:
        return "scales outside of float16's range, and those of blocks are float16; export compressed-tensors"
    return None


def sort_of(form: Form) -> str:
    """Codes of one sort have a type in common."""
    return supers.type_of(form) if form.super_blocks else "uniform codes" if form.steps else "a codebook"


def largest_bytes(spec: Spec) -> int:
    """Bytes of a layer's codes in the widest type that they may need."""
    form = spec.form
    assert form is not None
    if form.super_blocks:
        return spec.shape[0] * spec.shape[1] * supers.BYTES[supers.type_of(form)] // supers.WIDTH
    if not form.steps:
        return spec.shape[0] * spec.shape[1] * BYTES["IQ4_NL"] // SMALLEST
    levels = 2 ** (form.bits - 1) if "zero_point" not in form.tables(spec.shape) else 2**form.bits - 1
    kind = next((kind for kind, most in LEVELS.items() if levels <= most and kind != "TQ2_0"), "Q8_0")
    return spec.shape[0] * spec.shape[1] * BYTES[kind] // SMALLEST


def smallest_type(encoding: Encoding) -> str:
    """The smallest type whose values are exactly a weight's own; empty where there is none."""
    lookup = encoding.lookup()
    if encoding.form.super_blocks:
        return supers.type_of(encoding.form)
    if not encoding.form.steps:
        return "IQ4_NL"
    assert lookup.scale is not None
    levels, scale = _levels(encoding.codes, lookup), lookup.scale.of()
    kind = _of_levels(levels, lookup.scale.columns // SMALLEST)
    if kind not in ("TQ2_0", "Q4_0") and lookup.table.bits == 4 and _minimum(scale, lookup) is not None:
        return "Q4_1"
    return kind


def common_type(kinds: Collection[str]) -> str | None:
    """One type for several weights, by the smallest of each; None where they have none in common."""
    if len(set(kinds)) == 1:
        return next(iter(kinds)) or None
    order = list(LEVELS)
    wide = ["Q5_0" if kind == "Q4_1" else kind for kind in kinds]  # its codes are at most 15 from their zero points
    return max(wide, key=order.index) if set(wide) <= set(order) else None


def to_blocks(encoding: Encoding, kind: str | None = None) -> Blocks | str:
    """A weight in the smallest type whose values are exactly its own, or a given wider one; else why there is none."""
    lookup = encoding.lookup()
    if encoding.form.super_blocks:
        return Blocks(supers.type_of(encoding.form), supers.super_blocks(encoding.codes, lookup))
    if encoding.form.steps:
        return _from_steps(encoding.codes, lookup, kind or smallest_type(encoding))
    return _from_table(encoding.codes, lookup)


def _levels(codes: Tensor, lookup: Lookup) -> Tensor:
    """(O, I) int16 distances of codes from their zero points."""
    return lookup.units(codes).short()


def _of_levels(levels: Tensor, repeats: int) -> str:
    low, high = int(levels.min()), int(levels.max())
    for kind, most in LEVELS.items():
        fits = low >= (-1 if kind == "TQ2_0" else -most) and high <= (1 if kind == "TQ2_0" else most - 1)
        if fits and (kind != "TQ2_0" or repeats % 8 == 0):
            return kind
    return ""


def _minimum(scale: Tensor, lookup: Lookup) -> Tensor | None:
    """float16 values of code 0, or None where they are none."""
    return _exact_half(scale * -lookup.steps_from().float())


def _from_steps(codes: Tensor, lookup: Lookup, kind: str) -> Blocks | str:
    assert lookup.scale is not None
    of_groups = lookup.scale.of()
    scale = _exact_half(of_groups)
    if scale is None:
        return "scales that are not float16"
    levels = _levels(codes, lookup)
    rows, repeats = len(levels), lookup.scale.columns // SMALLEST
    d = scale.expand(rows, -1).repeat_interleave(repeats, dim=1)
    if kind == "TQ2_0":
        return Blocks(kind, _joined(_quarters(levels + 1), _halves(d[:, ::8])))
    if kind == "Q4_0":
        return Blocks(kind, _joined(_halves(d), _nibbles(levels + 8)))
    if kind == "Q4_1":
        least = _minimum(of_groups, lookup)
        assert least is not None
        m = least.expand(rows, -1).repeat_interleave(repeats, dim=1)
        return Blocks(kind, _joined(_halves(d), _halves(m), _nibbles(codes)))
    if kind == "Q5_0":
        return Blocks(kind, _joined(_halves(d), *_fifths(levels + 16)))
    if kind == "Q8_0":
        return Blocks(kind, _joined(_halves(d), _cut_into_blocks(levels.to(torch.int8).view(torch.uint8))))
    return f"codes up to {int(levels.abs().max())} from their zero point"


def _from_table(codes: Tensor, lookup: Lookup) -> Blocks | str:
    assert lookup.scale is not None
    table, scale = lookup.table.values[0, :, 0], lookup.scale.of()
    d = _exact_half(scale * table[NON_LINEAR.index(1)])
    if d is None or not torch.equal(scale[..., None] * table, d.float()[..., None] * torch.tensor(NON_LINEAR)):
        return "a codebook that is not IQ4_NL's times a float16"
    blocks = d.expand(len(codes), -1).repeat_interleave(lookup.scale.columns // SMALLEST, dim=1)
    return Blocks("IQ4_NL", _joined(_halves(blocks), _nibbles(codes)))


def _exact_half(values: Tensor) -> Tensor | None:
    """float32 -> float16 if that loses nothing."""
    half = values.half()
    return half if torch.equal(half.float(), values) else None


def _joined(*parts: Tensor) -> Tensor:
    """Pieces (O, B, any) uint8 of every block -> (O, bytes per row)."""
    return torch.cat(parts, dim=-1).flatten(1)


def _cut_into_blocks(values: Tensor, columns: int = SMALLEST) -> Tensor:
    """(O, I) -> (O, B, W)."""
    return values.view(len(values), -1, columns)


def _halves(scale: Tensor) -> Tensor:
    """(O, B) float16 -> (O, B, 2) uint8."""
    return scale.contiguous()[..., None].view(torch.uint8)


def _nibbles(codes: Tensor) -> Tensor:
    """(O, I) below 16 -> (O, B, 16) uint8: the first half of a block in the low bits, the second in the high ones."""
    first, second = _cut_into_blocks(codes.to(torch.uint8)).chunk(2, dim=-1)
    return first | second << 4


def _fifths(codes: Tensor) -> tuple[Tensor, Tensor]:
    """(O, I) below 32 -> the highest bits (O, B, 4) uint8, one after the other, and the others as nibbles."""
    high = pack_bits((codes >> 4).to(torch.uint8), 1)
    return _cut_into_blocks(high, 4), _nibbles(codes & 15)


def _quarters(codes: Tensor) -> Tensor:
    """(O, I) below 4 -> (O, B, 64) uint8: each half of a block is four runs of 32, two bits of a byte each."""
    runs = codes.to(torch.uint8).view(len(codes), -1, 2, 4, 32)
    packed = runs[..., 0, :] | runs[..., 1, :] << 2 | runs[..., 2, :] << 4 | runs[..., 3, :] << 6
    return packed.flatten(2)
