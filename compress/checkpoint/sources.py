"""Where uncompressed values come from, never changed: a folder of safetensors, one file, or a module in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from compress.errors import CheckpointError
from compress.io.keys import fingerprint_of
from compress.io.safetensors_file import read_header, read_piece, read_tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

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

    def files(self) -> list[Path]:
        """The files that it reads."""


class FolderSource:
    """A folder as `save_pretrained` writes it, or one file of a folder, read one tensor at a time.

    Raises:
        CheckpointError: nothing to read, a truncated or corrupt file, an index that points outside its folder or says
            something else than the files.
    """

    def __init__(self, folder: Path, name: str | None = None):
        self.folder = folder
        self._where: dict[str, Path] = {}
        self._stored: dict[str, StoredTensor] = {}
        index = folder / INDEX
        content = _read_index(index) if name is None and index.is_file() else {}
        listed: dict[str, str] | None = content.get("weight_map")
        self._files = _find_files(folder, listed) if name is None else [folder / name]
        if content and not isinstance(content.get("metadata"), dict):  # which transformers asks for
            raise CheckpointError(f'{index}: not a whole safetensors index: add "metadata": {{}}, or fetch it again')
        for file in self._files:
            for tensor, stored in read_header(file).tensors.items():
                if tensor in self._where:
                    raise CheckpointError(f"{file}: tensor {tensor} is also in {self._where[tensor].name}")
                if listed is not None and listed.get(tensor) != file.name:
                    raise CheckpointError(
                        f"{file} holds {tensor}, but {INDEX} does not name it there: files and index are of two "
                        "models or versions; fetch all of them from one place"
                    )
                self._where[tensor] = file
                self._stored[tensor] = stored
        for tensor, where in (listed or {}).items():
            if tensor not in self._where:
                raise CheckpointError(f"{index}: names {tensor}, which is not in {where}; fetch both again")

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

    def files(self) -> list[Path]:
        return list(self._files)


def _read_index(index: Path) -> dict[str, Any]:
    """Its content; `weight_map` is tensor name -> name of its file."""
    try:
        content: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))
        listed = content["weight_map"]
        if not listed or not all(isinstance(name, str) for name in listed.values()):
            raise ValueError("weight_map must map tensor names to file names")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index}: not a safetensors index: {error}") from error
    return content


def _find_files(folder: Path, listed: Mapping[str, str] | None) -> list[Path]:
    """The files that hold the weights: one, or those that the index names."""
    single = folder / SINGLE
    if listed is None:
        if single.is_file():
            return [single]
        pickled = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt"))
        hint = f"; {pickled[0].name} is a pickle, which is never loaded: convert it first" if pickled else ""
        raise CheckpointError(f"{folder}: no {SINGLE} and no {INDEX}{hint}")
    named = sorted(set(listed.values()))
    for name in named:
        if Path(name).name != name:
            raise CheckpointError(f"{folder / INDEX}: names {name!r}, which is outside its folder; refused")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / INDEX}: names {name}, which does not exist; download or copy it")
    if SINGLE not in named and single.is_file():
        raise CheckpointError(
            f"{folder} holds two models: {SINGLE}, and {INDEX} with {named[0]} and other files. Take out the one that "
            "is not meant"
        )
    return [folder / name for name in named]


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

    def files(self) -> list[Path]:
        return []


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

    def files(self) -> list[Path]:
        """The files that it reads."""
        return self.before.files()


class AddedSource(ChangedSource):
    """A source with further tensors, that are computed and in no file."""

    def __init__(self, before: Source, added: Mapping[str, Tensor]):
        super().__init__(before)
        self._added = added

    def names(self) -> Iterable[str]:
        return [*self.before.names(), *self._added]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._added[name].shape) if name in self._added else self.before.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._added[name].dtype if name in self._added else self.before.dtype(name)

    def read(self, name: str) -> Tensor:
        return self._added[name].clone() if name in self._added else self.before.read(name)

    def piece(self, name: str, start: int, stop: int) -> Tensor:
        if name in self._added:
            return self._added[name].flatten()[start:stop].clone()
        return self.before.piece(name, start, stop)


class CopiedSource(ChangedSource):
    """A source in which some tensors are also found under further names.

    Args:
        copies: further name -> the name in the source.
    """

    def __init__(self, before: Source, copies: Mapping[str, str]):
        super().__init__(before)
        self._copies = dict(copies)

    def names(self) -> Iterable[str]:
        return dict.fromkeys([*self.before.names(), *self._copies])

    def shape(self, name: str) -> tuple[int, ...]:
        return self.before.shape(self._copies.get(name, name))

    def dtype(self, name: str) -> torch.dtype:
        return self.before.dtype(self._copies.get(name, name))

    def read(self, name: str) -> Tensor:
        return self.before.read(self._copies.get(name, name))

    def piece(self, name: str, start: int, stop: int) -> Tensor:
        return self.before.piece(self._copies.get(name, name), start, stop)
