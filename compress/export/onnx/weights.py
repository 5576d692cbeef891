"""What a packed weight stands for, in standard operators over the very tensors that the packed folder holds.

Nothing here depends on an input, so a runtime computes it once, while it loads.

Shapes: O = out features, I = in features, G = groups of columns, R = O or 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

from compress.encodings import FACTORED
from compress.encodings.bits import row_bytes
from compress.encodings.codebook import index_bits
from compress.export.onnx.ops import first_columns, lanes, unpacked
from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir
    from torch import Tensor

    from compress.encodings import Form, LowRankForm, Spec
    from compress.encodings.base import StoredShapes
    from compress.encodings.lookup import Lookup
    from compress.export.onnx.ops import Ops

ReadTensor: TypeAlias = "Callable[[str], Tensor]"


@dataclass(frozen=True)
class WeightSource:
    """Where the tensors of a packed weight, or of one factor of its correction, are.

    Attributes:
        ops: of the layer.
        shape: (O, I).
        form: of the codes; None where there are values.
        tensors: shape and type of each, by its leaf in the file.
        read: a tensor by its leaf.
        kept: number of kept weights; None when dense.
        prefix: of the leaves.
    """

    ops: Ops
    shape: tuple[int, int]
    form: Form | None
    tensors: StoredShapes
    read: ReadTensor
    kept: int | None = None
    prefix: str = ""

    def value(self, leaf: str, *shape: int) -> ir.Value:
        """A stored tensor as a constant, in another shape with the same bytes if one is given."""
        name = f"{self.prefix}{leaf}"
        there, dtype = self.tensors[name]
        wanted = shape or there
        return self.ops.stored(name, wanted, dtype, lambda: self.read(name).reshape(wanted))

    def floats(self, leaf: str) -> ir.Value:
        """A stored tensor of floats as float32."""
        value, dtype = self.value(leaf), self.tensors[f"{self.prefix}{leaf}"][1]
        return value if dtype == torch.float32 else self.ops.cast(value, torch.float32)

    def derived(self, leaf: str, value: Tensor) -> ir.Value:
        """A constant made of small stored ones."""
        return self.ops.stored(f"{self.prefix}{leaf}", value.shape, value.dtype, lambda: value)

    def lookup(self) -> Lookup:
        """What the codes mean. Reads everything beside them, and keeps nothing."""
        assert self.form is not None
        return self.form.lookup(self.shape, {leaf: self.read(f"{self.prefix}{leaf}") for leaf in self.beside})

    @property
    def beside(self) -> tuple[str, ...]:
        """The leaves beside the codes, without the prefix."""
        return () if self.form is None else tuple(self.form.tables(self.shape))

    def scale(self) -> ir.Value:
        """(O, G) float32, or (1, G) where all rows share them; with the scale of the scales in it."""
        if self.form is not None and self.form.super_blocks:
            return self.of_super_blocks("scale")
        found = self.floats("scale") if self.scale_table is None else self._scale_in_bytes(self.scale_table)
        if "outer_scale" in self.beside:
            found = self.ops.op("Mul", found, self.floats("outer_scale"))
        return self.per_row(found)

    def offset(self) -> ir.Value | None:
        """(O, G) float32, what is subtracted in the blocks that have scales; None where nothing is."""
        return self.of_super_blocks("offset") if "offset" in self.beside else None

    def of_super_blocks(self, leaf: str) -> ir.Value:
        """(O, G) float32: whole numbers of a few bits, times one for all blocks of a super-block."""
        assert self.form is not None
        ops, rows, groups = self.ops, self.shape[0], self.form.groups_of(self.shape[1])
        (_, stored), _ = self.tensors[f"{self.prefix}{leaf}"]
        bits, outer = 8 * stored // groups, self.tensors[f"{self.prefix}outer_{leaf}"][0][1]
        whole = ops.cast(unpacked(ops, self.value(leaf), bits, rows, groups), torch.float32)
        if "offset" not in self.beside:
            whole = ops.op("Sub", whole, ops.number(2.0 ** (bits - 1)))
        whole = ops.reshape(whole, rows, outer, groups // outer)
        shared = ops.op("Unsqueeze", self.floats(f"outer_{leaf}"), ops.ints(-1))
        return ops.reshape(ops.op("Mul", whole, shared), rows, groups)

    @property
    def scale_table(self) -> Tensor | None:
        """What each byte of the scales means; None where they are floats."""
        return None if self.form is None else self.form.scale_table(torch.device("cpu"))

    def _scale_in_bytes(self, table: Tensor) -> ir.Value:
        """(R, G) float32."""
        return self.ops.op("Gather", self.ops.small(table), self.ops.cast(self.value("scale"), torch.int32), axis=0)

    def per_row(self, value: ir.Value) -> ir.Value:
        """(R, G), a number for each block -> (O, G); one row stays one."""
        (there, groups), rows = self.tensors[f"{self.prefix}scale"][0], self.shape[0]
        if there in (1, rows):
            return value
        value = self.ops.expand(self.ops.op("Unsqueeze", value, self.ops.ints(1)), there, rows // there, groups)
        return self.ops.reshape(value, rows, groups)


def source_of(ops: Ops, spec: Spec, read: ReadTensor) -> WeightSource:
    """The source of the weight itself."""
    return WeightSource(ops, spec.shape, spec.form, spec.tensors(), read, spec.kept)


def factor(source: WeightSource, form: LowRankForm, side: str) -> WeightSource:
    """The source of one factor of the correction beside a weight."""
    shape = form.shapes(source.shape)[side]
    return replace(source, shape=shape, form=form.factor_form(side), kept=None, prefix=f"lora_{side}_")


def mask(source: WeightSource, spec: Spec) -> ir.Value | None:
    """(O, I) bool, true where a weight is kept; None when dense."""
    ops, (rows, columns) = source.ops, spec.shape
    if spec.kept is None:
        return None
    if spec.pattern is None:
        return ops.cast(unpacked(ops, source.value("mask"), 1, rows, columns), torch.bool)
    words = unpacked(ops, source.value("pattern"), spec.pattern.bits, rows, spec.pattern.words(columns))
    found = ops.op("Gather", ops.small(spec.pattern.table()), ops.cast(words, torch.int32), axis=0)
    width = spec.pattern.words(columns) * spec.pattern.ranks * spec.pattern.of
    found = ops.reshape(found, rows, width)
    return found if width == columns else ops.op("Slice", found, ops.ints(0), ops.ints(columns), ops.ints(1))


def codes(source: WeightSource, kept: ir.Value | None) -> ir.Value:
    """(O, I) uint8; under a mask any code."""
    ops, form, (rows, columns) = source.ops, source.form, source.shape
    assert form is not None
    if kept is None or form.stores_idle:
        return unpacked(ops, source.value("codes"), form.bits, rows, columns)
    assert source.kept is not None
    if source.kept == 0:
        return ops.expand(ops.small(torch.zeros((), dtype=torch.uint8)), rows, columns)
    stream = source.value("codes", 1, source.tensors["codes"][0][0])
    return _at_kept(ops, unpacked(ops, stream, form.bits, 1, source.kept), source.kept, kept, source.shape)


def dense(source: WeightSource, kept: ir.Value | None) -> ir.Value:
    """(O, I) float32: the weight without its correction."""
    ops, shape = source.ops, source.shape
    if source.form is None and kept is None:
        return source.floats("values")
    if source.kept == 0:
        return ops.expand(ops.number(0), *shape)
    if source.form is None:
        assert kept is not None
        assert source.kept is not None
        values = _at_kept(ops, ops.reshape(source.floats("values"), 1, source.kept), source.kept, kept, shape)
    else:
        values = dequantized(source, kept)
    return values if kept is None else ops.op("Where", kept, values, ops.number(0))


def dequantized(source: WeightSource, kept: ir.Value | None) -> ir.Value:
    """(O, I) float32 of the codes; under a mask anything."""
    ops, (rows, columns), lookup = source.ops, source.shape, source.lookup()
    if source.form is not None and source.form.steps:
        groups = _groups(lookup)
        grouped = ops.reshape(ops.cast(codes(source, kept), torch.float32), rows, groups, columns // groups)
        centred = ops.op("Sub", grouped, ops.op("Unsqueeze", zero_points(source), ops.ints(-1)))
        scale = ops.op("Unsqueeze", source.scale(), ops.ints(-1))
        return ops.reshape(ops.op("Mul", centred, scale), rows, columns)
    if lookup.table.codes_per_index > 1:
        values = pair_entries(source, ops.small(lookup.table.values[0]))
    else:
        values = looked_up(source, lookup, _lookup_table(source, lookup), kept)
    if lookup.scale is None:
        return values
    groups = _groups(lookup)
    # Levels that a form makes are cut into groups even where there is one, so that files stay as they always were.
    if groups == 1 and ("table" in source.beside or lookup.table.codes_per_index > 1):
        return ops.op("Mul", values, source.scale())
    grouped = ops.reshape(values, rows, groups, columns // groups)
    found, offset = ops.op("Mul", grouped, ops.op("Unsqueeze", source.scale(), ops.ints(-1))), source.offset()
    if offset is not None:
        found = ops.op("Sub", found, ops.op("Unsqueeze", offset, ops.ints(-1)))
    return ops.reshape(found, rows, columns)


def zero_points(source: WeightSource) -> ir.Value:
    """(O, G) or (1, G) float32 of codes that count steps; (1, 1) where none are stored."""
    ops, form = source.ops, source.form
    assert form is not None
    if "zero_point" not in source.beside:
        return ops.small(torch.full((1, 1), 2.0 ** (form.bits - 1)))
    rows, groups = source.tensors[f"{source.prefix}scale"][0]
    return ops.cast(source.per_row(unpacked(ops, source.value("zero_point"), form.bits, rows, groups)), torch.float32)


def looked_up(source: WeightSource, lookup: Lookup, table: ir.Value, kept: ir.Value | None) -> ir.Value:
    """(O, I): for every code, the entry of its row's table, or of the only one; `table` has the lookup's shape."""
    ops, form, (rows, columns) = source.ops, source.form, source.shape
    assert form is not None
    entries = lookup.table.values.shape[1]
    if lookup.row_table is None and kept is None and form.bits in (2, 4):  # a byte at a time: a fraction of the memory
        last = ops.small(torch.tensor(entries - 1, dtype=torch.int32))  # no stored byte holds a code beyond it
        index = ops.op("Min", ops.cast(lanes(ops, form.bits), torch.int32), last)
        by_byte = ops.op("Gather", ops.reshape(table, -1), index, axis=0)
        there = row_bytes(columns, form.bits) * (8 // form.bits)
        found = ops.op("Gather", by_byte, ops.cast(source.value("codes"), torch.int32), axis=0)
        return first_columns(ops, ops.reshape(found, rows, there), columns, there)
    index = ops.cast(codes(source, kept), torch.int32)
    if lookup.row_table is not None:
        first = ops.cast(row_tables(source, lookup), torch.int32)
        first = ops.op("Mul", first, ops.small(torch.tensor(entries, dtype=torch.int32)))
        index = ops.op("Add", index, ops.reshape(first, rows, 1))
    return ops.op("Gather", ops.reshape(table, -1), index, axis=0)


def row_tables(source: WeightSource, lookup: Lookup) -> ir.Value:
    """(1, O): the table of each row, where there are several."""
    assert lookup.row_table is not None
    if "row_group" in source.beside:
        bits = index_bits(len(lookup.table.values))
        return unpacked(source.ops, source.value("row_group"), bits, 1, source.shape[0])
    return source.derived("row_table", lookup.row_table[None])


def pair_entries(source: WeightSource, table: ir.Value) -> ir.Value:
    """(O, I): the entries of a table of pairs, two neighbouring columns per pair."""
    ops, form, (rows, columns) = source.ops, source.form, source.shape
    assert form is not None
    count = -(-columns // 2)
    if form.bits == 4:  # a byte is a pair
        index = ops.cast(source.value("codes"), torch.int32)
    else:
        even = source.value("codes")
        if columns % 2:
            zeros = ops.expand(ops.small(torch.zeros(1, 1, dtype=torch.uint8)), rows, 1)
            even = ops.op("Concat", even, zeros, axis=1)
        halves = ops.reshape(ops.cast(even, torch.int32), rows, count, 2)
        weights = ops.small(torch.tensor([1, 1 << form.bits], dtype=torch.int32))
        index = ops.op("ReduceSum", ops.op("Mul", halves, weights), ops.ints(2), keepdims=0)
    found = ops.reshape(ops.op("Gather", table, index, axis=0), rows, count * 2)
    return found if columns == count * 2 else ops.op("Slice", found, ops.ints(0), ops.ints(columns), ops.ints(1))


def correction(source: WeightSource, form: LowRankForm) -> ir.Value:
    """(O, I) float32: B A."""
    a, b = (thin(factor(source, form, side), form) for side in ("a", "b"))
    return source.ops.op("MatMul", b, a)


def thin(side: WeightSource, form: LowRankForm) -> ir.Value:
    """One factor, float32."""
    if form.bits is not None:
        return dequantized(side, None)
    return replace(side, prefix="").floats(side.prefix.removesuffix("_"))


def whole_weight(source: WeightSource, spec: Spec) -> ir.Value:
    """(O, I) float32: all of it."""
    base = None if spec.kind == FACTORED else dense(source, mask(source, spec))
    if spec.low_rank is None:
        assert base is not None
        return base
    added = correction(source, spec.low_rank)
    return added if base is None else source.ops.op("Add", base, added)


def _lookup_table(source: WeightSource, lookup: Lookup) -> ir.Value:
    """(T, E) float32: the stored table, or what stands for one that the form makes."""
    if "table" in source.beside:
        return source.floats("table")
    return source.derived("levels", lookup.table.values.flatten())


def _groups(lookup: Lookup) -> int:
    return 1 if lookup.scale is None else lookup.scale.groups


def _at_kept(ops: Ops, stream: ir.Value, count: int, kept: ir.Value, shape: tuple[int, int]) -> ir.Value:
    """(1, count) kept values, row after row -> (O, I), each in its place; elsewhere any of them."""
    rows, columns = shape
    flat = ops.reshape(ops.cast(kept, torch.int32), rows * columns)
    places = ops.op("CumSum", flat, ops.small(torch.tensor(0)), exclusive=1)
    last = ops.small(torch.tensor(max(count - 1, 0), dtype=torch.int32))
    places = ops.op("Min", places, last)  # behind the last kept one
    return ops.reshape(ops.op("Gather", ops.reshape(stream, count), places, axis=0), rows, columns)
