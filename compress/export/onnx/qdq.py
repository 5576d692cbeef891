"""x times a uniform weight in nothing but standard operators, as runtimes recognise them: DequantizeLinear, MatMul.

The codes lie as (I, O), the way the operator wants them, so the file does not hold the packed folder's own bytes here.

Shapes: O = out features, I = in features, G = groups of columns, K = blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from compress.encodings.bits import pack_bits, unpack_bits
from compress.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from compress.export.onnx.weights import WeightSource

CODE_TYPES = {2: ir.DataType.UINT2, 4: ir.DataType.UINT4, 8: ir.DataType.UINT8}
QDQ_BLOCKS = (256, 128, 64, 32, 16)  # onnxruntime turns these into its own operator


def dequantize_linear(source: WeightSource) -> ir.Value | None:
    """(I, O) float32, packed in the file and in memory; None where the operator has no such codes."""
    form, (rows, columns) = source.form, source.shape
    if form is None or not form.steps or form.bits not in CODE_TYPES or source.kept is not None:
        return None
    ops, kind, bits, leaf = source.ops, CODE_TYPES[form.bits], form.bits, f"{source.prefix}scale"
    (there, groups), dtype = source.tensors[leaf]
    if there < rows or "outer_scale" in source.beside:
        return None
    size = columns // groups
    block = next((b for b in QDQ_BLOCKS if size % b == 0), None)
    if groups > 1 and block is None:
        return None
    if bits == 2 and rows % 4:  # onnxruntime 1.31 computes something else when a row of (I, O) ends inside a byte
        return None
    blocks = 1 if groups == 1 or block is None else columns // block
    turned = lambda: _turned(source.read(f"{source.prefix}codes"), columns, bits)  # noqa: E731
    codes = ops.stored(f"{source.prefix}codes", (columns, rows), kind, turned)

    def repeated(table: Tensor) -> Tensor:
        return table.repeat_interleave(blocks // groups, dim=1)

    shape = (rows,) if groups == 1 else (blocks, rows)
    scale = ops.stored(leaf, shape, dtype, lambda: repeated(source.read(leaf)).T.reshape(shape))
    if dtype != torch.float32:
        scale = ops.cast(scale, torch.float32)

    def zero_points() -> Tensor:
        zeros = source.lookup().steps_from()
        return pack_bits(repeated(zeros).T.reshape(1, -1), bits)[0]

    middle = ops.stored(f"{source.prefix}zero_point", shape, kind, zero_points)
    if groups == 1:
        return ops.op("DequantizeLinear", codes, scale, middle, axis=1)
    return ops.op("DequantizeLinear", codes, scale, middle, axis=0, block_size=block)


def _turned(packed: Tensor, columns: int, bits: int) -> Tensor:
    """(O, row bytes) -> the codes of (I, O), packed without padding."""
    return pack_bits(unpack_bits(packed, bits, columns).T.reshape(1, -1), bits)[0]
