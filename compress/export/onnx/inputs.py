"""Rounding of a layer's input to its grid, in standard operators."""

from collections.abc import Callable

import onnx_ir as ir
import torch
from torch import Tensor

from compress.encodings.inputs import InputForm
from compress.export.onnx.ops import Ops


def rounded(ops: Ops, x: ir.Value, form: InputForm, read: Callable[[str], Tensor]) -> ir.Value:
    """(..., C) float32 -> the nearest values of the grid."""
    assert form.grid == "int", "the exporter refuses others"
    if not form.static:
        return _per_token(ops, x, form.bits)
    scale, zero = read("input_scale")[0], read("input_zero_point")[0]
    if form.bits == 8:
        step = ops.stored("input_scale", (), torch.float32, lambda: scale)
        middle = ops.stored("input_zero_point", (), torch.uint8, lambda: zero)
        return ops.op("DequantizeLinear", ops.op("QuantizeLinear", x, step, middle), step, middle)
    step = ops.stored("input_scale", (), torch.float32, lambda: scale)
    middle = ops.cast(ops.stored("input_zero_point", (), torch.uint8, lambda: zero), torch.float32)
    return _on_steps(ops, x, step, middle, form.bits)


def _per_token(ops: Ops, x: ir.Value, bits: int) -> ir.Value:
    last, zero, most = ops.ints(-1), ops.number(0), ops.number(2**bits - 1)
    low = ops.op("Min", ops.op("ReduceMin", x, last, keepdims=1), zero)
    high = ops.op("Max", ops.op("ReduceMax", x, last, keepdims=1), zero)
    scale = ops.op("Div", ops.op("Sub", high, low), most)
    scale = ops.op("Where", ops.op("Greater", scale, zero), scale, ops.number(1))
    middle = ops.op("Clip", ops.op("Round", ops.op("Div", ops.op("Neg", low), scale)), zero, most)
    return _on_steps(ops, x, scale, middle, bits)


def _on_steps(ops: Ops, x: ir.Value, scale: ir.Value, middle: ir.Value, bits: int) -> ir.Value:
    steps = ops.op("Add", ops.op("Round", ops.op("Div", x, scale)), middle)
    codes = ops.op("Clip", steps, ops.number(0), ops.number(2**bits - 1))
    return ops.op("Mul", ops.op("Sub", codes, middle), scale)
