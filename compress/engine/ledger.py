"""What is done already: one file per unit of work, named by stage and unit, accepted only under its key.

A key is a hash over everything the result depends on (source, calibration, seed, code, every pass so far), so a changed
pipeline keeps the work before the change and redoes the rest. A file is written under another name, flushed to disk and
renamed: it is whole or it is not there. Failures are never recorded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from compress.calibration.training import TrainingStore
from compress.checkpoint.artifact import Packed
from compress.encodings import Spec, Weight, pack
from compress.engine.resume import Resume
from compress.errors import CheckpointError
from compress.io.atomic import publish, write_text, writing
from compress.io.safetensors_file import read_header, read_tensors, save_tensors
from compress.io.source_code import code_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    import torch

Opened = TypeVar("Opened")


@dataclass(frozen=True)
class Record:
    """One site of a finished unit."""

    site: str
    weight: Weight | Packed
    notes: dict[str, Any]


class MemoryLedger:
    """Keeps results in memory only: nothing to resume."""

    def code_of(self, kinds: Iterable[type], modules: Iterable[str] = ()) -> str:
        """What the key of a result must know of the code that computes it: nothing, where no result is kept."""
        return ""

    def load(self, unit: str, key: str) -> list[Record] | None:
        """None: nothing was done before."""
        return None

    def commit(self, unit: str, key: str, records: list[Record]) -> list[Record]:
        """The records as given."""
        return records

    def load_tensors(self, unit: str, key: str) -> dict[str, torch.Tensor] | None:
        """None: nothing was kept before."""
        return None

    def commit_tensors(self, unit: str, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Nothing to keep."""

    def make_file(self, unit: str, key: str, write: Callable[[Path], None]) -> Path | None:
        """None: nothing is written."""
        return None

    def open_file(
        self, unit: str, key: str, write: Callable[[Path], None], opened: Callable[[Path], Opened]
    ) -> Opened | None:
        """A large file, opened; made again where it was damaged since. None where nothing is written."""
        file = self.make_file(unit, key, write)
        if file is None:
            return None
        try:
            return opened(file)
        except CheckpointError:
            file.unlink()
            file = self.make_file(unit, key, write)
            assert file is not None
            return opened(file)

    def forget(self, unit: str) -> None:
        """Nothing was written."""

    def load_row(self, unit: str, key: str) -> dict[str, Any] | None:
        """None: nothing was measured before."""
        return None

    def commit_row(self, unit: str, key: str, row: Mapping[str, Any]) -> None:
        """Nothing to keep."""


class FolderLedger(MemoryLedger):
    """Keeps every finished unit as a file in a folder, and tells `resume` what it finds and misses."""

    def __init__(self, folder: Path, resume: Resume | None = None):
        self.folder, self.resume = folder, resume or Resume((), 0, listening=False)
        folder.mkdir(parents=True, exist_ok=True)

    def code_of(self, kinds: Iterable[type], modules: Iterable[str] = ()) -> str:
        """A hash over the code of some passes and modules, and of what they import."""
        return code_of(kinds, modules)

    def load(self, unit: str, key: str) -> list[Record] | None:
        """The records of a unit finished under this very key, else None."""
        records = self._read(unit, key)
        self.resume.loaded(unit, records is not None)
        return records

    def _read(self, unit: str, key: str) -> list[Record] | None:
        file = self.folder / f"{unit}.safetensors"
        if not file.is_file():
            return None
        try:
            metadata = read_header(file).metadata
            if metadata.get("key") != key:
                return None
            entries = json.loads(metadata["records"])
        except (CheckpointError, KeyError, ValueError):
            return None  # not ours, or damaged since: it is simply done again
        return [Record(site, Packed(file, site, Spec.from_json(e["spec"])), e["notes"]) for site, e in entries.items()]

    def commit(self, unit: str, key: str, records: list[Record]) -> list[Record]:
        """Write a unit's packed weights; returned records read from the file."""
        tensors: dict[str, torch.Tensor] = {}
        entries = {}
        done = []
        file = self.folder / f"{unit}.safetensors"
        for record in records:
            assert isinstance(record.weight, Weight)
            spec, packed = pack(record.weight)
            tensors.update({f"{record.site}.{leaf}": value for leaf, value in packed.items()})
            entries[record.site] = {"spec": spec.to_json(), "notes": record.notes}
            done.append(Record(record.site, Packed(file, record.site, spec), record.notes))
        self._save(file, tensors, {"key": key, "records": json.dumps(entries)})
        return done

    def _save(self, file: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        temporary = file.with_suffix(".partial")
        with writing(temporary):
            save_tensors(tensors, temporary, metadata)
        publish(temporary, file)

    def load_tensors(self, unit: str, key: str) -> dict[str, torch.Tensor] | None:
        """What was kept under this very key, else None."""
        file = self.folder / f"{unit}.safetensors"
        try:
            if read_header(file).metadata.get("key") != key:
                return None
            tensors = read_tensors(file)
        except CheckpointError:
            return None
        self.resume.state_loaded(unit)
        return tensors

    def commit_tensors(self, unit: str, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep tensors of work that is not finished, in the place of what was kept before."""
        self._save(self.folder / f"{unit}.safetensors", dict(tensors), {"key": key})

    def make_file(self, unit: str, key: str, write: Callable[[Path], None]) -> Path:
        """A large file that `write` writes, unless it is there, whole, under this very key."""
        file = self.folder / f"{unit}-{key[:16]}.safetensors"
        if not file.is_file():
            self.forget(unit)
            temporary = file.with_suffix(".partial")
            with writing(temporary):
                write(temporary)
            publish(temporary, file)
        return file

    def forget(self, unit: str) -> None:
        """Remove large files of a unit: of a changed pipeline, not finished, or not needed any longer."""
        for other in self.folder.glob(f"{unit}-*"):
            other.unlink()

    def load_row(self, unit: str, key: str) -> dict[str, Any] | None:
        """What was measured under this very key, else None."""
        row = self._read_row(unit, key)
        self.resume.loaded(unit, row is not None)
        return row

    def _read_row(self, unit: str, key: str) -> dict[str, Any] | None:
        file = self.folder / f"{unit}.json"
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            row: dict[str, Any] = data["row"]
            return row if data["key"] == key else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def commit_row(self, unit: str, key: str, row: Mapping[str, Any]) -> None:
        """Write what was measured."""
        file = self.folder / f"{unit}.json"
        write_text(file, json.dumps({"key": key, "row": dict(row)}))


class KeptInLedger(TrainingStore):
    """Keeps the state of a training as a unit of work."""

    def __init__(self, ledger: MemoryLedger, unit: str, key: str):
        self.ledger, self.unit, self.key = ledger, unit, key

    def part(self, name: str) -> TrainingStore:
        return KeptInLedger(self.ledger, f"{self.unit}-{name}", self.key)

    def load(self) -> dict[str, torch.Tensor] | None:
        return self.ledger.load_tensors(self.unit, self.key)

    def save(self, state: dict[str, torch.Tensor]) -> None:
        self.ledger.commit_tensors(self.unit, self.key, state)
