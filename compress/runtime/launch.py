"""The quick product as an operator of torch: `torch.ops.compress.packed_product`.

Compilers see one call with a known shape, CUDA graphs record it, and transforms of torch leave it alone. Which kernel
runs, and how it is cut, depends on shapes only.

Shapes: M rows of the input, N = out features, K = in features.
"""

from __future__ import annotations

import importlib.util
from dataclasses import astuple, dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from compress.runtime.arrange import COLUMNS, ROWS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

    from torch import Tensor

OPERATOR = "compress::packed_product"
STEPS, TABLE, PAIRS, GATHER = range(4)  # MODE in `triton_decode`
ONE, EACH, RECORDS, SLABS = range(4)  # GROUPS in `triton_kernels`
SLAB = 32
NO_ESCAPE = -1
WIDE_FROM = 17  # rows of input from which `wide` is quicker
WARPS, MOST_WARPS, LEAST_WARPS = 36, 16, 4  # of `narrow`: on a multiprocessor, and of a program
OLDEST = (8, 0)  # the first devices that multiply bfloat16


@dataclass(frozen=True)
class Product:
    """What the kernels need to know of a weight beside its tensors.

    Attributes:
        rows: N.
        columns: K.
        mode: how codes become values, as in `triton_decode`.
        bits: of an arranged code.
        group: columns that share a scale; 0 where a row has one.
        stride: from a row of scales to the next, 0 where all rows share them.
        zeros: whether zero points are stored; where codes count steps, else from the middle one.
        shared: whether all rows look up one table.
        escape: in pairs, the code whose neighbour means something else; `NO_ESCAPE` where there is none.
    """

    rows: int
    columns: int
    mode: int
    bits: int
    group: int = 0
    stride: int = 1
    zeros: bool = False
    shared: bool = True
    escape: int = NO_ESCAPE

    def numbers(self) -> list[int]:
        """All of it as the operator takes it."""
        return [int(number) for number in astuple(self)]

    def constants(self) -> dict[str, Any]:
        """All of it that the kernels are compiled for."""
        return {
            "GROUP": self.group or COLUMNS, "MODE": self.mode, "BITS": self.bits, "GROUPS": self.groups,
            "ZEROS": self.zeros, "SHARED": self.shared, "ESCAPE": self.escape,
        }  # fmt: skip

    @property
    def nibbles(self) -> bool:
        """Whether codes are arranged to be looked up four at a time."""
        return self.mode in (TABLE, PAIRS)

    @property
    def groups(self) -> int:
        """How scales are applied, as in `triton_kernels`."""
        if not self.group:
            return ONE
        return RECORDS if self.group % COLUMNS == 0 else SLABS if self.group % SLAB == 0 else EACH


@dataclass(frozen=True)
class Cut:
    """How a product is cut into programs.

    Attributes:
        warps: of a program; in `narrow` each takes records of its own, in `wide` rows.
        inputs: rows of the input that a program multiplies.
        ahead: in `narrow`, records that a warp reads in advance.
    """

    warps: int
    inputs: int
    ahead: int = 1


