"""Heavy libraries that are imported when they are first used: reading a pipeline must not wait for torch.

    from compress.lazy import torch

is `import torch` to type checkers and to the code below it, but costs nothing until an attribute is read.
"""

from __future__ import annotations

from functools import cache, wraps
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import torch
    import transformers
    from torch import nn
    from torch.nn import functional
else:

    class _Lazy(ModuleType):
        """Stands for a module; its attributes are the module's."""

        def __getattr__(self, name: str) -> Any:
            value = getattr(import_module(self.__name__), name)
            setattr(self, name, value)
            return value

    torch, nn, functional, np = _Lazy("torch"), _Lazy("torch.nn"), _Lazy("torch.nn.functional"), _Lazy("numpy")
    transformers = _Lazy("transformers")


def no_grad(run: Callable[P, R]) -> Callable[P, R]:
    """`torch.no_grad()` around a function."""

    @wraps(run)
    def without(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.no_grad():
            return run(*args, **kwargs)

    return without


@cache
def function(made: type) -> Any:
    """The autograd function with a class's static `forward` and `backward`, as `torch.autograd.Function` wants them."""
    return type(made.__name__, (made, torch.autograd.Function), {})


__all__ = ["function", "functional", "nn", "no_grad", "np", "torch", "transformers"]
