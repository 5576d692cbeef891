"""Where uncompressed values come from, never changed: a folder of safetensors, one file, or a module in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from compress.errors import CheckpointError
from compress.io.keys import fingerprint_of
from compress.io.safetensors_file import read_header, read_piece, read_tensor

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from torch import Tensor, nn

    from compress.io.safetensors_file import StoredTensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Source(Protocol):
    """Where the uncompressed values come from."""

    def names(self) -> Iterable[str]:
        """Every tensor's name."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape."""

    def dtype(self, name: str) -> torch.dtype:
        """Its stored type."""

    def read(self, name: str) -> Tensor:
        """Its value, as a tensor of its own."""

    def piece(self, name: str, start: int, stop: int) -> Tensor:
        """Elements of its value, flattened, as a tensor of its own."""

    def fingerprint(self) -> str:
        """Identifies the content."""


class FolderSource:
    """A folder as `save_pretrained` writes it, or one file of a folder, read one tensor at a time.

    Raises:
        CheckpointError: nothing to read, a truncated or corrupt file, an index that points outside its folder.
    """

    def __init__(self, folder: Path, name: str | None = None):
        self.folder = folder
        self._where: dict[str, Path] = {}
        self._stored: dict[str, StoredTensor] = {}
        self._files = self._find_files() if name is None else [folder / name]
        for file in self._files:
            for tensor, stored in read_header(file).tensors.items():
                if tensor in self._where:
                    raise CheckpointError(f"{file}: tensor {tensor} is also in {self._where[tensor].name}")
                self._where[tensor] = file
                self._stored[tensor] = stored

    def _find_files(self) -> list[Path]:
        index = self.folder / INDEX
        if not index.is_file():
            single = self.folder / SINGLE
            if single.is_file():
                return [single]
            pickled = sorted(self.folder.glob("*.bin")) + sorted(self.folder.glob("*.pt"))
            hint = f"; {pickled[0].name} is a pickle, which is never loaded: convert it first" if pickled else ""
            raise CheckpointError(f"{self.folder}: no {SINGLE} and no {INDEX}{hint}")
        try:
            named = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            if not named or not all(isinstance(name, str) for name in named):
                raise ValueError("weight_map must map tensor names to file names")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index}: not a safetensors index: {error}") from error
        for name in named:
            if Path(name).name != name:
                raise CheckpointError(f"{index}: names {name!r}, which is outside its folder; refused")
            if not (self.folder / name).is_file():
                raise CheckpointError(f"{index}: names {name}, which does not exist; download or copy it")
        return [self.folder / name for name in named]

    def names(self) -> Iterable[str]:
        return self._where

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._stored[name].dtype

    def read(self, name: str) -> Tensor:
        return read_tensor(self._where[name], self._stored[name])

    def piece(self, name: str, start: int, stop: int) -> Tensor:
        return read_piece(self._where[name], self._stored[name], start, stop)

    def fingerprint(self) -> str:
        return fingerprint_of(self._files, self.folder / "config.json")


class WrittenSource(FolderSource):
    """One file that this run has written: names as in the model, tied ones once, in the order of a result."""

    @property
    def file(self) -> Path:
        """The path of the file."""
        return self._files[0]


class ModuleSource:
    """The parameters and buffers of a module in memory."""

    def __init__(self, module: nn.Module):
        self._values = {**dict(module.named_buffers()), **dict(module.named_parameters())}

    def names(self) -> Iterable[str]:
        return self._values

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._values[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._values[name].dtype

    def read(self, name: str) -> Tensor:
        return self._values[name].detach().clone()

    def piece(self, name: str, start: int, stop: int) -> Tensor:
        return self._values[name].detach().flatten()[start:stop].clone()

    def fingerprint(self) -> str:
        return "in memory"


class ChangedSource:
    """A source with some values of another source replaced."""

    def __init__(self, before: Source):
        self.before = before

    def names(self) -> Iterable[str]:
        """Every tensor's name."""
        return self.before.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape."""
        return self.before.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Its stored type."""
        return self.before.dtype(name)

    def read(self, name: str) -> Tensor:
        """Its value, as a tensor of its own."""
        return self.before.read(name)

    def piece(self, name: str, start: int, stop: int) -> Tensor:
        """Elements of its value, flattened, as a tensor of its own."""
        return self.before.piece(name, start, stop)

    def fingerprint(self) -> str:
        """Identifies the content."""
        return self.before.fingerprint()
