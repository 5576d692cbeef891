"""The file of a delta: safetensors, written one tensor at a time, opened only if it is whole and for this base.

A tensor that is coded stands there as bytes, uint8; any other as it is in the fine-tune; one that is not there is the
base's. One of factors holds what an adapter does, under its names (`factors.py`). The metadata say how it was coded,
what base it belongs to, and a SHA-256 of header and data. In files of the first version it is one of the data alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint.delta.base import class_of, described_tensors, digest_of_tensors, refuse_another, refuse_other
from compress.checkpoint.delta.codings import CODINGS
from compress.checkpoint.sources import FolderSource
from compress.errors import CheckpointError
from compress.io.safetensors_file import SEAL, digest_of_data, read_header, seal_of, write_as_made
from compress.io.small_file import parse_object
from compress.lazy import torch
from compress.models import hub

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from compress.checkpoint.artifact import Artifact
    from compress.checkpoint.delta.codings import Chunks
    from compress.progress import Bars

DELTA = "delta.safetensors"
FORMAT, VERSION, FIRST = "compress-delta", "2", "1"
FACTORED = "3"  # the version of one that holds factors of an adapter


def locate(model: str) -> Path:
    """From what the user calls a model to the file of a delta (itself, in a folder or of a hub id), or to a folder.

    Raises:
        UsageError: there is nothing of that name.
    """
    path = Path(model)
    if path.is_file() and path.suffix == ".safetensors":
        return path
    return in_folder(hub.resolve(model))


def in_folder(folder: Path) -> Path:
    """The file of the delta that a folder holds, or else the folder."""
    return folder / DELTA if (folder / DELTA).is_file() else folder


@dataclass(frozen=True)
class Delta:
    """A file that was found whole.

    Attributes:
        file: where it is.
        source: its tensors as they are stored.
        about: its metadata.
    """

    file: Path
    source: FolderSource
    about: Mapping[str, str]

    @classmethod
    def open(cls, file: Path) -> Delta:
        """Open a file, after reading it once.

        Raises:
            CheckpointError: truncated, damaged, or no delta.
        """
        source = FolderSource(file.parent, file.name)
        about = read_header(file).metadata
        if about.get("format") != FORMAT:
            raise CheckpointError(f"{file} is not a compressed delta; a merge with compeft or bitdelta writes one")
        if about.get("version") not in (FIRST, VERSION, FACTORED) or about.get("coding") not in CODINGS:
            raise CheckpointError(f"{file} was written by a newer version of compress; update to read it")
        if about.get(SEAL) != (digest_of_data(file) if about["version"] == FIRST else seal_of(file)):
            raise CheckpointError(f"{file} is damaged: its content is not what was written; fetch it again")
        return cls(file, source, about)

    def refuse_other(self, base: Artifact, called: str) -> None:
        """Refuse a base that it was not made for.

        Raises:
            UsageError: names what differs.
        """
        if self.about["version"] == FACTORED:
            refuse_another(base, self.about["model"], self.about["tensors"], called)
        else:
            refuse_other(base, self.about["model"], parse_object(self.about["tensors"], str(self.file)), called)

    def __contains__(self, name: str) -> bool:
        return name in self.source.names()

    def is_coded(self, name: str) -> bool:
        """Whether a tensor stands there as signs, not as it is."""
        return self.source.dtype(name) == torch.uint8

    @property
    def chunk_size(self) -> int:
        """Elements per chunk."""
        return int(self.about["chunk"])

    def chunks(self, name: str) -> Chunks:
        """The chunks of a coded tensor."""
        coding = CODINGS[self.about["coding"]]
        return coding(lambda start, stop: self.source.piece(name, start, stop), self.chunk_size)

    def facts(self) -> dict[str, Any]:
        """Its size, for a report."""
        size, parameters = self.file.stat().st_size, int(self.about["parameters"])
        return {
            "bytes": size,
            "bits_per_parameter": 8 * size / parameters,
            "times_smaller": int(self.about["bytes"]) / size,
        }


def write_delta(
    file: Path,
    base: Artifact,
    names: Sequence[str],
    payload: Callable[[str], Tensor],
    *,
    method: str,
    coding: str,
    chunk: int,
    bars: Bars,
    adapter: Mapping[str, str] | None = None,
) -> None:
    """Write a delta.

    Args:
        file: to write.
        base: what it belongs to.
        names: the tensors it holds.
        payload: of each what is stored: (B,) uint8 where it is coded, else its value; one in memory at a time.
        method: that it was made by.
        coding: a key of `CODINGS`.
        chunk: elements of a chunk.
        bars: progress.
        adapter: of one that holds factors of an adapter, what the metadata say of that; `names` are the adapter's then.
    """
    whole = names if adapter is None else [name for name, tensor in base.graph.tensors() if tensor.is_floating_point()]
    sizes = [(base.source.shape(n), base.source.dtype(n)) for n in map(base.name_in_source, whole)]
    tensors = digest_of_tensors(base) if adapter else json.dumps(described_tensors(base), separators=(",", ":"))
    about = {
        "format": FORMAT, "version": FACTORED if adapter else VERSION, "method": method, "coding": coding,
        "chunk": str(chunk),
        "parameters": str(sum(torch.Size(shape).numel() for shape, _ in sizes)),
        "bytes": str(sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in sizes)),
        "model": class_of(base), "tensors": tensors,
        **(adapter or {}),
    }  # fmt: skip
    made = ((name, payload(name)) for name in bars.over(names, len(names), f"{method}: delta"))
    write_as_made(file, made, names, about)
