"""Super-blocks of 256 columns as GGML keeps them: the types that llama.cpp calls K-quants.

What stands in a super-block, one after the other; d and dmin are float16, scales and minima have the bits named:

| type   | bytes | order                                                                            |
|--------|-------|----------------------------------------------------------------------------------|
| `Q2_K` | 84    | 16 scales and minima of 4 bits; codes; d; dmin                                   |
| `Q3_K` | 110   | highest bits of codes; codes; 16 scales of 6 bits; d                             |
| `Q4_K` | 144   | d; dmin; 8 scales and minima of 6 bits; codes                                    |
| `Q5_K` | 176   | d; dmin; 8 scales and minima of 6 bits; highest bits of codes; codes             |
| `Q6_K` | 210   | lowest 4 bits of codes; highest 2; 16 scales of 8 bits; d                        |

Source: `block_q2_K` to `block_q6_K` of ggml, as the gguf package reads them.

Shapes: O = out features, I = in features, S = super-blocks of a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from compress.encodings import Form
    from compress.encodings.lookup import BlockScale, Lookup

WIDTH = 256  # columns of a super-block
BYTES = {"Q2_K": 84, "Q3_K": 110, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210}


def type_of(form: Form) -> str:
    """What GGML calls super-blocks: it knows one kind for each width of codes."""
    return f"Q{form.bits}_K"


def super_blocks(codes: Tensor, lookup: Lookup) -> Tensor:
    """(O, bytes per row) uint8: codes (O, I), their scales and offsets in the type that has them."""
    assert lookup.scale is not None
    rows, bits = len(codes), lookup.table.bits
    blocks = codes.view(rows, -1, WIDTH)
    scale, d = _parts(lookup.scale)
    if bits in (3, 6):
        packed = _third(blocks, scale, d) if bits == 3 else _sixth(blocks, scale, d)
        return torch.cat(packed, -1).flatten(1)
    assert lookup.offset is not None
    least, dmin = _parts(lookup.offset)
    if bits == 2:
        return torch.cat([scale | least << 4, _quarters(blocks), d, dmin], -1).flatten(1)
    high = [_highest(blocks >> 4)] if bits == 5 else []
    return torch.cat([d, dmin, _pairs_of_six(scale, least), *high, _nibbles(blocks, 32)], -1).flatten(1)


def _parts(block: BlockScale) -> tuple[Tensor, Tensor]:
    """The whole numbers of the blocks of every super-block (O, S, 8 or 16), and the bytes of their scale (O, S, 2)."""
    assert block.outer is not None
    rows, count = block.outer.shape
    return block.values.view(rows, count, -1), block.outer.half().contiguous()[..., None].view(torch.uint8)


def _third(blocks: Tensor, scale: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    whole = scale.view(torch.uint8) + 32
    low = whole[..., :8] & 15 | (whole[..., 8:] & 15) << 4
    high = (whole >> 4).view(*whole.shape[:2], 4, 4)
    high = high[..., 0, :] | high[..., 1, :] << 2 | high[..., 2, :] << 4 | high[..., 3, :] << 6
    return _highest(blocks >> 2), _quarters(blocks & 3), low, high, d


def _sixth(blocks: Tensor, scale: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    return _nibbles(blocks, 64), _quarters(blocks >> 4), scale.contiguous().view(torch.uint8), d


def _pairs_of_six(scale: Tensor, least: Tensor) -> Tensor:
    """(O, S, 8) scales and minima of 6 bits -> (O, S, 12): those of the last four blocks fill what the first leave."""
    high = torch.cat([scale[..., 4:], least[..., 4:]], -1) >> 4
    first = torch.cat([scale[..., :4], least[..., :4]], -1) | high << 6
    return torch.cat([first, scale[..., 4:] & 15 | (least[..., 4:] & 15) << 4], -1)


def _nibbles(blocks: Tensor, run: int) -> Tensor:
    """(O, S, 128): of two runs of columns the lowest 4 bits of the codes, those of the second in the high ones."""
    runs = (blocks & 15).view(*blocks.shape[:2], -1, 2, run)
    return (runs[..., 0, :] | runs[..., 1, :] << 4).flatten(2)


def _quarters(blocks: Tensor) -> Tensor:
    """(O, S, 64): codes of two bits, of four runs of 32 columns each."""
    runs = blocks.view(*blocks.shape[:2], 2, 4, 32)
    return (runs[..., 0, :] | runs[..., 1, :] << 2 | runs[..., 2, :] << 4 | runs[..., 3, :] << 6).flatten(2)


def _highest(bits: Tensor) -> Tensor:
    """(O, S, 32): one bit of each of eight runs of 32 columns."""
    runs = bits.view(*bits.shape[:2], 8, 32)
    found = runs[..., 0, :].clone()
    for i in range(1, 8):
        found |= runs[..., i, :] << i
    return found


__all__ = ["BYTES", "WIDTH", "super_blocks", "type_of"]
