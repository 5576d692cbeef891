"""The weight of a packed layer as a tensor that is unpacked when somebody computes with it, and not before.

T5 asks the last layer of each MLP for the type of its weight, up to four times a call; other models for a shape or a
device. None of that needs a number of it.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

if TYPE_CHECKING:
    from collections.abc import Callable


class LazyWeight(Tensor):
    """Says its type, shape and device at once, and its numbers once they are asked for.

    Whatever is computed with it is computed with the unpacked tensor, and is a plain tensor; what is written to it is
    written to that and lost with it, as the packed layer is not changed. For a parameter of its own, `clone` it first.
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
            # As if nobody had asked for them in another mode; and laid out as this tensor says it is.
            with torch.inference_mode(False), torch.no_grad():
                self.unpacked = self.made().contiguous()
        return self.unpacked

    def __deepcopy__(self, memo: Any) -> Tensor:
        """A copy is of the numbers."""
        return copy.deepcopy(self.dense(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """What is pickled are the numbers."""
        return self.dense().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def tolist(self) -> Any:
        """The numbers as a list."""
        return self.dense().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """The numbers as an array."""
        return self.dense().numpy(force=force)

    def __dlpack__(self, **options: Any) -> Any:
        """The numbers, for another library."""
        return self.dense().__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        """Where they lie, for another library."""
        return self.dense().__dlpack_device__()

    def data_ptr(self) -> int:
        """Where the numbers lie."""
        return self.dense().data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """What the numbers lie in."""
        return self.dense().untyped_storage()

    # Torch takes fused ways of its attention for plain tensors only, which is what one without this function is to it.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Everything that is computed with it."""
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
