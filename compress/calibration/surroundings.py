"""What a caller has switched on in torch or a module, and must not change results: off while open, then on again."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from compress.calibration.precision import products
from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn


@contextmanager
def undisturbed() -> Iterator[None]:
    """While open, torch computes as in a fresh process.

    Gradients can be had, no inference mode, no autocast, float32 as the default type, the processor as the default
    device, and products of float32 that are not rounded.
    """
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if device.type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(products("float32"))
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


def device_of(model: nn.Module) -> torch.device:
    """Where a model is; the processor where it has no parameters and no buffers."""
    tensors = (tensor for every in (model.parameters(), model.buffers()) for tensor in every)
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """While open, modules are in evaluation mode: no dropout, no statistics of batches. Then each part is as it was."""
    before = [(module, [(part, part.training) for part in module.modules()]) for module in modules]
    changed = [(module, parts) for module, parts in before if any(training for _, training in parts)]
    for module, _ in changed:
        module.eval()
    try:
        yield
    finally:
        for module, parts in changed:
            module.train(parts[0][1])  # the first is the module itself, which may do more than set a flag
            for part, training in parts:
                part.training = training
