"""Nodes and constants of one layer of an ONNX graph, written down one after the other.

A constant is known by its shape and type; its numbers are asked for when the file is written, and again when it is read
back, so that no more than one of them is in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
from onnx_ir.tensor_adapters import TorchTensor

from compress.encodings.bits import row_bytes
from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

MICROSOFT = "com.microsoft"  # the domain of onnxruntime's own operators
ONNX_TYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.uint8: ir.DataType.UINT8,
    torch.int8: ir.DataType.INT8,
    torch.int32: ir.DataType.INT32,
    torch.int64: ir.DataType.INT64,
    torch.bool: ir.DataType.BOOL,
    torch.float8_e4m3fn: ir.DataType.FLOAT8E4M3FN,
}
Attribute = int | float | str | Sequence[int]


class Ops:
    """The nodes of a layer, in order, and its constants.

    Attributes:
        nodes: in the order they were asked for.
        constants: by name; all names begin with the layer's.
    """

    def __init__(self, layer: str, shared: dict[str, ir.Value] | None = None):
        """`shared` are constants that several layers use."""
        self.layer = layer
        self.nodes: list[ir.Node] = []
        self.constants: dict[str, ir.Value] = {}
        self.shared = {} if shared is None else shared

    def op(self, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: Attribute | None) -> ir.Value:
        """The one output of a new node; attributes that are None are left out."""
        name = f"{self.layer}/{kind}_{len(self.nodes)}"
        output = ir.Value(name=name)
        given = {key: value for key, value in attributes.items() if value is not None}
        made = ir.convenience.convert_attributes(given)
        self.nodes.append(ir.Node(domain, kind, inputs, made, outputs=[output], name=name))
        return output

    def stored(
        self, leaf: str, shape: Sequence[int], dtype: torch.dtype | ir.DataType, read: Callable[[], Tensor]
    ) -> ir.Value:
        """A constant of the layer that is read when it is wanted; codes of less than a byte come packed."""
        name = f"{self.layer}.{leaf}"
        if name not in self.constants:
            self.constants[name] = constant(name, shape, dtype, read)
        return self.constants[name]

    def small(self, value: Tensor) -> ir.Value:
        """A constant that is small, the same one for all layers with these numbers."""
        raw: Any = value.contiguous().flatten().view(torch.uint8).numpy()
        said = f"{value.dtype}{list(value.shape)}".encode() + memoryview(raw).tobytes()
        name = f"constant_{hashlib.sha256(said).hexdigest()[:16]}"
        if name not in self.shared:
            self.shared[name] = constant(name, value.shape, value.dtype, lambda: value)
        return self.shared[name]

    def ints(self, *numbers: int) -> ir.Value:
        """(len,) int64: a shape, or axes."""
        return self.small(torch.tensor(numbers, dtype=torch.int64))

    def number(self, value: float) -> ir.Value:
        """A float32 scalar."""
        return self.small(torch.tensor(value, dtype=torch.float32))

    def reshape(self, x: ir.Value, *shape: int) -> ir.Value:
        """Does what torch's `view` does."""
        return self.op("Reshape", x, self.ints(*shape))

    def cast(self, x: ir.Value, dtype: torch.dtype) -> ir.Value:
        """A value in another type."""
        return self.op("Cast", x, to=int(ONNX_TYPES[dtype]))

    def expand(self, x: ir.Value, *shape: int) -> ir.Value:
        """Repeated along axes of length one."""
        return self.op("Expand", x, self.ints(*shape))


def constant(name: str, shape: Sequence[int], dtype: torch.dtype | ir.DataType, read: Callable[[], Tensor]) -> ir.Value:
    """A constant that is read when it is wanted."""
    kind = ONNX_TYPES[dtype] if isinstance(dtype, torch.dtype) else dtype

    def made() -> Any:
        value = read().contiguous()
        if isinstance(dtype, ir.DataType) and dtype.bitwidth < 8:
            return ir.PackedTensor(value.flatten().numpy(), kind, shape=ir.Shape(shape), name=name)
        return TorchTensor(value, name=name)

    lazy = ir.LazyTensor(made, kind, ir.Shape(shape), name=name)
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(kind), const_value=lazy)


