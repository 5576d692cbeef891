"""A linear layer whose weight stays packed in memory and is unpacked for the length of a call."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from compress.encodings import Spec, unpack


class PackedLinear(nn.Module):
    """Replaces a `Linear` or a transformers `Conv1D`; computes exactly what they compute on the dequantized weight.

    The stored tensors are parameters of the module under their names in the file (`codes`, `scale`, ...), without
    gradient, so checkpoints load straight into them.
    """

    bias: nn.Parameter | None

    def __init__(self, spec: Spec, *, bias: bool, transposed: bool, dtype: torch.dtype = torch.float32):
        """`transposed`: stands for a Conv1D, which keeps (in, out). `dtype` is the type of the bias."""
        super().__init__()
        self.spec, self.transposed = spec, transposed
        self.out_features, self.in_features = spec.shape
        for name, (shape, stored) in spec.tensors().items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=stored), requires_grad=False))
        self.bias = nn.Parameter(torch.empty(spec.shape[0], dtype=dtype), requires_grad=False) if bias else None

    def dequantize(self) -> Tensor:
        """(out, in) float32."""
        return unpack(self.spec, {name: getattr(self, name) for name in self.spec.tensors()}).dequantize()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the type of `x`."""
        weight = self.dequantize().to(x.dtype)
        if not self.transposed:
            return nn.functional.linear(x, weight, self.bias)
        # Conv1D multiplies by an (in, out) matrix; the same call on the same layout gives the same bits.
        bias = torch.zeros(self.out_features, dtype=x.dtype) if self.bias is None else self.bias
        flat = torch.addmm(bias, x.reshape(-1, self.in_features), weight.T.contiguous())
        return flat.view(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves between devices, but keeps the stored types: `model.half()` must not round the scales."""
        stored = {name: getattr(self, name).dtype for name in self.spec.tensors()}
        before = {name: getattr(self, name).data for name in stored}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, dtype in stored.items():
            moved = getattr(self, name)
            if moved.dtype != dtype:
                setattr(self, name, nn.Parameter(before[name].to(moved.device), requires_grad=False))
        return self

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        said = {k: v for k, v in self.spec.to_json().items() if k not in ("shape", "layout", "kept")}
        if self.spec.kept is not None:
            said["kept"] = round(self.spec.kept / (self.in_features * self.out_features), 3)
        shown = "".join(f", {name}={value}" for name, value in said.items())
        return f"{self.in_features}, {self.out_features}{shown}, bias={self.bias is not None}"


def replace_modules(model: nn.Module, specs: dict[str, Spec]) -> None:
    """Put an empty `PackedLinear` (on the device of what it replaces) in the place of every named module."""
    for name, spec in specs.items():
        old = model.get_submodule(name)
        weight = old.weight
        assert isinstance(weight, Tensor)
        transposed = not isinstance(old, nn.Linear)
        with torch.device(weight.device):
            has_bias = getattr(old, "bias", None) is not None
            model.set_submodule(name, PackedLinear(spec, bias=has_bias, transposed=transposed, dtype=weight.dtype))
        # Some models (GPT-2) initialise `child.weight` from the parent while loading; the packed child has none.
        parent = model.get_submodule(name.rpartition(".")[0])
        if not parent._buffers:
            parent._is_hf_initialized = True  # type: ignore[assignment]
