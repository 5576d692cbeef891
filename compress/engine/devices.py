"""Where a run computes, and where what is finished waits."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch

from compress.encodings.moving import moved

if TYPE_CHECKING:
    from collections.abc import Iterator

T = TypeVar("T")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Devices:
    """The devices of a run.

    Attributes:
        compute: where the model runs and passes solve.
        store: where activations, data and finished weights wait.
    """

    compute: torch.device = CPU
    store: torch.device = CPU

    @contextmanager
    def scope(self) -> Iterator[None]:
        """While open, tensors that are made without a device are made on the device that computes."""
        if self.compute == CPU:  # torch's own default: a mode would only slow every call down
            yield
            return
        with self.compute:
            yield

    def to_compute(self, value: T) -> T:
        """A tensor, or something made of tensors such as a weight, on the device that computes."""
        return moved(value, self.compute)

    def to_store(self, value: T) -> T:
        """A tensor, or something made of tensors, on the device where it waits."""
        return moved(value, self.store)


__all__ = ["Devices"]
