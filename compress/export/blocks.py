"""Blocks of GGML: some neighbouring columns of a row with one float16 scale, and how codes lie in them.

| type     | columns | bits a weight | value                        |
|----------|---------|---------------|------------------------------|
| `TQ2_0`  | 256     | 2.06          | d * level, level -1 to 1     |
| `Q4_0`   | 32      | 4.5           | d * level, level -8 to 7     |
| `IQ4_NL` | 32      | 4.5           | d * one of 16 fixed integers |
| `Q4_1`   | 32      | 5             | d * code + m, code 0 to 15   |
| `Q5_0`   | 32      | 5.5           | d * level, level -16 to 15   |
| `Q8_0`   | 32      | 8.5           | d * level, level -128 to 127 |

A level is a code's distance from its zero point. A scale of more columns than a block is repeated in each of them. `m`
is float16 too, and the minimum of a grid seldom is one: then the levels are kept instead, in a wider type.

Shapes: O = out features, I = in features, B = blocks a row, W = columns of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.encodings import CodebookForm, Codebooks, Uniform, UniformForm
from compress.encodings.bits import pack_bits
from compress.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from compress.encodings import Encoding, Spec

NON_LINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # of IQ4_NL, in units of d
SMALLEST = 32  # columns of the narrowest block


@dataclass(frozen=True)
class Blocks:
    """A weight in blocks.

    Attributes:
        type: as GGML calls it.
        data: (O, bytes a row) uint8.
    """

    type: str
    data: Tensor


def misfit(spec: Spec) -> str | None:
    """Why codes fit no type whatever they are, and what would; None if they may."""
    form, columns = spec.form, spec.shape[1]
    if columns % SMALLEST:
        return f"rows of {columns} weights, which are no whole blocks of {SMALLEST}; `exclude` it in the quantizer"
    if isinstance(form, CodebookForm):
        if (form.entries, form.num_tables, form.scaled, spec.kept) == (16, 1, True, None):
            return None
        return "a codebook, and only that of IQ4_NL is known; use a uniform quantizer such as rtn or gptq"
    if not isinstance(form, UniformForm):
        assert form is not None
        return f"{form.family} codes; use a uniform quantizer such as rtn or gptq"
    if columns // form.groups % SMALLEST:
        return f"groups of {columns // form.groups} weights; group_size: {SMALLEST} would fit, and every multiple of it"
    if form.bits == 8 and not form.symmetric:
        return "asymmetric codes of 8 bits; with symmetric: true they fit Q8_0"
    if form.scale_dtype != "float16":
        return "scales outside of float16's range, and those of blocks are float16; export compressed-tensors"
    return None


def to_blocks(encoding: Encoding) -> Blocks | str:
    """A weight in the smallest type whose values are exactly its own; else why there is none."""
    if isinstance(encoding, Uniform):
        return _from_uniform(encoding)
    assert isinstance(encoding, Codebooks)
    return _from_codebook(encoding)


def _from_uniform(encoding: Uniform) -> Blocks | str:
    scale = _exact(encoding.scale.float())
    if scale is None:
        return "scales that are not float16"
    levels = encoding.codes.short() - encoding.idle().short()
    low, high = int(levels.min()), int(levels.max())
    rows, repeats = len(levels), encoding.group_size // SMALLEST
    d = scale.expand(rows, -1).repeat_interleave(repeats, dim=1)
    if low >= -1 and high <= 1 and repeats % 8 == 0:
        return Blocks("TQ2_0", _joined(_quarters(levels + 1), _halves(d[:, ::8])))
    if low >= -8 and high <= 7:
        return Blocks("Q4_0", _joined(_halves(d), _nibbles(levels + 8)))
    if encoding.bits == 4:
        least = _exact(encoding.scale.float() * -encoding.zero_point.float())
        if least is not None:
            m = least.expand(rows, -1).repeat_interleave(repeats, dim=1)
            return Blocks("Q4_1", _joined(_halves(d), _halves(m), _nibbles(encoding.codes)))
    if low >= -16 and high <= 15:
        return Blocks("Q5_0", _joined(_halves(d), *_fifths(levels + 16)))
    if low >= -128 and high <= 127:
        return Blocks("Q8_0", _joined(_halves(d), _cut(levels.to(torch.int8).view(torch.uint8))))
    return f"codes up to {max(high, -low)} from their zero point"


def _from_codebook(encoding: Codebooks) -> Blocks | str:
    assert encoding.scale is not None
    table, scale = encoding.table[0].float(), encoding.scale.float()
    d = _exact(scale * table[NON_LINEAR.index(1)])
    if d is None or not torch.equal(scale * table, d.float() * torch.tensor(NON_LINEAR)):
        return "a codebook that is not IQ4_NL's times a float16"
    blocks = encoding.codes.shape[1] // SMALLEST
    return Blocks("IQ4_NL", _joined(_halves(d.expand(-1, blocks)), _nibbles(encoding.codes)))


def _exact(values: Tensor) -> Tensor | None:
    """float32 -> float16 if that loses nothing."""
    half = values.half()
    return half if torch.equal(half.float(), values) else None


def _joined(*parts: Tensor) -> Tensor:
    """Pieces (O, B, any) uint8 of every block -> (O, bytes a row)."""
    return torch.cat(parts, dim=-1).flatten(1)


def _cut(values: Tensor, columns: int = SMALLEST) -> Tensor:
    """(O, I) -> (O, B, W)."""
    return values.view(len(values), -1, columns)


def _halves(scale: Tensor) -> Tensor:
    """(O, B) float16 -> (O, B, 2) uint8."""
    return scale.contiguous()[..., None].view(torch.uint8)


def _nibbles(codes: Tensor) -> Tensor:
    """(O, I) below 16 -> (O, B, 16) uint8: the first half of a block in the low bits, the second in the high ones."""
    first, second = _cut(codes.to(torch.uint8)).chunk(2, dim=-1)
    return first | second << 4


def _fifths(codes: Tensor) -> tuple[Tensor, Tensor]:
    """(O, I) below 32 -> the highest bits (O, B, 4) uint8, one after the other, and the others as nibbles."""
    high = pack_bits((codes >> 4).to(torch.uint8), 1)
    return _cut(high, 4), _nibbles(codes & 15)


def _quarters(codes: Tensor) -> Tensor:
    """(O, I) below 4 -> (O, B, 64) uint8: each half of a block is four runs of 32, two bits of a byte each."""
    runs = codes.to(torch.uint8).view(len(codes), -1, 2, 4, 32)
    packed = runs[..., 0, :] | runs[..., 1, :] << 2 | runs[..., 2, :] << 4 | runs[..., 3, :] << 6
    return packed.flatten(2)