def unpacked(ops: Ops, stream: ir.Value, bits: int, rows: int, count: int) -> ir.Value:
    """Rows of a dense bit stream -> (rows, count) uint8 codes, in standard operators over constants: done at load."""
    there = row_bytes(count, bits)
    if bits == 8:
        return stream
    if 8 % bits == 0:
        found = ops.op("Gather", lanes(ops, bits), ops.cast(stream, torch.int32), axis=0)
        return first_columns(ops, ops.reshape(found, rows, there * (8 // bits)), count, there * (8 // bits))
    missing = -there % bits
    if missing:
        zeros = ops.small(torch.zeros(1, 1, dtype=torch.uint8))
        stream = ops.op("Concat", stream, ops.expand(zeros, rows, missing), axis=1)
    words = (there + missing) // bits
    word = ops.reshape(stream, rows, words, bits)
    first = [i * bits // 8 for i in range(8)]
    down = [i * bits % 8 for i in range(8)]
    # What a code has of a second byte; of a code that has none, a bit beyond its width, which the mask takes away.
    second = [f + 1 if d + bits > 8 else f for f, d in zip(first, down, strict=True)]
    up = [8 - d if d + bits > 8 else 7 for d in down]
    low = ops.op("BitShift", ops.op("Gather", word, ops.ints(*first), axis=2), _bytes(ops, down), direction="RIGHT")
    high = ops.op("BitShift", ops.op("Gather", word, ops.ints(*second), axis=2), _bytes(ops, up), direction="LEFT")
    codes = ops.op("BitwiseAnd", ops.op("BitwiseOr", low, high), _bytes(ops, [2**bits - 1]))
    return first_columns(ops, ops.reshape(codes, rows, words * 8), count, words * 8)


def lanes(ops: Ops, bits: int) -> ir.Value:
    """(256, 8 / bits) uint8: the codes in every byte."""
    every = torch.arange(256, dtype=torch.int32)[:, None]
    codes = (every >> (bits * torch.arange(8 // bits, dtype=torch.int32))) & (2**bits - 1)
    return ops.small(codes.to(torch.uint8))


def repacked(ops: Ops, codes: ir.Value, bits: int, rows: int, count: int) -> ir.Value:
    """(rows, count) uint8 codes -> (rows, count * bits / 8) uint8; `count` fills whole bytes."""
    each = 8 // bits
    if each == 1:
        return codes
    grouped = ops.reshape(codes, rows, count // each, each)
    made = ops.op("Gather", grouped, ops.small(torch.tensor(0)), axis=2)
    for i in range(1, each):
        lane = ops.op("Gather", grouped, ops.small(torch.tensor(i)), axis=2)
        made = ops.op("BitwiseOr", made, ops.op("BitShift", lane, _bytes(ops, [bits * i]), direction="LEFT"))
    return made


def pad_columns(ops: Ops, codes: ir.Value, rows: int, count: int, to: int) -> ir.Value:
    """(rows, count) uint8 -> (rows, to), with zeros behind."""
    if to == count:
        return codes
    zeros = ops.expand(ops.small(torch.zeros(1, 1, dtype=torch.uint8)), rows, to - count)
    return ops.op("Concat", codes, zeros, axis=1)


def first_columns(ops: Ops, x: ir.Value, count: int, there: int) -> ir.Value:
    """The first `count` of `there` columns."""
    return x if count == there else ops.op("Slice", x, ops.ints(0), ops.ints(count), ops.ints(1))


def _bytes(ops: Ops, numbers: list[int]) -> ir.Value:
    return ops.small(torch.tensor(numbers, dtype=torch.uint8))
