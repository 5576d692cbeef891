"""`speed_up`: gives the packed layers of a loaded model kernels of their own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from compress.encodings import unpack
from compress.errors import UsageError
from compress.runtime.columns import CodeColumns, Columns
from compress.runtime.kernels import Bytes, Codes, Factors, Tiles, without_extras
from compress.runtime.linear import PackedLinear, Quick
from compress.runtime.lookup import GpuLookup
from compress.runtime.low_bit import Halves, Int4, Int8

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor, nn

    from compress.runtime.kernels import Kernel

EXACT_KERNELS: tuple[type[Kernel], ...] = (Halves, Codes, Bytes)  # the quickest first; `Tiles` takes what is left
ROUNDED: tuple[type[Kernel], ...] = (Int4, Int8)
LARGEST_ERROR = 0.02  # of a kernel that rounds; one with more is not taken
SPARE_BITS = 9.0  # enough for codes of one byte and their scales
SAMPLE = 8  # random inputs that the error is measured on


@dataclass(frozen=True)
class LayerSpeed:
    """What one layer computes with.

    Attributes:
        layer: its name.
        kernel: the name of the kernel; `factors` is added where a correction stands beside the codes.
        spare_bits: bits per weight that the kernel keeps beside the packed tensors.
        error: the largest difference from products with the dequantized weight, over the largest of them, on random
            inputs (M = 8, standard normal).
    """

    layer: str
    kernel: str
    spare_bits: float
    error: float


@dataclass(frozen=True)
class Speedup:
    """What `speed_up` did; printed as a table."""

    layers: tuple[LayerSpeed, ...]

    @property
    def kernels(self) -> dict[str, int]:
        """Name of each kernel that is used -> number of layers."""
        names = [row.kernel for row in self.layers]
        return {name: names.count(name) for name in dict.fromkeys(names)}

    def __str__(self) -> str:
        """A line per layer."""
        width = max((len(row.layer) for row in self.layers), default=5)
        head = f"{'layer':{width}}  {'kernel':14}  spare bits    error"
        rows = (f"{r.layer:{width}}  {r.kernel:14}  {r.spare_bits:10.2f}  {r.error:7.1e}" for r in self.layers)
        return "\n".join([head, *rows])


def speed_up(model: nn.Module, *, exact: bool = True, spare_bits: float = SPARE_BITS) -> Speedup:
    """Let the packed linear layers of a loaded model compute with kernels of their own, in place.

    As loaded on the processor, a layer unpacks its whole weight in every call and computes bit for bit what the
    dequantized layer does. With a kernel it never holds its whole weight in float32, and is quicker where one fits.
    (Not called `accelerate`, as a library that many use beside transformers is.) What kernels keep is derived from the
    packed tensors and stands beside them: `save_pretrained` writes what was loaded. A model that is moved to another
    device, or loads other tensors, goes back to computing as loaded; call this again.

    A layer that skips inputs (`activation_sparsity`) then reads only the columns that one input needs, where a kernel
    can; "columns" says where.

    On a CUDA device with Triton, layers take their kernel by themselves when they are first called; this measures its
    error, and takes it away where it needs more than `spare_bits`.

    Args:
        model: with packed linear layers; others are left alone, and so are packed convolutions.
        exact: only kernels whose results differ by rounding in float32 (about 1e-6 of the largest output). Otherwise
            also torch's products in bfloat16 with codes of 4 and 8 bits, within 2 %, measured layer by layer.
        spare_bits: bits per weight that a kernel may keep beside the packed tensors: 0 for none, 9 for codes of one
            byte, 17 for numbers of two bytes.

    Returns:
        The kernel, memory and error of every layer.

    Raises:
        UsageError: there is no packed linear layer, or less than 0 bits are allowed.

    Example:
        >>> import compress, tempfile
        >>> from transformers import AutoModelForCausalLM
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pipeline = compress.Pipeline(passes=((compress.Rtn(bits=4, group_size=64),),))
        ...     _ = compress.run(pipeline, "demo", folder + "/out")
        ...     model = AutoModelForCausalLM.from_pretrained(folder + "/out")
        >>> compress.speed_up(model).kernels
        {'codes': 42}
    """
    if spare_bits < 0:
        raise UsageError(f"spare_bits is {spare_bits}; it is a number of bits per weight, 0 or more")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear)}
    if not layers:
        raise UsageError("the model has no packed linear layer; load a folder that compress wrote")
    with torch.no_grad():
        return Speedup(tuple(_speed_up(name, layer, exact, spare_bits) for name, layer in layers.items()))


def _speed_up(name: str, layer: PackedLinear, exact: bool, spare_bits: float) -> LayerSpeed:
    layer.unpack_always()
    skips = layer.skips_inputs and layer.like.device.type == "cpu"
    if skips:
        layer.lay_columns()
    spec, stored = without_extras(layer.spec), layer.stored()
    weight = unpack(layer.spec, stored)
    device = next(iter(stored.values())).device
    plain = replace(weight, low_rank=None, inputs=None)
    random = torch.randn(SAMPLE, layer.in_features, generator=torch.Generator().manual_seed(0)).to(device)
    most = spare_bits * layer.in_features * layer.out_features / 8

    def complete(kernel: Kernel | None) -> Kernel:
        if weight.low_rank is not None:
            return Factors(kernel, layer.spec, stored)
        assert kernel is not None
        return kernel

    def off(kernel: Callable[[Tensor], Tensor]) -> float:
        found = torch.cat([kernel(random[:1]), kernel(random)[1:]])  # one input may be multiplied in its own way
        return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))

    def done(kernel: str, kept: int, error: float) -> LayerSpeed:
        used = "+".join(part for part in (kernel, "factors" if weight.low_rank is not None else "") if part)
        return LayerSpeed(name, used, 8 * kept / (layer.in_features * layer.out_features), error)

    tiles = None if weight.factored else Tiles.prepare(spec, plain, stored)
    chosen, name_of, error = complete(tiles), "" if tiles is None else Tiles.name, 0.0
    expected = chosen(random)
    gpu = GpuLookup.prepare(layer.spec, weight, stored)
    if gpu is not None:
        error = off(gpu)
        layer.use(gpu)
        kept = gpu.num_bytes(dict(layer.named_buffers(recurse=False)))
        if kept <= most and error <= LARGEST_ERROR:
            return done("" if gpu.product is None else GpuLookup.name, kept, error)
        layer.use(None)
        error = 0.0
    for kind in () if tiles is None or device.type != "cpu" else _kernel_types(exact, skips):
        kernel = kind.prepare(spec, plain, stored)
        if kernel is None or kernel.num_bytes > most:
            continue
        found = complete(kernel)
        measured = off(found)
        if measured <= LARGEST_ERROR:
            chosen, name_of, error = found, kind.name, measured
            break
    layer.use(Quick(chosen, device))
    return done(name_of, chosen.num_bytes, error)


def _kernel_types(exact: bool, skips: bool) -> Iterable[type[Kernel]]:
    skipping = (Columns, CodeColumns) if skips else ()
    return (*skipping, *EXACT_KERNELS) if exact else (*skipping[:1], *ROUNDED, *skipping[1:], *EXACT_KERNELS)


__all__ = ["LayerSpeed", "Speedup", "speed_up"]
