"""Keys: hashes over everything that a result depends on.

What a stage computes is kept under a key of what it starts from, its options and the code that computes it
(`source_code.py`), so a change of any of these redoes the stage and those behind it, and nothing else does.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, Protocol

from compress.io.safetensors_file import bytes_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

SAMPLES, SAMPLE = 64, 4096  # pieces of a file that stand for all of it, and bytes of one


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


def key_of(*parts: Any) -> str:
    """A key from JSON-able parts, the previous key among them."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def hash_of(data: Samples | None) -> str | None:
    """SHA-256 of what is in a data set, and of what its sources are called."""
    if data is None:
        return None
    tensors = [data.inputs] if data.labels is None else [data.inputs, data.labels]
    return key_of(dict(data.parts), *((list(t.shape), digest(t)) for t in tensors))


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(bytes_of(tensor.detach())).hexdigest()


def fingerprint_of(files: Sequence[Path], config: Path) -> str:
    """A hash of large files by name, size, change time and samples of their bytes, and of the whole of a small one.

    It is cheap, and differs for a changed file. `config` need not be there.
    """
    found = hashlib.sha256()
    for path in files:
        stat = path.stat()
        found.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        with path.open("rb") as file:
            for start in range(0, stat.st_size, max(1, stat.st_size // SAMPLES)):
                file.seek(start)
                found.update(file.read(SAMPLE))
    if config.is_file():  # the values of a module of its own class stand alone
        found.update(config.read_bytes())
    return found.hexdigest()