def narrow_cut(product: Product, rows: int, device: torch.device) -> Cut:
    """For M = `rows` up to `WIDE_FROM`, and for what `wide` does not do."""
    # So many programs as there are blocks of rows, and in all about as many warps as the device holds at once.
    blocks, records = -(-product.rows // ROWS), -(-product.columns // COLUMNS)
    most = max(WARPS * _processors(device) // blocks, LEAST_WARPS)
    warps = MOST_WARPS
    while warps > min(most, records):
        warps //= 2
    return Cut(warps, 8 if rows <= 8 else 16)


def wide_cut(rows: int) -> Cut:
    """For M = `rows` from `WIDE_FROM` on."""
    return Cut(4, 16 if rows <= 16 else 32 if rows <= 32 else 64 if rows <= 64 else 128)


def launch(
    x: Tensor, words: Tensor, tables: Tensor, table: Tensor, first: Tensor, zero: Tensor, scale: Tensor,
    numbers: Sequence[int],
) -> Tensor:  # fmt: skip
    """(M, K) of float32, float16 or bfloat16 -> (M, N) of the same.

    Args:
        x: the input.
        words: arranged codes, uint8.
        tables: (T, 8) int32, as of `packed_tables`, for this type; read where `mode` is `TABLE` or `PAIRS`.
        table: (T * 2**bits,) values in the type of x; read where `mode` is `GATHER`, or x float32.
        first: (N,) int32, the table of each row; read unless `shared`.
        zero: (N or 1, G) uint8 zero points; read where there are.
        scale: (N or 1, G) of a float type.
        numbers: those of a `Product`.
    """
    product = _product(tuple(numbers))
    x = x.contiguous()
    y = x.new_empty(len(x), product.rows)
    if not len(x):
        return y
    tensors = [x, words.view(torch.int32), tables, table, first, zero, scale, y]
    if len(x) >= WIDE_FROM and x.dtype != torch.float32 and product.groups != EACH:
        launch_wide(product, tensors, wide_cut(len(x)))
    else:
        launch_narrow(product, tensors, narrow_cut(product, len(x), x.device))
    return y


def launch_narrow(product: Product, tensors: list[Tensor], cut: Cut) -> None:
    """Runs `narrow` on x, words as int32, the other tensors of `launch` in their order, and y."""
    x = tensors[0]
    grid = (-(-product.rows // ROWS), -(-len(x) // cut.inputs))
    full = product.columns % (COLUMNS * cut.warps) == 0
    # How many neighbours a thread holds follows from the narrowest type that the compiler sees the weight made from.
    width = 8 if product.mode == STEPS and product.zeros else 4
    _kernels().narrow[grid](
        *tensors, *_sizes(product, tensors, product.columns), **product.constants(), FULL=full, WIDTH=width,
        P=cut.warps, BM=cut.inputs, AHEAD=cut.ahead, num_warps=cut.warps, num_stages=1,
    )  # fmt: skip


def launch_wide(product: Product, tensors: list[Tensor], cut: Cut, stages: int = 3) -> None:
    """Runs `wide`: arguments as of `launch_narrow`; `stages`: inputs of so many steps are on their way at once."""
    x = tensors[0]
    grid = (-(-product.rows // (ROWS * cut.warps)), -(-len(x) // cut.inputs))
    sizes = _sizes(product, tensors, -(-product.columns // COLUMNS) * COLUMNS)
    _kernels().wide[grid](
        ordered(x), *tensors[1:], *sizes, **product.constants(), P=cut.warps, BM=cut.inputs, STAGES=stages,
        num_warps=cut.warps, num_stages=stages,
    )  # fmt: skip


def _sizes(product: Product, tensors: list[Tensor], columns: int) -> tuple[int, ...]:
    groups = tensors[6].shape[1]
    return len(tensors[0]), product.rows, columns, groups, product.stride * groups


@cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a device; one where the interpreter stands for it."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def _product(numbers: tuple[int, ...]) -> Product:
    rows, columns, mode, bits, group, stride, zeros, shared, escape = numbers
    return Product(rows, columns, mode, bits, group, stride, bool(zeros), bool(shared), escape)


def ordered(x: Tensor) -> Tensor:
    """(M, K) -> (M, K to a multiple of 128), columns of each 32 in the order in which `wide` decodes them."""
    x = torch.nn.functional.pad(x, (0, -x.shape[1] % COLUMNS))
    return x.view(len(x), -1, 4, 2, 2, 2).permute(0, 1, 3, 4, 2, 5).reshape(len(x), -1)


def packed_tables(values: Tensor) -> Tensor:
    """(T, up to 16) values of 16 bits -> (T, 8) int32: the low bytes of four entries a word, then the high bytes."""
    bits = torch.nn.functional.pad(values, (0, 16 - values.shape[1])).view(torch.int16)
    low, high = (bits & 255).to(torch.uint8), (bits >> 8 & 255).to(torch.uint8)
    return torch.cat([low.view(torch.int32), high.view(torch.int32)], 1).contiguous()


def usable(device: torch.device) -> bool:
    """Whether kernels run there: on a CUDA device that knows bfloat16, or on the processor in Triton's interpreter."""
    if not available():
        return False
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= OLDEST
    return device.type == "cpu" and interpreted()


def interpreted() -> bool:
    """Whether kernels run on the processor, in Triton's interpreter."""
    return type(_kernels().narrow).__name__ == "InterpretedFunction"


@cache
def available() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def _kernels() -> ModuleType:
    from compress.runtime import triton_kernels  # imports Triton, which most who import this do not need

    return triton_kernels


def _shape_of(
    x: Tensor, words: Tensor, tables: Tensor, table: Tensor, first: Tensor, zero: Tensor, scale: Tensor,
    numbers: Sequence[int],
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], numbers[0])


torch.library.define(
    OPERATOR,
    "(Tensor x, Tensor words, Tensor tables, Tensor table, Tensor first, Tensor zero, Tensor scale, int[] numbers)"
    " -> Tensor",
)
torch.library.impl(OPERATOR, ("cuda", "cpu"), launch)
torch.library.register_fake(OPERATOR, _shape_of)
