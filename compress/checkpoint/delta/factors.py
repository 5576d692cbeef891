"""The delta of a LoRA adapter: its factors A and B as signs and scales, all else of it as it is.

The file has the adapter's own names, and its metadata what of `adapter_config.json` decides what they mean, so a base
and such a delta are read as a base and an adapter are (`checkpoint/adapters.py`): W + scale * B A, A and B decoded.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint.adapters import AdapterSource, addable
from compress.checkpoint.artifact import Artifact
from compress.checkpoint.sources import FolderSource
from compress.errors import CheckpointError
from compress.io.keys import key_of
from compress.io.small_file import parse_object
from compress.lazy import torch
from compress.models.adapters import CONFIG, WEIGHTS, LoraConfig, read_settings

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

    from compress.checkpoint.delta.file import Delta

KEPT = ("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "task_type")  # settings
ADAPTER, SHAPES = "adapter", "shapes"  # in the metadata of a file


@dataclass(frozen=True)
class Factors:
    """What an adapter holds, some of it decoded.

    Attributes:
        file: that says what it is, for messages.
        stored: of what is kept as it is.
        shapes: name of a coded factor -> its shape.
        decode: its value, float32.
    """

    file: Path
    stored: FolderSource
    shapes: Mapping[str, tuple[int, ...]]
    decode: Callable[[str], Tensor]

    @property
    def folder(self) -> Path:
        """Where its file is."""
        return self.file.parent

    def names(self) -> Iterable[str]:
        """Every tensor's name."""
        return self.stored.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape."""
        return self.shapes[name] if name in self.shapes else self.stored.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Its type."""
        return torch.float32 if name in self.shapes else self.stored.dtype(name)

    def read(self, name: str) -> Tensor:
        """Its value, as a tensor of its own."""
        return self.decode(name) if name in self.shapes else self.stored.read(name)

    def files(self) -> list[Path]:
        """The files that it reads."""
        return [self.file]


class FactoredSource(AdapterSource):
    """A base with coded factors of an adapter merged.

    Attributes:
        sealed: identifies the factors.
    """

    sealed: str = ""

    def fingerprint(self) -> str:
        return key_of(self.before.fingerprint(), self.sealed)

    def _own_files(self) -> list[Path]:
        return self._adapter.files()


def settings_of(adapter: Path) -> dict[str, Any]:
    """What of an adapter's configuration decides what its factors mean.

    Raises:
        CheckpointError: no plain LoRA.
    """
    LoraConfig.read(adapter)
    settings = read_settings(adapter)
    return {name: settings[name] for name in KEPT if name in settings}


def adapter_file(adapter: Path) -> FolderSource:
    """The tensors of an adapter's folder."""
    return FolderSource(adapter, WEIGHTS)


def coded_names(base: Artifact, adapter: Path) -> list[str]:
    """Names of the factors of an adapter that a base has a place for, in order.

    Raises:
        CheckpointError: none, or some that it has no place for.
    """
    changes = addable(base.source, adapter_file(adapter), base.graph, LoraConfig.read(adapter))
    found = sorted(name for each in changes.added.values() for name in (each.a, each.b))
    if not found:
        raise CheckpointError(f"{adapter} holds no factors, only tensors that were trained whole; take it as it is")
    return found


def with_factors(base: Artifact, factors: Factors, settings: Mapping[str, Any], sealed: str) -> Artifact:
    """The model that a base and the factors of an adapter make.

    Args:
        base: as it was when they were coded.
        factors: decoded when they are read.
        settings: as `settings_of`.
        sealed: identifies the factors.
    """
    config = LoraConfig.of(settings, factors.file)
    source = FactoredSource(base.source, factors, addable(base.source, factors, base.graph, config))
    source.sealed = sealed
    return Artifact(base.graph, source, dict(base.renamed), carried=base.carried)


def of_delta(base: Artifact, delta: Delta) -> Artifact:
    """The model that a base and a delta of coded factors make.

    Raises:
        CheckpointError: its metadata are no adapter's.
    """
    coded = sorted(name for name in delta.source.names() if delta.is_coded(name))
    try:
        said = json.loads(delta.about[SHAPES])
        shapes = {name: tuple(map(int, shape)) for name, shape in zip(coded, said, strict=True)}
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{delta.file} does not say the shapes of its factors: {error}; fetch it again"
        ) from error

    def decode(name: str) -> Tensor:
        shape = shapes[name]
        total, size, chunks = torch.Size(shape).numel(), delta.chunk_size, delta.chunks(name)
        try:
            parts = [chunks.chunk(start // size, min(size, total - start)).value() for start in range(0, total, size)]
        except (ValueError, IndexError, RuntimeError) as error:
            raise CheckpointError(f"{delta.file}: {name} cannot be read: {error}; fetch it again") from error
        return torch.cat(parts).view(shape)

    factors = Factors(delta.file, delta.source, shapes, decode)
    settings = parse_object(delta.about[ADAPTER], str(delta.file))
    return with_factors(base, factors, settings, delta.about["sha256"])


def described(settings: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """What the metadata of a file say of an adapter."""
    return {
        ADAPTER: json.dumps(dict(settings), separators=(",", ":")),
        SHAPES: json.dumps([list(shapes[name]) for name in sorted(shapes)], separators=(",", ":")),
    }


__all__ = ["ADAPTER", "CONFIG", "Factors", "adapter_file", "coded_names", "described", "of_delta", "settings_of"]
