"""Reads the parameters of the block that comes next while a device works on this one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from concurrent.futures import Future

    from torch import Tensor


class ReadAhead:
    """Values as they lie in the source, in pinned memory: from there a device copies them while it computes.

    They stay until the block after theirs is asked for: a stage brings the same block in several times.
    """

    def __init__(self, device: torch.device):
        """`device`: that computes."""
        self.device = device
        self._reader = ThreadPoolExecutor(1, "compress-read-ahead")
        self._now: dict[str, Future[Tensor]] = {}
        self._next: dict[str, Future[Tensor]] = {}

    def begin(self, names: Iterable[str], read: Callable[[str], Tensor]) -> None:
        """Go on to the block that was begun last, and begin to read the next.

        Args:
            names: of the parameters that nothing will change before they are taken.
            read: the value of one.
        """
        self._now, self._next = self._next, {name: self._reader.submit(_pinned, read, name) for name in names}

    def forget(self) -> None:
        """What was read may be changed from now on."""
        self._now, self._next = {}, {}

    def take(self, name: str) -> Tensor | None:
        """A value on the device, once the device has come to this copy; None where it was not read ahead."""
        found = self._now.get(name) or self._next.get(name)
        return None if found is None else found.result().to(self.device, non_blocking=True)


def _pinned(read: Callable[[str], Tensor], name: str) -> Tensor:
    value = read(name)
    return value.pin_memory() if torch.cuda.is_available() else value
