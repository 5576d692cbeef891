"""Super-blocks of 256 columns, whose blocks have scales of few bits: the K-quants of GGML.

| kind   | bits of a code | columns of a block | bits of a scale | offset | bits per weight |
|--------|----------------|--------------------|-----------------|--------|-----------------|
| `q2_k` | 2              | 16                 | 4               | yes    | 2.625           |
| `q3_k` | 3              | 16                 | 6, signed       |        | 3.4375          |
| `q4_k` | 4              | 32                 | 6               | yes    | 4.5             |
| `q5_k` | 5              | 32                 | 6               | yes    | 5.5             |
| `q6_k` | 6              | 16                 | 8, signed       |        | 6.5625          |

Value = (outer_scale * scale) * code - (outer_offset * offset), each product rounded to float32 as llama.cpp and the
gguf package do. Without an offset codes count from the middle one, and scales have a sign. How scales are found stands
in `super_scales.py`.

Source: the k-quants of llama.cpp, Kawrakow, 2023, pull request 1684. Differs from it in: codes, scales and offsets lie
here as streams of their own; the blocks of GGML are made on export.

Shapes: O = out features, I = in features, G = blocks of a row, S = super-blocks of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, Literal, Self, TypeAlias, get_args

from compress.encodings.base import Encoding, Form
from compress.encodings.bits import pack_bits, row_bytes, unpack_bits
from compress.encodings.lookup import BlockScale, Lookup, Table
from compress.encodings.pieces import rows_in_piece
from compress.encodings.uniform import CHUNK
from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from compress.encodings.base import StoredShapes

SuperBlockKind: TypeAlias = Literal["q2_k", "q3_k", "q4_k", "q5_k", "q6_k"]

WIDTH = 256  # columns of a super-block


@dataclass(frozen=True)
class SuperBlock:
    """What super-blocks of one kind are like.

    Attributes:
        bits: of a code.
        columns: of a block.
        scale_bits: of a block's scale, and of its offset.
        offset: whether blocks have one; otherwise codes and scales have signs.
    """

    bits: int
    columns: int
    scale_bits: int
    offset: bool

    @property
    def lowest(self) -> int:
        """What the smallest code stands for, in units of the scale."""
        return 0 if self.offset else -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        """What the largest code stands for."""
        return self.lowest + (1 << self.bits) - 1

    @property
    def middle_scale(self) -> int:
        """What stands in a file for a scale of zero."""
        return 0 if self.offset else 1 << (self.scale_bits - 1)


KINDS: dict[SuperBlockKind, SuperBlock] = {
    "q2_k": SuperBlock(2, 16, 4, offset=True),
    "q3_k": SuperBlock(3, 16, 6, offset=False),
    "q4_k": SuperBlock(4, 32, 6, offset=True),
    "q5_k": SuperBlock(5, 32, 6, offset=True),
    "q6_k": SuperBlock(6, 16, 8, offset=False),
}
assert get_args(SuperBlockKind) == tuple(KINDS)


@dataclass(frozen=True, kw_only=True)
class SuperBlockForm(Form):
    """Stored: `scale` (O, bytes), packed as codes are, and `outer_scale` float16 (O, S).

    Where the kind has offsets, `offset` and `outer_offset` are alike. A signed scale is stored with the middle of its
    range added.

    Attributes:
        kind: of the super-blocks.
    """

    kind: SuperBlockKind
    family: ClassVar[str] = "super-block"
    super_blocks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.bits != KINDS[self.kind].bits:
            raise ValueError(
                f"super-blocks of kind {self.kind!r:.100} with {self.bits} bits are not known to this version; it "
                f"reads {', '.join(f'{name} of {kind.bits} bits' for name, kind in KINDS.items())}"
            )

    @property
    def multiple(self) -> int:
        return WIDTH

    def groups_of(self, columns: int) -> int:
        return columns // KINDS[self.kind].columns

    def tables(self, shape: tuple[int, int]) -> StoredShapes:
        kind, (rows, columns) = KINDS[self.kind], shape
        inner = (rows, row_bytes(self.groups_of(columns), kind.scale_bits)), torch.uint8
        outer = (rows, columns // WIDTH), torch.float16
        found: StoredShapes = {"scale": inner, "outer_scale": outer}
        return found | {"offset": inner, "outer_offset": outer} if kind.offset else found

    def encoding(self, codes: Tensor, tables: Mapping[str, Tensor]) -> SuperBlocks:
        scale, offset = self._block_scales(codes.shape[1], tables)
        return SuperBlocks(codes, scale, offset, self.kind)

    def table(self, tensors: Mapping[str, Tensor], device: torch.device) -> Table:
        return _steps(self.kind, device)

    def lookup(self, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> Lookup:
        scale, offset = self._block_scales(shape[1], tensors)
        return Lookup(_steps(self.kind, scale.values.device), scale=scale, offset=offset)

    def _block_scales(self, columns: int, tensors: Mapping[str, Tensor]) -> tuple[BlockScale, BlockScale | None]:
        kind, groups = KINDS[self.kind], self.groups_of(columns)

        def of(name: str) -> BlockScale:
            inner = unpack_bits(tensors[name], kind.scale_bits, groups)
            if not kind.offset:
                inner = inner.sub(kind.middle_scale).view(torch.int8)
            return BlockScale(inner, 1, kind.columns, tensors[f"outer_{name}"])

        return of("scale"), of("offset") if kind.offset else None


@dataclass(frozen=True)
class SuperBlocks(Encoding):
    """Codes in super-blocks.

    Attributes:
        codes: (O, I) uint8.
        scale: of every block: (O, G) uint8, or int8 where there are no offsets; their scales (O, S) float16.
        offset: of every block, as `scale`; None where the kind has none.
        kind: of the super-blocks.
    """

    codes: Tensor
    scale: BlockScale
    offset: BlockScale | None
    kind: SuperBlockKind

    @property
    def form(self) -> SuperBlockForm:
        return SuperBlockForm(bits=KINDS[self.kind].bits, kind=self.kind)

    def tables(self) -> dict[str, Tensor]:
        kind = KINDS[self.kind]
        found: dict[str, Tensor] = {}
        for name, block in (("scale", self.scale), ("offset", self.offset)):
            if block is None:
                continue
            assert block.outer is not None
            inner = block.values.view(torch.uint8).add(kind.middle_scale)
            found |= {name: pack_bits(inner, kind.scale_bits), f"outer_{name}": block.outer.contiguous()}
        return found

    def lookup(self) -> Lookup:
        return Lookup(_steps(self.kind, self.codes.device), scale=self.scale, offset=self.offset)

    def dequantize(self) -> Tensor:
        lookup = self.lookup()
        return lookup.scaled(lookup.units(self.codes))

    def rows(self, part: slice) -> Self:
        offset = None if self.offset is None else self.offset.rows_of(part)
        return replace(self, codes=self.codes[part], scale=self.scale.rows_of(part), offset=offset)

    def above(self, others: Sequence[Self]) -> Self:
        every = (self, *others)
        scale = BlockScale.joined([each.scale for each in every])
        offsets = [each.offset for each in every if each.offset is not None]
        offset = BlockScale.joined(offsets) if offsets else None
        return replace(self, codes=torch.cat([each.codes for each in every]), scale=scale, offset=offset)

    def idle(self) -> Tensor:
        code = -KINDS[self.kind].lowest
        return torch.full((1, 1), code, dtype=torch.uint8, device=self.codes.device).expand(self.codes.shape)

    def defect(self) -> str | None:
        for block in (self.scale, self.offset):
            if block is not None and block.outer is not None and not bool(torch.isfinite(block.outer).all()):
                return "scales that are not finite"
        return self._codes_defect()


def quantize(weight: Tensor, kind: SuperBlockKind, scale: BlockScale, offset: BlockScale | None) -> SuperBlocks:
    """(O, I) float32 -> every weight at the nearest step of its block, ties to even."""
    rows, columns = weight.shape
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    step = rows_in_piece(CHUNK, columns, weight.device)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        blocks = weight[part].reshape(-1, scale.groups, scale.columns)
        shift = None if offset is None else offset.of(part)
        codes[part] = nearest_units(blocks, scale.of(part), shift, KINDS[kind]).sub_(KINDS[kind].lowest).flatten(1)
    return SuperBlocks(codes, scale, offset, kind)


def nearest_units(blocks: Tensor, scale: Tensor, offset: Tensor | None, kind: SuperBlock) -> Tensor:
    """(..., C) float32 and (...) of each block -> (..., C): the nearest code of each, in units of the scale."""
    above = blocks if offset is None else blocks + offset[..., None]
    return (above / divisor(scale)[..., None]).round_().clamp_(kind.lowest, kind.highest)


def divisor(scale: Tensor) -> Tensor:
    """What to divide by to come to units of a scale: with a scale of zero, to zero."""
    return torch.where(scale == 0, torch.inf, scale)


@lru_cache(maxsize=32)
def _steps(kind: SuperBlockKind, device: torch.device) -> Table:
    with torch.inference_mode(False):
        found = KINDS[kind]
        steps = torch.arange(found.lowest, found.highest + 1, device=device).float()
        return Table(steps.view(1, -1, 1), found.bits)


__all__ = [
    "KINDS", "WIDTH", "SuperBlock", "SuperBlockForm", "SuperBlockKind", "SuperBlocks", "divisor", "nearest_units",
    "quantize",
]  # fmt: skip
