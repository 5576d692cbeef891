"""What a device can do: kernels, and operations compiled into few of them."""

from __future__ import annotations

from functools import cache, wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
BACKEND = "inductor"


def has_kernels(tensor: Tensor) -> bool:
    """Whether a float32 tensor lies on a device for which kernels can be made here; never true of a processor."""
    if tensor.device.type == "cpu" or tensor.dtype != torch.float32:
        return False
    from compress.runtime.launch import usable  # imports Triton

    return usable(tensor.device)


def fused(made: Callable[P, R]) -> Callable[P, R]:
    """A function of tensors that is compiled where the first of them has kernels, and is as it is elsewhere.

    Compiled, its operations read and write memory once together, and keep for the gradients what cannot be had again
    from its inputs. Where nothing can be compiled it is as it is, too.
    """

    @wraps(made)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        first: Any = args[0]
        if made not in _FAILED and has_kernels(first):
            try:
                result: R = _compiled(made)(*args, **kwargs)
                return result
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # of the compiler: there is none for the host, or it does not know the device
                _FAILED.add(made)
        return made(*args, **kwargs)

    return run


_FAILED: set[Any] = set()


@cache
def _compiled(made: Any) -> Any:
    return torch.compile(made, dynamic=True, backend=BACKEND)


__all__ = ["fused", "has_kernels"]
