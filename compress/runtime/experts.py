"""The experts of a mixture, which a model keeps together in one parameter, packed one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compress.runtime.packed import PackedModule

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from compress.encodings import Spec

WHOLE_PRODUCTS = ("bmm", "baddbmm")  # functions that multiply with all experts at once


class PackedExperts(nn.Module):
    """Stands for a parameter (experts, ...) whose code takes the matrix of one expert at a time: `parameter[number]`.

    Every expert is a packed module called by its number. Only the one that is asked for is unpacked, to what the
    parameter would hold: the same numbers in the same order, in the type of the model.

    Attributes:
        transposed: whether the parameter keeps (experts, in, out).
        joined: whether the parameter is a matrix, of the rows of all experts.
        dtype: of what it gives; it follows `model.to(...)` as a parameter does.
    """

    def __init__(self, specs: Sequence[Spec], *, transposed: bool, dtype: torch.dtype, joined: bool = False):
        super().__init__()
        self.transposed, self.dtype, self.joined = transposed, dtype, joined
        for number, spec in enumerate(specs):
            self.add_module(str(number), PackedModule(spec, bias=False))

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, number: Any) -> Tensor:
        """The matrix of one expert, as the parameter keeps it. `number`: a whole number, or a tensor of one.

        Raises:
            TypeError: more than one is asked for at once.
        """
        one = number.numel() == 1 if isinstance(number, torch.Tensor) else isinstance(number, int)
        if not one:
            raise TypeError(
                "packed experts are unpacked one by one; run the model with experts_implementation='eager', as it is "
                "loaded"
            )
        index = int(number)
        expert = self._modules[str(index if index >= 0 else index + len(self))]
        assert isinstance(expert, PackedModule)
        matrix = expert.dequantize().to(self.dtype)
        return matrix.T.contiguous() if self.transposed else matrix

    @property
    def shape(self) -> torch.Size:
        """That of the parameter."""
        first = self._modules["0"]
        assert isinstance(first, PackedModule)
        rows, columns = first.spec.shape
        piece = (columns, rows) if self.transposed else (rows, columns)
        return torch.Size((len(self) * piece[0], piece[1]) if self.joined else (len(self), *piece))

    def view(self, *_: Any) -> PackedExperts:
        """What a model that keeps one matrix takes its experts from."""
        return self

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(self.buffers()).device

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], _: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """A model that multiplies with all experts at once is given all of them, for as long as that takes."""
        if func.__name__ not in WHOLE_PRODUCTS:
            return NotImplemented
        whole = (torch.stack([a[i] for i in range(len(a))]) if isinstance(a, PackedExperts) else a for a in args)
        return func(*whole, **(kwargs or {}))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Stored types stay, as those of packed modules do; what is given follows."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype
        return self

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{tuple(self.shape)}, {self.dtype}"
