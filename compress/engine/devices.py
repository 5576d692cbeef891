"""Where a run computes, and where what is finished waits."""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from compress.encodings.moving import moved

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compress.planning.plan import Plan

T = TypeVar("T")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Devices:
    """The devices of a run.

    Attributes:
        compute: where the model runs and passes solve.
        store: where data and finished weights wait.
        activations: where hidden states wait between two blocks.
        room: bytes of them that the host's memory takes; the rest lies in files. None is little, for the processor.
    """

    compute: torch.device = CPU
    store: torch.device = CPU
    activations: torch.device = CPU
    room: int | None = None

    @property
    def apart(self) -> bool:
        """Whether what computes has memory of its own."""
        return self.compute.type != "cpu"

    @contextmanager
    def scope(self) -> Iterator[None]:
        """While open, tensors that are made without a device are made on the device that computes.

        Whatever is computed there twice is the same to the bit: a run that is continued must not differ.
        """
        if self.compute == CPU:  # torch's own default: a mode would only slow every call down
            yield
            return
        with self.compute, _repeatable(self.compute):
            yield

    def to_compute(self, value: T) -> T:
        """A tensor, or something made of tensors such as a weight, on the device that computes."""
        return moved(value, self.compute)

    def to_store(self, value: T) -> T:
        """A tensor, or something made of tensors, on the device where it waits."""
        return moved(value, self.store)


def devices_of(plan: Plan, resident: bool = False) -> Devices:
    """The devices of a planned run. `resident`: what is finished stays in memory, so on the device if it has room."""
    compute, limit = plan.places.compute, plan.places.device_limit
    if plan.device is None:
        return Devices()
    fits = resident and (limit is None or plan.device.total + plan.results_bytes < limit)
    return Devices(
        compute,
        store=compute if fits else CPU,
        activations=compute if plan.activations_on_device else CPU,
        room=plan.activations_on_host,
    )


@contextmanager
def _repeatable(device: torch.device) -> Iterator[None]:
    """While open, a CUDA device sums up in the same order every time, where it can."""
    if device.type != "cuda":
        yield
        return
    # Matrix products repeat themselves on one stream only with a workspace of a fixed size; read at the first of them.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    settings: Any = torch.utils.deterministic
    mode, filled = torch.get_deterministic_debug_mode(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = False
    try:
        with torch.cuda.device(device):
            yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        settings.fill_uninitialized_memory = filled


__all__ = ["Devices", "devices_of"]
