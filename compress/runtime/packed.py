"""What a layer whose weight stays packed in memory, and is unpacked for the length of a call, always has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compress.encodings.decode import Decoder

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from compress.encodings import Spec


class PackedModule(nn.Module):
    """Computes exactly what the module it replaces computes on the dequantized weight.

    The stored tensors are buffers of the module under their names in the file (`codes`, `scale`, ...), so checkpoints
    load straight into them. They are not parameters: a model takes its type from its first parameter.
    """

    bias: nn.Parameter | None

    def __init__(self, spec: Spec, *, bias: bool, dtype: torch.dtype = torch.float32):
        """`dtype` is the type of the bias."""
        nn.Module.__init__(self)
        self.spec = spec
        for name, (shape, stored) in spec.tensors().items():
            self.register_buffer(name, torch.empty(shape, dtype=stored))
        self.bias = nn.Parameter(torch.empty(spec.shape[0], dtype=dtype), requires_grad=False) if bias else None

    def dequantize(self) -> Tensor:
        """(out, in) float32, as the passes saw it."""
        return Decoder(self.spec, self.stored()).dequantize()

    def stored(self) -> dict[str, Tensor]:
        """The packed tensors under their names in the file."""
        return {name: getattr(self, name) for name in self.spec.tensors()}

    def rounded(self, x: Tensor) -> Tensor:
        """An input as the weight is multiplied with it: on its grid, or with what is skipped zero, if it has either."""
        form = self.spec.inputs
        if form is None:
            return x
        return form.input_grid({name: getattr(self, name) for name in form.kind.names()}).apply(x)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves between devices, but keeps the stored types: `model.half()` must not round the scales."""
        stored = {name: getattr(self, name).dtype for name in self.spec.tensors()}
        before = {name: getattr(self, name) for name in stored}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, dtype in stored.items():
            moved = getattr(self, name)
            if moved.dtype != dtype:
                setattr(self, name, before[name].to(moved.device))
        return self

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        said = {k: v for k, v in self.spec.to_json().items() if k not in ("shape", "layout", "kept")}
        rows, columns = self.spec.shape
        if self.spec.inputs is not None:
            said["inputs"] = str(self.spec.inputs)
        if self.spec.kept is not None:
            said["kept"] = round(self.spec.kept / (rows * columns), 3)
        shown = "".join(f", {name}={value}" for name, value in said.items())
        return f"{columns}, {rows}{shown}, bias={self.bias is not None}"
