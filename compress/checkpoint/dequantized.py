"""Checkpoints that ship as codes, read as dense weights: float8 with a scale for each block, and MXFP4 as in gpt-oss.

A weight is read with its scales and multiplied out when it is asked for, one expert alone where only one is wanted. The
numbers are those that transformers loads with `dequantize=True`. Source: `integrations/finegrained_fp8.py` and
`integrations/mxfp4.py` of transformers; the element format is of OCP Microscaling Formats (MX) v1.0, section 5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.checkpoint.sources import ChangedSource
from compress.errors import CheckpointError
from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

    from compress.checkpoint.sources import Source

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)  # by code
BIAS = 127  # of exponents in a byte
BLOCK_SCALES = ("_scale_inv", "_scale")  # what stands behind the name of a weight in float8
PACKED_BLOCKS, PACKED_SCALES = "_blocks", "_scales"
INPUT_SCALES = (".input_scale", ".activation_scale")  # of no use without codes to multiply
BLOCK = 128  # rows and columns of a block in all checkpoints that have any


@dataclass(frozen=True)
class _Coded:
    """A weight that lies in two tensors.

    Attributes:
        codes, scales: their names.
        shape: of the weight.
    """

    codes: str
    scales: str
    shape: tuple[int, ...]


class DequantizedSource(ChangedSource):
    """A source whose codes are read as the numbers that they mean.

    Args:
        before: the codes.
        dtype: that the numbers are rounded to: what the model computes in.

    Raises:
        CheckpointError: codes and scales that do not fit.
    """

    def __init__(self, before: Source, dtype: torch.dtype):
        super().__init__(before)
        self._dtype = dtype
        self._packed = _packed(before)
        self._blocks = _in_blocks(before)
        coded = [*self._packed.values(), *self._blocks.values()]
        hidden = {name for each in coded for name in (each.codes, each.scales)}
        hidden |= {name.rpartition(".")[0] + ending for name in self._blocks for ending in INPUT_SCALES}
        self._names = [*(name for name in before.names() if name not in hidden), *self._packed, *self._blocks]

    def names(self) -> Iterable[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        coded = self._packed.get(name) or self._blocks.get(name)
        return self.before.shape(name) if coded is None else coded.shape

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype if name in self._packed or name in self._blocks else self.before.dtype(name)

    def read(self, name: str) -> Tensor:
        if name not in self._packed and name not in self._blocks:
            return self.before.read(name)
        shape = self.shape(name)
        return self.piece(name, 0, math.prod(shape)).view(shape)

    def piece(self, name: str, start: int, stop: int) -> Tensor:
        if name in self._packed:
            return self._expanded(self._packed[name], start, stop)
        if name in self._blocks:
            return self._multiplied(self._blocks[name], start, stop)
        return self.before.piece(name, start, stop)

    def _expanded(self, coded: _Coded, start: int, stop: int) -> Tensor:
        """Numbers of an MXFP4 weight (experts, in, out), whose codes lie as (experts, out, in / 32, 16) bytes."""
        _, columns, rows = coded.shape
        size = rows * columns
        found = []
        for expert in range(start // size, -(-stop // size)):
            codes = self.before.piece(coded.codes, expert * size // 2, (expert + 1) * size // 2)
            scales = self.before.piece(coded.scales, expert * size // 32, (expert + 1) * size // 32)
            both = torch.stack([codes & 15, codes >> 4], dim=1).flatten().int()  # the lower half of a byte first
            table = torch.tensor(E2M1, dtype=self._dtype)
            numbers = torch.ldexp(table[both].view(-1, 32), scales.int()[:, None] - BIAS).to(self._dtype)
            found.append(numbers.view(rows, columns).T.flatten())
        first = start // size * size
        return torch.cat(found)[start - first : stop - first]

    def _multiplied(self, coded: _Coded, start: int, stop: int) -> Tensor:
        """Numbers of a float8 weight (..., out, in), with a scale for each block of it."""
        *_, rows, columns = coded.shape
        down, across = _grid(self.before.shape(coded.scales))
        height, width = _block(rows, down), _block(columns, across)
        first, last = start // columns, (stop - 1) // columns + 1  # rows, those of all experts counted on
        codes = self.before.piece(coded.codes, first * columns, last * columns).view(last - first, columns)
        scales = self.before.read(coded.scales)
        factors = torch.exp2(scales.float() - BIAS) if scales.dtype == torch.uint8 else scales.float()
        lines = torch.arange(first, last)
        factors = factors.reshape(-1, across)[lines // rows * down + lines % rows // height]
        numbers = (codes.float() * factors.repeat_interleave(width, dim=1)[:, :columns]).to(self._dtype)
        return numbers.flatten()[start - first * columns : stop - first * columns]


def _grid(shape: tuple[int, ...]) -> tuple[int, int]:
    """How many blocks lie below and beside each other."""
    return (shape[-2], shape[-1]) if len(shape) > 1 else (shape[0] if shape else 1, 1)


def _block(numbers: int, blocks: int) -> int:
    """How many numbers a block has: BLOCK, the last one perhaps fewer, or all the same. 0: that cannot be."""
    if -(-numbers // BLOCK) == blocks:
        return BLOCK
    return numbers // blocks if numbers % blocks == 0 else 0


def _packed(source: Source) -> Mapping[str, _Coded]:
    """Weights in MXFP4, by name."""
    names, found = set(source.names()), {}
    for codes in names:
        name = codes.removesuffix(PACKED_BLOCKS)
        scales, shape = name + PACKED_SCALES, source.shape(codes)
        if name == codes or scales not in names or len(shape) != 4 or source.dtype(codes) != torch.uint8:
            continue
        if source.shape(scales) != shape[:3] or shape[3] != 16:
            raise CheckpointError(f"{codes} has shape {shape} and {scales} {source.shape(scales)}: they do not fit")
        found[name] = _Coded(codes, scales, (shape[0], 2 * shape[2] * shape[3], shape[1]))
    return dict(sorted(found.items()))


def _in_blocks(source: Source) -> Mapping[str, _Coded]:
    """Weights in float8, by name; a weight that has no scales is what it is."""
    names, found = set(source.names()), {}
    for name in names:
        scales = next((name + ending for ending in BLOCK_SCALES if name + ending in names), None)
        if scales is None or source.dtype(name) not in (torch.float8_e4m3fn, torch.float8_e5m2):
            continue
        shape, grid = source.shape(name), source.shape(scales)
        down, across = _grid(grid)
        fits = len(shape) > 1 and _block(shape[-2], down) and _block(shape[-1], across) and shape[:-2] == grid[:-2]
        if not fits:
            raise CheckpointError(f"{name} has shape {shape} and {scales} {grid}: the blocks do not divide it")
        found[name] = _Coded(name, scales, shape)
    return dict(sorted(found.items()))
