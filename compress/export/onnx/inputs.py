"""What a layer makes of its input, rounded or with zeros, in standard operators."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.encodings.outlier_victim import PAIR_TYPES
from compress.encodings.power import PowerGrid
from compress.encodings.rounded_inputs import E4M3
from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir
    from torch import Tensor

    from compress.encodings.inputs import InputForm
    from compress.encodings.outlier_victim import PairType
    from compress.export.onnx.ops import Ops


def on_grid(ops: Ops, x: ir.Value, form: InputForm, read: Callable[[str], Tensor], columns: int) -> ir.Value:
    """(..., C) float32 -> the nearest values of the grid, or with what is skipped zero; C is the number of columns."""
    if form.grid == "threshold":
        threshold = ops.stored("input_threshold", (columns,), torch.float32, lambda: read("input_threshold"))
        return ops.op("Where", ops.op("LessOrEqual", ops.op("Abs", x), threshold), ops.number(0), x)
    if form.grid == "fp8":
        stored = ops.stored("input_scale", (), torch.float32, lambda: read("input_scale")[0]) if form.static else None
        return _on_floats(ops, x, stored or _float_scale(ops, x))
    if not form.static:
        return _per_token(ops, x, form.bits)
    scale = read("input_scale")[0]
    if form.kind.paired:
        assert form.normal is not None
        return _on_pairs(
            ops, x, ops.stored("input_scale", (), torch.float32, lambda: scale), PAIR_TYPES[form.normal], columns
        )
    if form.grid == "power":
        grid = PowerGrid(form.bits, float(read("input_exponent")), "zero")
        return _on_powers(ops, x, ops.stored("input_scale", (), torch.float32, lambda: scale), grid)
    zero = read("input_zero_point")[0]
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


def _float_scale(ops: Ops, x: ir.Value) -> ir.Value:
    """(..., 1): the scale by which the largest number of each token is the largest float of 8 bits."""
    largest = ops.op("ReduceMax", ops.op("Abs", x), ops.ints(-1), keepdims=1)
    scale = ops.op("Div", largest, ops.number(E4M3.largest))
    return ops.op("Where", ops.op("Greater", scale, ops.number(0)), scale, ops.number(1))


def _on_floats(ops: Ops, x: ir.Value, scale: ir.Value) -> ir.Value:
    """The nearest E4M3 number times its scale; what is too large is the largest."""
    codes = ops.cast(ops.op("Div", x, scale), torch.float8_e4m3fn)
    return ops.op("Mul", ops.cast(codes, torch.float32), scale)


def _on_powers(ops: Ops, x: ir.Value, scale: ir.Value, grid: PowerGrid) -> ir.Value:
    """The nearest levels that a power spaces, as `PowerGrid.nearest`."""
    unit = ops.op("Div", x, scale)
    last = len(grid.values) - 1
    size = ops.op("Min", ops.op("Abs", unit), ops.number(1))
    along = ops.op("Mul", ops.op("Pow", size, ops.number(grid.exponent)), ops.op("Sign", unit))
    place = ops.op("Mul", ops.op("Add", along, ops.number(1)), ops.number(last / 2))
    below = ops.cast(ops.op("Min", ops.op("Floor", place), ops.number(last - 1)), torch.int64)
    above = ops.op("Greater", unit, ops.op("Gather", ops.small(grid.borders), below))
    code = ops.op("Add", below, ops.cast(above, torch.int64))
    return ops.op("Mul", ops.op("Gather", ops.small(grid.values), code), scale)


def _on_pairs(ops: Ops, x: ir.Value, scale: ir.Value, kind: PairType, columns: int) -> ir.Value:
    """Outlier-victim pairs along the last dimension."""
    units = ops.op("Div", x, scale)
    magnitude = ops.op("Abs", units)
    paired = columns - columns % 2
    even, odd = (_every_other(ops, magnitude, first, paired) for first in (0, 1))
    border = ops.number(kind.border)
    # Of two outliers the larger one stays, the even one if they are equal.
    stays = (
        ops.op("And", ops.op("GreaterOrEqual", even, border), ops.op("GreaterOrEqual", even, odd)),
        ops.op("And", ops.op("GreaterOrEqual", odd, border), ops.op("Greater", odd, even)),
    )
    made = []
    for own, kept, other in ((even, stays[0], stays[1]), (odd, stays[1], stays[0])):
        beside = ops.op("Where", other, ops.number(0), _normal(ops, own, kind))
        made.append(ops.op("Unsqueeze", ops.op("Where", kept, _outlier(ops, own, kind), beside), ops.ints(-1)))
    whole = ops.op("Concat", *made, axis=-1)
    if columns == paired:
        found = ops.op("Reshape", whole, ops.op("Shape", x))
    else:  # the last column has no partner to sacrifice
        last = ops.op("Slice", magnitude, ops.ints(paired), ops.ints(columns), ops.ints(-1))
        lead = ops.op("Slice", ops.op("Shape", x), ops.ints(0), ops.ints(-1), ops.ints(0))
        flat = ops.op("Reshape", whole, ops.op("Concat", lead, ops.ints(paired), axis=0))
        found = ops.op("Concat", flat, _normal(ops, last, kind), axis=-1)
    return ops.op("Mul", ops.op("Mul", found, ops.op("Sign", units)), scale)


def _every_other(ops: Ops, x: ir.Value, first: int, end: int) -> ir.Value:
    return ops.op("Slice", x, ops.ints(first), ops.ints(end), ops.ints(-1), ops.ints(2))


def _normal(ops: Ops, magnitude: ir.Value, kind: PairType) -> ir.Value:
    """The nearest normal magnitudes, as `PairType.nearest`."""
    found = ops.op("Min", ops.op("Round", magnitude), ops.number(kind.ones))
    for start, step, count in kind.ramps:
        along = ops.op("Round", ops.op("Div", ops.op("Sub", magnitude, ops.number(start)), ops.number(step)))
        along = ops.op("Clip", along, ops.number(0), ops.number(count))
        found = ops.op("Add", found, ops.op("Mul", along, ops.number(step)))
    return found


def _outlier(ops: Ops, magnitude: ir.Value, kind: PairType) -> ir.Value:
    """The nearest outlier magnitudes, half-way up: how many borders between them lie below."""
    values = kind.outliers[1 : kind.last + 1]
    borders = (values[1:] + values[:-1]) / 2
    above = ops.op("GreaterOrEqual", ops.op("Unsqueeze", magnitude, ops.ints(-1)), ops.small(borders))
    count = ops.op("ReduceSum", ops.cast(above, torch.int32), ops.ints(-1), keepdims=0)
    return ops.op("Gather", ops.small(values), count, axis=0)
