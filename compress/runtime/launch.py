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
CLASSES = (8, 16, 32, 64, 128)  # of M: the last for all beyond
MOST_INPUTS = CLASSES[-1]
BLOCKS_FOR_8 = 4  # up to so many of `narrow` on a multiprocessor, each has 8 warps
ALIGNMENT = 16  # bytes that a thread reads at once
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
        ahead: in `narrow`, records that a warp reads in advance; in `wide`, steps.
    """

    warps: int
    inputs: int
    ahead: int


@dataclass(frozen=True, eq=False)
class Launch:
    """One kernel, cut for some shapes of a product; each is another one, which makes them quick to look up.

    Attributes:
        kernel: its name in `triton_kernels`.
        cut: what it is cut into.
        columns: of the input, as the kernel counts them.
        constants: what it is compiled for, in the order of its arguments.
    """

    kernel: str
    cut: Cut
    columns: int
    constants: tuple[tuple[str, Any], ...]


@cache
def planned(product: Product, rows: int, dtype: torch.dtype, device: torch.device) -> Launch:
    """The kernel for M = `rows` up to `class_of` them, and its cut."""
    if rows >= WIDE_FROM and dtype != torch.float32 and product.groups != EACH:
        return wide(product, Cut(4, min(rows, MOST_INPUTS), 3))
    blocks, records = -(-product.rows // ROWS), -(-product.columns // COLUMNS)
    # Few programs are made wider, and read further ahead: each multiprocessor must have enough on its way.
    warps = 4 if blocks > BLOCKS_FOR_8 * _processors(device) else 8
    while warps > records:
        warps //= 2
    return narrow(product, Cut(warps, 8 if rows <= 8 else 16, 1 if warps == 4 else 2))


def narrow(product: Product, cut: Cut) -> Launch:
    """For few rows of input, and for what `wide` does not do."""
    full = product.columns % (COLUMNS * cut.warps) == 0
    # How many neighbours a thread holds follows from the narrowest type that the compiler sees the weight made from.
    width = 8 if product.mode == STEPS and product.zeros else 4
    own = {"FULL": full, "WIDTH": width, "P": cut.warps, "BM": cut.inputs, "AHEAD": cut.ahead}
    return Launch("narrow", cut, product.columns, tuple((product.constants() | own).items()))


def wide(product: Product, cut: Cut) -> Launch:
    """For many rows of input of 16 bits, with groups that are not `EACH`."""
    own = {"P": cut.warps, "BM": cut.inputs, "STAGES": cut.ahead}
    columns = -(-product.columns // COLUMNS) * COLUMNS
    return Launch("wide", cut, columns, tuple((product.constants() | own).items()))


def class_of(rows: int) -> int:
    """The largest M that the same kernel is taken for as for M = `rows`."""
    for most in CLASSES:
        if rows <= most:
            return most
    return CLASSES[-1]


def launch(
    x: Tensor, words: Tensor, tables: Tensor, table: Tensor, first: Tensor, zero: Tensor, scale: Tensor,
    numbers: Sequence[int],
) -> Tensor:  # fmt: skip
    """(M, K) of float32, float16 or bfloat16 -> (M, N) of the same.

    Args:
        x: the input.
        words: arranged codes, uint8. The address of this and of all that follows is a multiple of 16.
        tables: (T, 8) int32, as of `packed_tables`, for this type; read where `mode` is `TABLE` or `PAIRS`.
        table: (T * 2**bits,) values in the type of x; read where `mode` is `GATHER`, or x float32.
        first: (N,) int32, the table of each row; read unless `shared`.
        zero: (N or 1, G) uint8 zero points; read where there are.
        scale: (N or 1, G) of a float type.
        numbers: those of a `Product`.
    """
    return multiply(x, _product(tuple(numbers)), (words, tables, table, first, zero, scale))


def multiply(x: Tensor, product: Product, tensors: tuple[Tensor, ...]) -> Tensor:
    """What `launch` does, and the operator, without the way through torch's dispatcher."""
    count = len(x)
    y = x.new_empty(count, product.rows)
    if count:
        plan = planned(product, class_of(count), x.dtype, x.device)
        run(plan, product, aligned(x.contiguous()), tensors, y)
    return y


def run(plan: Launch, product: Product, x: Tensor, tensors: tuple[Tensor, ...], y: Tensor) -> None:
    """Launch a kernel on what `launch` takes, in the same order; x is contiguous and aligned, and so is y."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return run(plan, product, x, tensors, y)
    scale, cut = tensors[-1], plan.cut
    groups = scale.shape[1]
    sizes = len(x), product.rows, plan.columns, groups, product.stride * groups
    if plan.kernel == "wide":
        x = ordered(x)
        grid = -(-product.rows // (ROWS * cut.warps)), -(-len(x) // cut.inputs), 1
    else:
        grid = -(-product.rows // ROWS), -(-len(x) // cut.inputs), 1
    key = plan, x.dtype, scale.dtype, x.device
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[grid](x, *tensors, y, *sizes, *(value for _, value in plan.constants))
        return None
    # Found by what it is compiled for, it is launched in a third of the time.
    words, *others = tensors
    compiled = getattr(_kernels(), plan.kernel)[grid](
        x, words.view(torch.int32), *others, y, *sizes, **dict(plan.constants), num_warps=cut.warps,
        num_stages=1 if plan.kernel == "narrow" else cut.ahead,
    )  # fmt: skip
    if compiled is not None:  # as under the interpreter
        _compiled[key] = compiled
    return None


_compiled: dict[Any, Any] = {}


def aligned(tensor: Tensor) -> Tensor:
    """A tensor at an address that is a multiple of 16: the same, or a copy."""
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


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
