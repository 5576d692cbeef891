"""What processes say to one another over torch.distributed: sums in rank order, facts, tensors, files.

Everything here is called by every process of the group, in the same order.
"""

from __future__ import annotations

import json
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed as dist

from compress.errors import PeerError
from compress.io.safetensors_file import bytes_of
from compress.io.small_file import parse_object

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from compress.engine.parcels import Parcel

PIECE = 1 << 22  # numbers that are added, and bytes of a file that are sent, at a time


@dataclass(frozen=True)
class Exchange:
    """The default process group.

    Attributes:
        rank: the number of this process, from 0.
        world: how many there are.
    """

    rank: int
    world: int

    @classmethod
    def here(cls) -> Exchange:
        """The exchange of the process group that this process is in."""
        return cls(dist.get_rank(), dist.get_world_size())

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Make tensors the sums of those of all processes, in place, added in rank order: the same bits every time.

        Memory beside them: three pieces, and a copy of each that is not contiguous.
        """
        for kind in dict.fromkeys((t.dtype, t.device) for t in tensors):
            alike = [t for t in tensors if (t.dtype, t.device) == kind]
            flat = [t.reshape(-1) for t in alike]  # itself, where it is contiguous
            for pieces in _pieces(flat):
                self._add_pieces(pieces)
            for tensor, summed in zip(alike, flat, strict=True):
                if not tensor.is_contiguous():
                    tensor.copy_(summed.view(tensor.shape))

    def _add_pieces(self, pieces: list[Tensor]) -> None:
        """Every process adds up one part, and is given those that the others have added up."""
        sizes = [len(piece) for piece in pieces]
        part = -(-sum(sizes) // self.world)
        together = torch.cat([*pieces, pieces[0].new_zeros(part * self.world - sum(sizes))])
        with self._heard():
            received = torch.empty_like(together)
            dist.all_to_all_single(received, together)
            parts = received.view(self.world, part)
            total = parts[0].clone()
            for other in parts[1:]:
                total += other
            dist.all_gather(list(together.view(self.world, part).unbind()), total)
        for piece, summed in zip(pieces, torch.split(together[: sum(sizes)], sizes), strict=True):
            piece.copy_(summed)

    def gathered(self, value: Any) -> list[Any]:
        """What every process says, in rank order; something that JSON holds."""
        return [self.told(value, rank) for rank in range(self.world)]

    def told(self, value: Any, by: int = 0) -> Any:
        """What one process says; something that JSON holds."""
        said = _letters(value if self.rank == by else None)
        length = torch.tensor([len(said)], device="cpu")
        with self._heard():
            dist.broadcast(length, src=by)
            if self.rank != by:
                said = torch.empty(int(length), dtype=torch.uint8, device="cpu")
            dist.broadcast(said, src=by)
        return _value(said)

    def carried(self, parcel: Parcel | None, by: int) -> Parcel:
        """What one process has made, given to all of them, on the processor."""
        facts, tensors = parcel or (None, {})
        facts, shapes = self.told([facts, _shapes(tensors)], by)
        found = {}
        for name, (dtype, shape) in shapes.items():
            sent = _bytes(tensors[name]) if self.rank == by else _room(dtype, shape)
            with self._heard():
                dist.broadcast(sent, src=by)
            found[name] = sent.view(getattr(torch, dtype)).view(shape)
        return facts, found

    def sent_to_first(self, parcel: Parcel | None, by: int) -> Parcel | None:
        """What one process has made, given to process 0 only; None everywhere else."""
        if by == 0:
            return parcel
        with self._heard():
            if self.rank == by and parcel is not None:
                facts, tensors = parcel
                said = _letters([facts, _shapes(tensors)])
                for each in (torch.tensor([len(said)], device="cpu"), said, *map(_bytes, tensors.values())):
                    dist.send(each, dst=0)
            return _received(by) if self.rank == 0 else None

    def pieces(self, file: Path, size: int) -> Iterator[memoryview]:
        """A file of process 0, piece by piece, in every process. `size`: of all of it, in bytes."""
        with file.open("rb") if self.rank == 0 else nullcontext() as opened:
            for start in range(0, size, PIECE):
                piece = torch.empty(min(PIECE, size - start), dtype=torch.uint8, device="cpu")
                if opened is not None:
                    opened.readinto(bytes_of(piece))
                with self._heard():
                    dist.broadcast(piece, src=0)
                yield bytes_of(piece)

    @contextmanager
    def _heard(self) -> Iterator[None]:
        """What torch raises where another process is gone, in words."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise PeerError(f"another process of this run has ended; this was process {self.rank}") from error


def _pieces(flat: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Views of flat tensors, in order, about PIECE numbers at a time: small ones together, large ones in parts."""
    held: list[Tensor] = []
    size = 0
    for tensor in flat:
        for part in torch.split(tensor, PIECE):
            held.append(part)
            size += len(part)
            if size >= PIECE:
                yield held
                held, size = [], 0
    if size:
        yield held


def _received(by: int) -> Parcel:
    """What another process sends to this one alone."""
    length = torch.empty(1, dtype=torch.int64, device="cpu")
    dist.recv(length, src=by)
    said = torch.empty(int(length), dtype=torch.uint8, device="cpu")
    dist.recv(said, src=by)
    facts, shapes = _value(said)
    found = {}
    for name, (dtype, shape) in shapes.items():
        room = _room(dtype, shape)
        dist.recv(room, src=by)
        found[name] = room.view(getattr(torch, dtype)).view(shape)
    return facts, found


def _letters(value: Any) -> Tensor:
    """(bytes,) uint8 that say something that JSON holds."""
    return torch.frombuffer(bytearray(json.dumps({"said": value}).encode()), dtype=torch.uint8)


def _value(said: Tensor) -> Any:
    """The inverse of `_letters`."""
    return parse_object(said.numpy().tobytes(), "what another process says")["said"]


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, list[int]]]:
    """Name -> type and shape of each tensor."""
    return {name: (str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in tensors.items()}


def _bytes(tensor: Tensor) -> Tensor:
    """(bytes,) uint8 of a tensor, on the processor."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _room(dtype: str, shape: Sequence[int]) -> Tensor:
    """(bytes,) uint8 for a tensor to come."""
    return torch.empty(torch.Size(shape).numel() * getattr(torch, dtype).itemsize, dtype=torch.uint8, device="cpu")


__all__ = ["Exchange"]
