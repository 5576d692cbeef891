"""The weight of a packed layer as a tensor that is unpacked when somebody computes with it, and not before.

T5 asks the last layer of each MLP for the type of its weight, up to four times a call; other models for a shape or a
device. None of that needs a number of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

if TYPE_CHECKING:
    from collections.abc import Callable

# What is known without a number; in this form the getters of a tensor reach `__torch_function__`.
KNOWN = {
    *(getattr(Tensor, name).__get__ for name in (
        "dtype", "shape", "device", "ndim", "layout", "is_meta", "is_cuda", "requires_grad", "is_leaf", "grad",
        "is_quantized", "is_sparse", "itemsize", "nbytes",
    )),
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.is_floating_point),
    *(Tensor.is_complex, Tensor.element_size, Tensor.__len__),
}  # fmt: skip


class LazyWeight(Tensor):
    """Says its type, shape and device at once, and its numbers once they are asked for.

    Whatever is computed with it is computed with the unpacked tensor, and is a plain tensor; what is written to it is
    written to that and lost with it, as the packed layer is not changed.
    """

    made: Callable[[], Tensor]
    unpacked: Tensor | None

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], like: Tensor, make: Callable[[], Tensor]) -> LazyWeight:
        made: Any = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        made.made, made.unpacked = make, None
        found: LazyWeight = made
        return found

    def __init__(self, shape: tuple[int, ...], like: Tensor, make: Callable[[], Tensor]):
        """`like`: of its type and device. `make`: unpacks the numbers."""

    def dense(self) -> Tensor:
        """The numbers."""
        if self.unpacked is None:
            self.unpacked = self.made()
        return self.unpacked

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Everything that torch does with it."""
        if func in KNOWN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return func(*_dense(args), **_dense(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """What reaches torch past the above."""
        return func(*_dense(args), **_dense(kwargs or {}))


def _dense(values: Any) -> Any:
    return tree_map_only(LazyWeight, LazyWeight.dense, values)


def lazy_weight(shape: tuple[int, ...], like: Tensor, make: Callable[[], Tensor]) -> Tensor:
    """A weight that is unpacked once it is computed with; at once where the code that asks is being traced.

    Args:
        shape: of the weight.
        like: a tensor of its type and device.
        make: unpacks it.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or like.is_meta:
        return make()
    return LazyWeight(shape, like, make)


__all__ = ["LazyWeight", "lazy_weight"]
