"""What calibration data looks like inside the model: the hidden states in front of the block that comes next."""

from __future__ import annotations

import os
import tempfile
from functools import partial
from typing import TYPE_CHECKING, Any

from compress.calibration.calls import mixed, same_call
from compress.calibration.reconstruct import HiddenSamples
from compress.errors import UnsupportedModelError
from compress.io.heap import give_back
from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from torch import Tensor, nn

    from compress.calibration.calls import Call
    from compress.calibration.reconstruct import Weights

LARGEST_BUFFER = 1 << 30  # bytes of activations kept in memory; more is memory-mapped to a temporary file
CPU = "cpu"


class Activations:
    """The hidden states every calibration batch arrives with at the block that comes next, and how it is called."""

    def __init__(
        self,
        arrivals: Iterable[tuple[Tensor, Mapping[int, Call]]],
        trim: bool,
        store: torch.device,
        room: int | None = None,
        kinds: Mapping[int, int] | None = None,
    ):
        """Takes what arrives.

        Args:
            arrivals: the hidden states of each batch, and how each kind of block is called with it.
            trim: give freed memory back after every batch.
            store: where hidden states wait.
            room: bytes of them that memory takes; what is beyond lies in files. None is LARGEST_BUFFER.
            kinds: number of each block that they are going to run through -> its kind; by default one block, of one.
        """
        self.kinds = {0: 0} if kinds is None else kinds
        self.trim, self.store = trim, store
        self.room = LARGEST_BUFFER if room is None else room
        self.compute = store  # where they arrive
        self.calls: list[Mapping[int, Call]] = []
        self.hidden: list[Tensor] = []
        self._mapped: set[int] = set()  # batches beyond LARGEST_BUFFER
        self._own: dict[int, Tensor] = {}  # their buffers
        self._alike: dict[int, bool] = {}  # by kind
        self._calls_for: dict[tuple[int, int], Call] = {}
        self._places_of: list[tuple[int, int]] = []
        size = 0
        for hidden, calls in arrivals:
            self.compute = hidden.device
            self.calls.append(calls)
            self.hidden.append(hidden)
            size += hidden.nbytes
            number = len(self.hidden) - 1
            if store.type == CPU and size > self.room:
                self._mapped.add(number)
                self.keep(number, hidden)
            elif hidden.device != store:
                self.keep(number, hidden)

    def copy(self) -> Activations:
        """A copy with the same hidden states, independent from here on."""
        other = Activations((), self.trim, self.store, self.room, self.kinds)
        other.compute = self.compute
        other.calls, other.hidden, other._mapped = self.calls, list(self.hidden), self._mapped
        for number in self._own:  # the other chain's buffer will be written to
            other.keep(number, self.hidden[number])
        return other

    def forwards(
        self, block: nn.Module, weights: Weights | None = None, index: int = 0
    ) -> Iterator[Callable[[], Tensor]]:
        """One call per batch that runs a block on what arrives.

        Args:
            block: to run.
            weights: in the place of parameters of the block, by name.
            index: which of the blocks it is.
        """
        for number, calls in enumerate(self.calls):
            # Out of pinned memory, the copy and what is computed before it go on side by side.
            yield partial(
                calls[self.kinds[index]].run, block, self.hidden[number].to(self.compute, non_blocking=True), weights
            )
            if self.trim:
                give_back()

    def whole(self, block: nn.Module, index: int) -> Iterator[Callable[[], Any]]:
        """One call per batch that gives all that a block puts out; as `forwards`."""
        for number, calls in enumerate(self.calls):
            hidden = self.hidden[number].to(self.compute, non_blocking=True)
            yield partial(calls[self.kinds[index]].whole, block, hidden)
            if self.trim:
                give_back()

    def call(self, number: int, index: int) -> Call:
        """How a block is called with a batch."""
        return self.calls[number][self.kinds[index]]

    def keep(self, number: int, output: Tensor) -> None:
        """Put a batch's hidden states in the place of what was there."""
        # Only memory of our own is written to: what arrived may be the caller's tensor, or another block's argument.
        buffer = self._own.get(number)
        if buffer is not None and buffer.shape == output.shape and buffer.dtype == output.dtype:
            buffer.copy_(output)
        elif number in self._mapped:
            self.hidden[number] = self._own[number] = _mapped(output.to(self.store))
        elif _pins(output.device, self.store):
            self.hidden[number] = _pinned(output)  # what was there may still be on its way: torch frees it after that
        else:
            self.hidden[number] = output.to(self.store)

    def samples(self) -> HiddenSamples:
        """All samples, whatever batch they are in."""
        if _pins(self.compute, self.store):  # the processor reads them: what is still on its way has to arrive
            torch.cuda.current_stream(self.compute).synchronize()
        return HiddenSamples(self.hidden, self.compute)

    def run(
        self, block: nn.Module, hidden: Tensor, numbers: Tensor, weights: Weights | None = None, index: int = 0
    ) -> Tensor:
        """What a block makes of some samples, each with the arguments that it came with.

        Args:
            block: to run.
            hidden: (B, ...) of the samples.
            numbers: of the samples.
            weights: in the place of parameters of the block, by name.
            index: which of the blocks it is.

        Raises:
            UnsupportedModelError: samples of one visit to the block are called differently, so they cannot be mixed.
        """
        kind = self.kinds[index]
        if kind not in self._alike:
            self._alike[kind] = self._are_alike(kind)
        if self._alike[kind]:
            return self._call_for(len(numbers), kind).run(block, hidden, weights)
        by_visit: dict[int, list[int]] = {}  # rows
        for row, number in enumerate(numbers.tolist()):
            by_visit.setdefault(self.calls[self._places()[number][0]][kind].visit, []).append(row)
        if len(by_visit) == 1:
            return self._mixed(numbers.tolist(), kind).run(block, hidden, weights)
        parts = (
            self._mixed(numbers[rows].tolist(), kind).run(block, hidden[rows], weights) for rows in by_visit.values()
        )
        order = torch.tensor([row for rows in by_visit.values() for row in rows], device=hidden.device)
        return torch.cat(list(parts))[order.argsort()]

    def _call_for(self, count: int, kind: int) -> Call:
        if (count, kind) not in self._calls_for:  # looked up once: every visit has equal arguments
            self._calls_for[count, kind] = self.calls[0][kind].resized(len(self.hidden[0]), count)
        return self._calls_for[count, kind]

    def _are_alike(self, kind: int) -> bool:
        """Whether all samples are called with equal arguments."""
        first, size = self.calls[0][kind], len(self.hidden[0])
        pairs = zip(self.calls, self.hidden, strict=True)  # the first too: its samples need equal arguments
        return all(same_call(first.resized(size, len(hidden)), calls[kind]) for calls, hidden in pairs)

    def _places(self) -> list[tuple[int, int]]:
        """(batch, row) of every sample."""
        if not self._places_of:
            self._places_of = [(batch, row) for batch, hidden in enumerate(self.hidden) for row in range(len(hidden))]
        return self._places_of

    def _mixed(self, numbers: list[int], kind: int) -> Call:
        """The call for samples of one visit."""
        places = self._places()
        visit = self.calls[places[numbers[0]][0]][kind].visit
        batches = [batch for batch, calls in enumerate(self.calls) if calls[kind].visit == visit]
        among = {batch: i for i, batch in enumerate(batches)}
        sizes = [len(self.hidden[batch]) for batch in batches]
        try:
            calls = [self.calls[batch][kind] for batch in batches]
            return mixed(calls, sizes, [(among[places[n][0]], places[n][1]) for n in numbers])
        except ValueError as error:
            raise UnsupportedModelError(
                "the blocks get other arguments from batch to batch, so samples cannot be mixed to learn from "
                "them; use a method that does not learn by reconstruction, such as gptq"
            ) from error


def _pins(compute: torch.device, store: torch.device) -> bool:
    """Whether hidden states wait in memory that a device can copy to and from by itself."""
    return compute.type == "cuda" and store.type == CPU


def _pinned(hidden: Tensor) -> Tensor:
    """The same values in pinned memory, once the device has come to this copy."""
    made = torch.empty(hidden.shape, dtype=hidden.dtype, device=CPU, pin_memory=True)
    return made.copy_(hidden, non_blocking=True)


def _mapped(hidden: Tensor) -> Tensor:
    """The same values in an unnamed temporary file that the system may page out."""
    with tempfile.NamedTemporaryFile() as file:
        if hasattr(os, "posix_fallocate"):  # a full disk is an error now, not a fault later
            os.posix_fallocate(file.fileno(), 0, hidden.nbytes)
        mapped = torch.from_file(file.name, shared=True, size=hidden.numel(), dtype=hidden.dtype, device="cpu")
    return mapped.view(hidden.shape).copy_(hidden)
