"""Gradients that a device sums up in the same order every time, as far as the model's operations can."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.lazy import torch
from compress.logs import LOGGER

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

SAID_BY_TORCH = "deterministic"  # in every error about an operation that has no fixed order


class InOneOrder:
    """Computes gradients; remembers whether an operation of the model stands against a fixed order.

    Only the strict mode of torch makes attention sum up its gradients in one order, and in it an operation that has
    none is an error. Then, and from there on, gradients are those of the usual mode, which is said: a run that is
    repeated or continued may differ by rounding.
    """

    def __init__(self) -> None:
        self.holds = True

    def __call__(self, compute: Callable[[], Tensor], tensors: Sequence[Tensor]) -> Tensor:
        """What `compute` returns; it sets the gradients of `tensors`, which have none before."""
        if not self.holds or all(tensor.device.type != "cuda" for tensor in tensors):
            return compute()
        mode = torch.get_deterministic_debug_mode()
        torch.set_deterministic_debug_mode("error")
        try:
            return compute()
        except RuntimeError as error:
            if SAID_BY_TORCH not in str(error):
                raise
            said = str(error).split(", but", 1)[0]
        finally:
            torch.set_deterministic_debug_mode(mode)
        LOGGER.warning("gradients are not the same to the bit when this is repeated: %s", said)
        self.holds = False
        for tensor in tensors:
            tensor.grad = None
        return compute()
