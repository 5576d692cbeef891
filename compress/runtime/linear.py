"""A linear layer whose weight stays packed in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compress.encodings import FACTORED, unpack
from compress.runtime.kernels import Factors
from compress.runtime.lazy_weight import lazy_weight
from compress.runtime.lookup import GpuLookup
from compress.runtime.packed import PackedModule

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from compress.encodings import Spec


@dataclass(frozen=True)
class Quick:
    """How a layer on the processor computes that does not unpack its weight.

    Attributes:
        multiply: (M, in) -> (M, out), without bias.
        device: where it keeps its tensors.
    """

    multiply: Callable[[Tensor], Tensor]
    device: torch.device


class PackedLinear(PackedModule):
    """Replaces a `Linear` or a transformers `Conv1D`.

    On a CUDA device it takes a kernel of its own accord when it is first called; a kernel for that may order the bytes
    of `codes` as it likes to read them, in place. `stored` and `state_dict` give them as they were loaded. Where two
    factors are all that the weight is, one is multiplied with after the other on every device: it costs less.

    Attributes:
        kernel: what it computes with in the place of unpacking its weight; None where it unpacks it.
        automatic: whether it still has to look for a kernel where it is.
    """

    kernel: Quick | GpuLookup | None
    like: Tensor

    def __init__(self, spec: Spec, *, bias: bool, transposed: bool, dtype: torch.dtype = torch.float32):
        """`transposed`: stands for a Conv1D, which keeps (in, out). `dtype` is the type of its bias and `weight`."""
        super().__init__(spec, bias=bias, dtype=dtype)
        self.transposed = transposed
        self.out_features, self.in_features = spec.shape
        self.kernel, self.automatic, self.arranged = None, True, False
        # The type and device that the model computes in; of no length, and not in the file.
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    @property
    def factored(self) -> bool:
        """Whether its weight is nothing but two factors."""
        return self.spec.kind == FACTORED

    @property
    def weight(self) -> Tensor:
        """The weight of the layer that it replaces: some models multiply with `layer.weight` themselves.

        It is unpacked once its numbers are asked for; its type, shape and device are known without.
        """
        rows, columns = self.spec.shape
        return lazy_weight((columns, rows) if self.transposed else (rows, columns), self.like, self._unpacked)

    def _unpacked(self) -> Tensor:
        weight = self.dequantize().to(self.like.dtype)
        return weight.T.contiguous() if self.transposed else weight

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the type of `x`."""
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """What the layer makes of `x`, with this bias in the place of its own: (..., in) -> (..., out)."""
        x = self.rounded(x)
        if not (x.requires_grad and torch.is_grad_enabled()):  # kernels have no gradients
            if self.automatic and (x.is_cuda or self.factored) and not torch.compiler.is_compiling():
                self.choose_kernel()
            kernel = self.kernel
            if kernel is not None:
                return self._quick(x, kernel, bias)
        weight = self.dequantize().to(x.dtype)
        if not self.transposed:
            return nn.functional.linear(x, weight, bias)
        # Conv1D multiplies by an (in, out) matrix; the same call on the same layout gives the same bits.
        bias = x.new_zeros(self.out_features) if bias is None else bias
        flat = torch.addmm(bias, x.reshape(-1, self.in_features), weight.T.contiguous())
        return flat.view(*x.shape[:-1], self.out_features)

    def _quick(self, x: Tensor, kernel: Quick | GpuLookup, bias: Tensor | None) -> Tensor:
        y = kernel.multiply(x.reshape(-1, self.in_features))
        if bias is not None:
            y = y + bias
        return y.view(*x.shape[:-1], self.out_features)

    def choose_kernel(self) -> None:
        """Take the kernel for the device, if there is one that fits."""
        self.automatic = False
        if getattr(getattr(self, "_hf_hook", None), "offload", False):
            return  # its tensors come anew for each call
        with torch.no_grad(), torch.inference_mode(False):
            stored = self.stored()
            kernel: Quick | GpuLookup | None = GpuLookup.prepare(self.spec, unpack(self.spec, stored), stored)
            if kernel is None and self.factored:
                kernel = Quick(Factors(None, self.spec, stored), next(iter(stored.values())).device)
            self.use(kernel)

    def unpack_always(self) -> None:
        """Compute with exactly the dequantized weight, on any device, until the layer is moved or loaded."""
        self.use(None)
        self.automatic = False

    @property
    def skips_inputs(self) -> bool:
        """Whether it is not multiplied with some of its inputs, so that a kernel need not read their columns."""
        return self.spec.inputs is not None and self.spec.inputs.kind.per_column

    def lay_columns(self) -> None:
        """Keep the columns of a dense weight one behind the other in memory: the same numbers in as many bytes."""
        if "values" in self._buffers and self.spec.kept is None:
            self.values = self.get_buffer("values").T.contiguous().T

    def use(self, kernel: Quick | GpuLookup | None) -> None:
        """Compute with this kernel from now on, or None: by unpacking the weight, with the codes as they are stored."""
        if self.arranged:
            assert isinstance(self.kernel, GpuLookup)
            self.get_buffer("codes").copy_(self.kernel.stream())
            self.arranged = False
        if kernel is None and "values" in self._buffers:
            self.values = self.get_buffer("values").contiguous()
        self._modules.pop("kernel", None)
        self.kernel = kernel
        codes = self._buffers.get("codes")
        if isinstance(kernel, GpuLookup) and codes is not None and self.spec.form is not None:
            self.arranged = kernel.take_place(codes, self.spec.form.bits)

    def stored(self) -> dict[str, Tensor]:
        """The packed tensors under their names in the file; codes in another order are put back, in a copy."""
        found = super().stored()
        if self.arranged:
            assert isinstance(self.kernel, GpuLookup)
            found["codes"] = self.kernel.stream()
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What a kernel keeps stays where it is: on another device the layer looks for another one."""
        buffer = next(self.buffers())
        moves = fn(buffer.new_empty(0)).device != buffer.device
        if moves:
            self.use(None)
        moved = super()._apply(fn, recurse)
        if moves:
            self.automatic = True
        return moved

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self.stored().items() if self.arranged or self.skips_inputs else ():
            destination[f"{prefix}{name}"] = tensor.contiguous()  # in the order of the file

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        self.use(None)  # it was derived from other tensors
        self.automatic = True
        super()._load_from_state_dict(*args, **options)


def unpack_all(model: nn.Module) -> None:
    """Let packed linear layers compute with exactly their weights, to compare stored numbers and not orders of sums."""
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.unpack_always()
