"""Keys: hashes over everything that a result depends on.

What a stage computes is kept under a key of what it starts from, its options and the code that computes it
(`source_code.py`), so a change of any of these redoes the stage and those behind it, and nothing else does.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

from compress.errors import CheckpointError
from compress.io.safetensors_file import bytes_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor


class Samples(Protocol):
    """A data set: inputs, labels where they are known, and how many samples each named source has."""

    @property
    def inputs(self) -> Tensor:
        """(N, ...)."""

    @property
    def labels(self) -> Tensor | None:
        """(N,) int64."""

    @property
    def parts(self) -> Mapping[str, int]:
        """Name -> count."""

    @property
    def named(self) -> Sequence[Mapping[str, Tensor]]:
        """Samples with several inputs by name."""


def key_of(*parts: Any) -> str:
    """A key from JSON-able parts, the previous key among them."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def hash_of(data: Samples | None) -> str | None:
    """SHA-256 of what is in a data set, and of what its sources are called."""
    if data is None:
        return None
    tensors = [data.inputs] if data.labels is None else [data.inputs, data.labels]
    named = [[(name, list(t.shape), digest(t)) for name, t in sorted(sample.items())] for sample in data.named]
    return key_of(dict(data.parts), *((list(t.shape), digest(t)) for t in tensors), *([named] if named else []))


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(bytes_of(tensor.detach())).hexdigest()


def fingerprint_of(files: Sequence[Path], config: Path) -> str:
    """A hash of the whole of some files and their names, and of a configuration, which need not be there."""
    found = [(path.name, digest_of_file(path)) for path in files]
    return key_of(found, digest_of_file(config) if config.is_file() else None)


def digest_of_file(file: Path) -> str:
    """SHA-256 of a whole file, which is read once as long as its size, change time and place on the disk stay."""
    stat = file.stat()
    return _known_digest(file.absolute(), stat.st_size, stat.st_mtime_ns, stat.st_ino)


@cache
def _known_digest(file: Path, _size: int, _changed: int, _inode: int) -> str:
    return digest_now(file)


def digest_now(file: Path) -> str:
    """SHA-256 of a whole file as it is on the disk now, whatever was known of it."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@dataclass(frozen=True)
class Watch:
    """Files that must stay as they are while a run reads them.

    Attributes:
        digests: file -> SHA-256 of it at the start.
    """

    digests: Mapping[Path, str]

    @classmethod
    def over(cls, files: Iterable[Path]) -> Watch:
        """Each file, read once."""
        return cls({file: digest_of_file(file) for file in files})

    def refuse_changed(self) -> None:
        """Refuse to go on with files that were replaced since the start.

        Raises:
            CheckpointError: names one.
        """
        for file, digest in self.digests.items():
            if not file.is_file() or digest_of_file(file) != digest:
                raise CheckpointError(
                    f"{file} was changed or removed while this run was reading it, so nothing more was kept; give the "
                    "same command again when it no longer changes"
                )
