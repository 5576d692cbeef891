"""x times a uniform weight in nothing but standard operators, as runtimes recognise them: DequantizeLinear, MatMul.

The codes lie as (I, O), the way the operator wants them, so the file does not hold the packed folder's own bytes here.

Shapes: O = out features, I = in features, G = groups of columns, K = blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from compress.encodings.bits import pack_bits, unpack_bits
from compress.encodings.uniform import UniformForm
from compress.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from compress.export.onnx.weights import Source

KINDS = {2: ir.DataType.UINT2, 4: ir.DataType.UINT4, 8: ir.DataType.UINT8}
BLOCKS = (256, 128, 64, 32, 16)  # onnxruntime turns these into its own operator


def dequantized(source: Source) -> ir.Value | None:
    """(I, O) float32, packed in the file and in memory; None where the operator has no such codes."""
    form = source.form
    if not isinstance(form, UniformForm) or form.bits not in KINDS or source.kept is not None or form.per_tensor:
        return None
    ops, kind, (rows, columns) = source.ops, KINDS[form.bits], source.shape
    size = columns // form.groups
    block = next((b for b in BLOCKS if size % b == 0), None)
    if form.groups > 1 and block is None:
        return None
    if form.bits == 2 and rows % 4:  # onnxruntime 1.31 computes something else when a row of (I, O) ends inside a byte
        return None
    blocks = 1 if form.groups == 1 or block is None else columns // block
    bits = form.bits
    turned = lambda: _turned(source.read(f"{source.prefix}codes"), columns, bits)  # noqa: E731
    codes = ops.stored(f"{source.prefix}codes", (columns, rows), kind, turned)
    leaf = f"{source.prefix}scale"
    dtype = source.tensors[leaf][1]

    def repeated(table: Tensor) -> Tensor:
        return table.repeat_interleave(blocks // form.groups, dim=1)

    shape = (rows,) if form.groups == 1 else (blocks, rows)
    scale = ops.stored(leaf, shape, dtype, lambda: repeated(source.read(leaf)).T.reshape(shape))
    if dtype != torch.float32:
        scale = ops.cast(scale, torch.float32)

    def zero_points() -> Tensor:
        if form.symmetric:
            zeros = torch.full((rows, form.groups), 2 ** (form.bits - 1), dtype=torch.uint8)
        else:
            zeros = unpack_bits(source.read(f"{source.prefix}zero_point"), form.bits, form.groups)
        return pack_bits(repeated(zeros).T.reshape(1, -1), form.bits)[0]

    middle = ops.stored(f"{source.prefix}zero_point", shape, kind, zero_points)
    if form.groups == 1:
        return ops.op("DequantizeLinear", codes, scale, middle, axis=1)
    return ops.op("DequantizeLinear", codes, scale, middle, axis=0, block_size=block)


def _turned(packed: Tensor, columns: int, bits: int) -> Tensor:
    """(O, row bytes) -> the codes of (I, O), packed without padding."""
    return pack_bits(unpack_bits(packed, bits, columns).T.reshape(1, -1), bits)[0]
