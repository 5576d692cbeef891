"""A base and a delta, read as the model that they make: a piece at a time, by the same arithmetic everywhere.

An element of a coded tensor is the base's in float32, plus the delta's, rounded to the base's type.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.checkpoint.artifact import Artifact
from compress.checkpoint.delta import factors
from compress.encodings.signs import Signs
from compress.errors import CheckpointError
from compress.io.keys import key_of
from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from torch import Tensor

    from compress.checkpoint.delta.codings import Chunks
    from compress.checkpoint.delta.file import Delta


class DeltaSource:
    """The tensors of a base with a delta added, by their names in the model.

    Of a coded tensor the chunk that was read last is kept: pieces are mostly asked for in order.
    """

    def __init__(self, base: Artifact, delta: Delta):
        self._base, self._delta = base, delta
        self._open: tuple[str, Chunks] | None = None
        self._last: tuple[str, int, Signs] | None = None

    def names(self) -> Iterable[str]:
        """Every tensor's name."""
        return [*(name for name, _ in self._base.graph.tensors()), *self._base.carried]

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape: the base's."""
        return self._base.source.shape(self._base.name_in_source(name))

    def dtype(self, name: str) -> torch.dtype:
        """Its type: the base's."""
        return self._base.source.dtype(self._base.name_in_source(name))

    def read(self, name: str) -> Tensor:
        """Its value, as a tensor of its own."""
        value = torch.empty(self.shape(name), dtype=self.dtype(name), device="cpu")
        flat, size = value.view(-1), self._delta.chunk_size
        for start in range(0, len(flat), size):
            stop = min(start + size, len(flat))
            flat[start:stop] = self.piece(name, start, stop)
        return value

    def piece(self, name: str, start: int, stop: int) -> Tensor:
        """Elements of its value, flattened, as a tensor of its own."""
        if name in self._delta and not self._delta.is_coded(name):
            return self._delta.source.piece(name, start, stop)
        value = self._base.source.piece(self._base.name_in_source(name), start, stop).to(self.dtype(name))
        if name not in self._delta or start == stop:
            return value
        parts = [signs.value() for signs in self._signs(name, start, stop)]
        return value.float().add_(parts[0] if len(parts) == 1 else torch.cat(parts)).to(value.dtype)

    def fingerprint(self) -> str:
        """Identifies the delta; the base has a fingerprint of its own."""
        return key_of(self._delta.about["sha256"], self._delta.about["tensors"])

    def files(self) -> list[Path]:
        """The files that it reads."""
        return [*self._base.source.files(), self._delta.file]

    def _signs(self, name: str, start: int, stop: int) -> Iterator[Signs]:
        size, total = self._delta.chunk_size, torch.Size(self.shape(name)).numel()
        for index in range(start // size, -(-stop // size)):
            begin = index * size
            whole = self._chunk(name, index, min(size, total - begin))
            yield Signs(whole.scales, whole.signs[:, max(0, start - begin) : stop - begin])

    def _chunk(self, name: str, index: int, length: int) -> Signs:
        if self._last is None or self._last[:2] != (name, index):
            if self._open is None or self._open[0] != name:
                self._open = name, self._delta.chunks(name)
            try:
                self._last = name, index, self._open[1].chunk(index, length)
            except (ValueError, IndexError, RuntimeError) as error:
                raise CheckpointError(f"{self._delta.file}: {name} cannot be read: {error}; fetch it again") from error
        return self._last[2]


def with_delta(base: Artifact, delta: Delta) -> Artifact:
    """The model that a base and its delta make."""
    if factors.ADAPTER in delta.about:
        return factors.of_delta(base, delta)
    return Artifact(base.graph, DeltaSource(base, delta), dict(base.graph.tied), carried=base.carried)
