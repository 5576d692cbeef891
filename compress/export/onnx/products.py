"""x times a packed weight, in the operator that is quick for it.

`MatMulNBits` takes codes of 2, 4 or 8 bits in blocks of 16 to 256 columns with a scale each. What is stored in other
widths, groups or masks is brought into that form by operators over constants, which run once, while loading; the file
holds the packed folder's own tensors.

Shapes: O = out features, I = in features, G = groups of columns, R = O or 1, K = blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from compress.encodings import FACTORED
from compress.export.onnx import qdq, weights
from compress.export.onnx.inputs import on_grid
from compress.export.onnx.ops import MICROSOFT, pad_columns, repacked, unpacked
from compress.lazy import torch

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor

    from compress.encodings import Form, LowRankForm, Spec
    from compress.encodings.lookup import Lookup
    from compress.export.onnx.ops import Ops
    from compress.export.onnx.weights import WeightSource

PRODUCT_WIDTHS = (2, 4, 8)
PRODUCT_BLOCKS = (128, 64, 32)  # quick in every width; longer ones round inputs more coarsely
MIDDLE = 128  # the code of zero in 8 bits
LARGEST = 127


@dataclass(frozen=True)
class Style:
    """How products are written.

    Attributes:
        kernels: use onnxruntime's own operators; else only standard ones.
        fast: round the tables of other encodings than uniform ones to 8 bits, where that is not exact.
        accuracy_level: of `MatMulNBits`.
    """

    kernels: bool = True
    fast: bool = False
    accuracy_level: Literal[1, 4] = 4


def linear(ops: Ops, x: ir.Value, spec: Spec, read: weights.ReadTensor, style: Style) -> ir.Value:
    """(..., I) -> (..., O), as a packed layer computes it; its bias is added elsewhere."""
    source = weights.source_of(ops, spec, read)
    if spec.inputs is not None:
        x = on_grid(ops, x, spec.inputs, read, spec.shape[1])
    made = None
    if spec.kind != FACTORED:
        kept = weights.mask(source, spec)
        made = kernel(source, x, kept, style) if style.kernels else _standard(source, x)
        made = made or plain_product(ops, x, weights.dense(source, kept))
    if spec.low_rank is not None:
        thin = low_rank(source, x, spec.low_rank, style)
        made = thin if made is None else ops.op("Add", made, thin)
    assert made is not None
    return made


def plain_product(ops: Ops, x: ir.Value, weight: ir.Value) -> ir.Value:
    """X times the transpose of a float32 weight."""
    return ops.op("MatMul", x, ops.op("Transpose", weight, perm=[1, 0]))


def _standard(source: WeightSource, x: ir.Value) -> ir.Value | None:
    weight = qdq.dequantize_linear(source)
    return None if weight is None else source.ops.op("MatMul", x, weight)


def low_rank(source: WeightSource, x: ir.Value, form: LowRankForm, style: Style) -> ir.Value:
    """B (A x)."""
    for side in ("a", "b"):
        part = weights.factor(source, form, side)
        product = None
        if form.bits is not None:
            product = kernel(part, x, None, style) if style.kernels else _standard(part, x)
        x = product or plain_product(source.ops, x, weights.thin(part, form))
    return x


def kernel(source: WeightSource, x: ir.Value, kept: ir.Value | None, style: Style) -> ir.Value | None:
    """X times the weight in `MatMulNBits`; None where no form of it is legal, or exact enough."""
    form = source.form
    if form is not None and form.steps:
        return _steps_product(source, form, x, kept, style)
    if form is None or form.super_blocks or not style.fast:
        return None
    found: ir.Value | None = None
    for codes, scale, groups in _tables(source, kept):
        product = _codes_product(source, x, codes, scale, None, 8, groups, style)
        if product is None:
            return None
        found = product if found is None else source.ops.op("Add", found, product)
    return found


def block_size(columns: int, groups: int) -> int | None:
    """Columns of a block, a part of a group; None where groups are no multiple of a legal one."""
    size = columns // groups
    if groups == 1:  # the last block need not be full
        return next((b for b in PRODUCT_BLOCKS if b <= columns), PRODUCT_BLOCKS[-1])
    return next((b for b in (*PRODUCT_BLOCKS, 16) if size % b == 0), None)


def _steps_product(
    source: WeightSource, form: Form, x: ir.Value, kept: ir.Value | None, style: Style
) -> ir.Value | None:
    """X times codes that count steps."""
    ops, (rows, columns), scales = source.ops, source.shape, source.lookup().scale
    assert scales is not None
    block = block_size(columns, scales.groups)
    if block is None:
        return None
    width, blocks = next(w for w in PRODUCT_WIDTHS if w >= form.bits), -(-columns // block)
    one_row, groups = len(scales.values) == 1 < rows, scales.groups
    zeros = (
        None if "zero_point" not in source.beside and width == form.bits else _packed_zero_points(source, blocks, width)
    )
    scale = _per_block(ops, source.scale(), one_row, groups, rows, blocks)
    as_stored = width == form.bits and kept is None
    if as_stored and columns == blocks * block:
        packed = source.value("codes", rows, blocks, block * width // 8)
        return _matmul(ops, x, packed, scale, zeros, width, source.shape, block, style)
    codes = weights.codes(source, kept)
    if kept is not None:
        grouped = (rows, groups, columns // groups)
        middle = ops.op("Unsqueeze", ops.cast(weights.zero_points(source), torch.uint8), ops.ints(-1))
        there = ops.op("Where", ops.reshape(kept, *grouped), ops.reshape(codes, *grouped), middle)
        codes = ops.reshape(there, rows, columns)
    return _codes_product(source, x, codes, scale, zeros, width, groups, style)


def _codes_product(
    source: WeightSource, x: ir.Value, codes: ir.Value, scale: ir.Value, zeros: ir.Value | None, width: int,
    groups: int, style: Style,
) -> ir.Value | None:  # fmt: skip
    """X times (O, I) codes with (R, G) or (O, K) scales."""
    ops, (rows, columns) = source.ops, source.shape
    block = block_size(columns, groups)
    if block is None:
        return None
    blocks = -(-columns // block)
    whole = pad_columns(ops, codes, rows, columns, blocks * block)
    packed = repacked(ops, whole, width, rows, blocks * block)
    packed = ops.reshape(packed, rows, blocks, block * width // 8)
    return _matmul(ops, x, packed, scale, zeros, width, source.shape, block, style)


def _matmul(
    ops: Ops, x: ir.Value, packed: ir.Value, scale: ir.Value, zeros: ir.Value | None, width: int,
    shape: tuple[int, int], block: int, style: Style,
) -> ir.Value:  # fmt: skip
    rows, columns = shape
    inputs = (x, packed, scale) if zeros is None else (x, packed, scale, zeros)
    attributes = {"K": columns, "N": rows, "bits": width, "block_size": block, "accuracy_level": style.accuracy_level}
    return ops.op("MatMulNBits", *inputs, domain=MICROSOFT, **attributes)


def _per_block(ops: Ops, value: ir.Value, one_row: bool, groups: int, rows: int, blocks: int) -> ir.Value:
    """(R, G) -> (O, K): a number for each block."""
    if groups == blocks and not one_row:
        return value
    value = ops.op("Unsqueeze", value, ops.ints(-1))
    return ops.reshape(ops.expand(value, rows, groups, blocks // groups), rows, blocks)


def _packed_zero_points(source: WeightSource, blocks: int, width: int) -> ir.Value:
    """(O, ceil(K * width / 8)) uint8, packed."""
    ops, form, rows = source.ops, source.form, source.shape[0]
    assert form is not None
    if "zero_point" not in source.beside:
        byte = sum(2 ** (form.bits - 1) << (width * i) for i in range(8 // width))
        return ops.expand(ops.small(torch.full((1, 1), byte, dtype=torch.uint8)), rows, -(-blocks * width // 8))
    there, groups = source.tensors[f"{source.prefix}scale"][0]
    if groups == blocks and width == form.bits and there == rows:
        return source.value("zero_point")
    zeros = source.per_row(unpacked(ops, source.value("zero_point"), form.bits, there, groups))
    zeros = _per_block(ops, zeros, there == 1 < rows, groups, rows, blocks)
    full = blocks + -blocks % (8 // width)
    return repacked(ops, pad_columns(ops, zeros, rows, blocks, full), width, rows, full)


def _tables(source: WeightSource, kept: ir.Value | None) -> list[tuple[ir.Value, ir.Value, int]]:
    """Codes of 8 bits (O, I), scales (O, K) and groups, whose products sum up to the weight; empty where none do."""
    ops, (rows, columns), lookup = source.ops, source.shape, source.lookup()
    groups = 1 if lookup.scale is None else lookup.scale.groups
    block = block_size(columns, groups)
    if block is None or (lookup.scale is None and "table" not in source.beside):
        return []
    found: list[tuple[ir.Value, ir.Value, int]] = []

    def masked(codes: ir.Value) -> ir.Value:
        return codes if kept is None else ops.op("Where", kept, codes, ops.small(_middle_codes(torch.zeros(()))))

    def spread(scale: ir.Value, one_row: bool) -> ir.Value:
        return _per_block(ops, scale, one_row, groups, rows, -(-columns // block))

    one_row = lookup.scale is not None and len(lookup.scale.values) == 1 < rows
    if lookup.table.codes_per_index > 1:
        for values, unit in _terms(lookup.table.values[0]):
            scale = ops.op("Mul", source.scale(), ops.number(unit))
            codes = weights.pair_entries(source, ops.small(_middle_codes(values)))
            found.append((masked(codes), spread(scale, one_row), groups))
    elif "table" in source.beside:
        table = lookup.table.values[..., 0]
        largest = table.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        narrow = source.derived("table", _middle_codes(table / largest * LARGEST))
        codes = weights.looked_up(source, lookup, narrow, kept)
        of_table = source.derived("table_scale", (largest / LARGEST)[:, 0])
        scale = ops.op("Gather", of_table, _row_table(source, lookup), axis=0)
        scale = scale if lookup.scale is None else ops.op("Mul", scale, source.scale())
        found.append((masked(codes), spread(scale, False), groups))
    else:
        levels = lookup.table.values.flatten()
        top = float(levels.abs().max())
        scale = spread(ops.op("Div", source.scale(), ops.number(LARGEST / top)), one_row)
        narrow = source.derived("levels", _middle_codes(levels / top * LARGEST))
        found.append((masked(weights.looked_up(source, lookup, narrow, kept)), scale, groups))
    return found


def _middle_codes(values: Tensor) -> Tensor:
    return (values.round() + MIDDLE).to(torch.uint8)


def _row_table(source: WeightSource, lookup: Lookup) -> ir.Value:
    """(O, 1) int32: the table of each row."""
    ops, rows = source.ops, source.shape[0]
    if lookup.row_table is None:
        return ops.expand(ops.small(torch.zeros(1, 1, dtype=torch.int32)), rows, 1)
    return ops.reshape(ops.cast(weights.row_tables(source, lookup), torch.int32), rows, 1)


def _terms(values: Tensor) -> list[tuple[Tensor, float]]:
    """Whole numbers as sums of 8-bit ones times a unit each, exact; empty where two do not suffice."""
    for unit in (1, 2, 4, 8, 16):
        high = torch.where(values % unit == 0, values / unit, 0.0)
        high = torch.where(values.abs() > LARGEST, high, 0.0) if unit > 1 else values
        low = values - high * unit
        if float(high.abs().max()) <= LARGEST and float(low.abs().max()) <= LARGEST:
            return [(high, float(unit))] if unit == 1 else [(high, float(unit)), (low, 1.0)]
    return []
