"""What is done already: one file per unit of work, named by stage and unit, accepted only under its key.

A key is a hash over all that the result depends on (source, calibration, seed, threads, code, every pass so far), so a
changed pipeline keeps the work before the change and redoes the rest. A file is written under another name, flushed to
disk and renamed: it is whole or it is not there. Each bears a SHA-256 of itself: one that was damaged is done again.
Failures are never recorded.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from compress.calibration.training import TrainingStore
from compress.checkpoint.artifact import Packed
from compress.encodings import Spec, Weight, pack
from compress.engine.resume import Dependencies, Resume
from compress.errors import CheckpointError
from compress.io.atomic import publish, write_json, write_text, writing
from compress.io.keys import digest_of_file, key_of
from compress.io.safetensors_file import SEAL, read_header, read_tensors, save_sealed, seal_of
from compress.io.source_code import code_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    import torch

DEPENDENCIES = "dependencies.json"
# Every name of a file of a ledger, whole or half written.
UNITS = re.compile(r"(original|dependencies|s\d\d+(-.*)?)\.(safetensors|json|partial)")

Opened = TypeVar("Opened")
# Writes a large file; None where another process writes it, and this one does its share of the work.
Write: TypeAlias = "Callable[[Path | None], None]"


@dataclass(frozen=True)
class Record:
    """One site of a finished unit."""

    site: str
    weight: Weight | Packed
    notes: dict[str, Any]


class MemoryLedger:
    """Keeps results in memory only: nothing to resume.

    Attributes:
        in_memory: whether weights are kept as they are given, and not packed into files.
    """

    in_memory = True

    def code_of(self, kinds: Iterable[type], modules: Iterable[str] = ()) -> str:
        """What the key of a result must know of the code that computes it: nothing, where no result is kept."""
        return ""

    def depends_on(self, now: Dependencies) -> None:
        """Results are going to depend on this; nothing is kept, so nothing is compared."""

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

    def make_file(self, unit: str, key: str, write: Write) -> Path | None:
        """None: nothing is written."""
        return None

    def open_file(self, unit: str, key: str, write: Write, opened: Callable[[Path], Opened]) -> Opened | None:
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

    def forget_tensors(self, unit: str) -> None:
        """Nothing was kept."""

    def load_row(self, unit: str, key: str) -> dict[str, Any] | None:
        """None: nothing was measured before."""
        return None

    def commit_row(self, unit: str, key: str, row: Mapping[str, Any]) -> None:
        """Nothing to keep."""


class FolderLedger(MemoryLedger):
    """Keeps every finished unit as a file in a folder, and tells `resume` what it finds and misses."""

    in_memory = False

    def __init__(self, folder: Path, resume: Resume | None = None, check: Callable[[], None] = lambda: None):
        """`check` is called before anything is kept, and raises where it must not be."""
        self.folder, self.resume, self.check = folder, resume or Resume((), 0, listening=False), check
        folder.mkdir(parents=True, exist_ok=True)

    def depends_on(self, now: Dependencies) -> None:
        """Say what of the finished work is of no use any longer, and why; remember what the next depends on."""
        file = self.folder / DEPENDENCIES
        try:
            before = Dependencies(**json.loads(file.read_text(encoding="utf-8")))
            self.resume.changed(before, now, [p.stem for p in self.folder.iterdir() if UNITS.fullmatch(p.name)])
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
            pass  # the first run, or damaged: it only serves to say more
        write_json(asdict(now), file)

    def code_of(self, kinds: Iterable[type], modules: Iterable[str] = ()) -> str:
        """A hash over the code of some passes and modules, and of what they import."""
        return code_of(kinds, modules)

    def load(self, unit: str, key: str) -> list[Record] | None:
        """The records of a unit finished under this very key, else None."""
        records = records_in(self.folder / f"{unit}.safetensors", key)
        self.resume.loaded(unit, records is not None)
        return records

    def commit(self, unit: str, key: str, records: list[Record]) -> list[Record]:
        """Write a unit's packed weights; returned records read from the file."""
        tensors: dict[str, torch.Tensor] = {}
        entries: dict[str, Any] = {}
        specs: dict[str, Spec] = {}
        file = self.folder / f"{unit}.safetensors"
        for record in records:
            assert isinstance(record.weight, Weight)
            spec, packed = pack(record.weight)
            tensors.update({f"{record.site}.{leaf}": value.cpu() for leaf, value in packed.items()})
            specs[record.site] = spec
            entries[record.site] = {"spec": spec.to_json(), "notes": record.notes}
        seal = self._save(file, tensors, {"key": key, "records": json.dumps(entries)})
        return [Record(r.site, Packed(file, r.site, specs[r.site], seal), r.notes) for r in records]

    def _save(self, file: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
        self.check()
        temporary = file.with_suffix(".partial")
        with writing(temporary):
            seal = save_sealed(tensors, temporary, metadata)
        publish(temporary, file)
        return seal

    def load_tensors(self, unit: str, key: str) -> dict[str, torch.Tensor] | None:
        """What was kept under this very key, else None."""
        tensors = tensors_in(self.folder / f"{unit}.safetensors", key)
        if tensors is not None:
            self.resume.state_loaded(unit)
        return tensors

    def commit_tensors(self, unit: str, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep tensors of work that is not finished, in the place of what was kept before."""
        self._save(self.folder / f"{unit}.safetensors", dict(tensors), {"key": key})

    def find_file(self, unit: str, key: str) -> Path | None:
        """A large file that is there, whole, under this very key."""
        begin = f"{unit}-{key[:16]}"
        for file in self.folder.glob(f"{begin}-*.safetensors"):
            if file.stem == f"{begin}-{digest_of_file(file)}":
                return file
        return None

    def make_file(self, unit: str, key: str, write: Write) -> Path:
        """A large file that `write` writes, unless it is there, whole, under this very key.

        Its name ends with the SHA-256 of what is in it.
        """
        found = self.find_file(unit, key)
        if found is not None:
            return found
        begin = f"{unit}-{key[:16]}"
        self.forget(unit)
        temporary = self.folder / f"{begin}.partial"
        with writing(temporary):
            write(temporary)
        self.check()
        file = self.folder / f"{begin}-{digest_of_file(temporary)}.safetensors"
        publish(temporary, file)
        return file

    def forget(self, unit: str) -> None:
        """Remove large files of a unit: of a changed pipeline, not finished, or not needed any longer."""
        for other in self.folder.glob(f"{unit}-*"):
            other.unlink()

    def forget_tensors(self, unit: str) -> None:
        """Remove what `commit_tensors` kept of a unit and of its parts: the work is finished."""
        (self.folder / f"{unit}.safetensors").unlink(missing_ok=True)
        self.forget(unit)

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
            whole = data["key"] == key and data[SEAL] == key_of(key, row)
            return row if whole else None
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return None

    def commit_row(self, unit: str, key: str, row: Mapping[str, Any]) -> None:
        """Write what was measured."""
        self.check()
        file = self.folder / f"{unit}.json"
        write_text(file, json.dumps({"key": key, "row": dict(row), SEAL: key_of(key, dict(row))}))


def records_in(file: Path, key: str) -> list[Record] | None:
    """The records of a file that was written under this very key; None where it is not, or was damaged since."""
    if not file.is_file():
        return None
    try:
        metadata = read_header(file).metadata
        if metadata.get("key") != key or (seal := metadata[SEAL]) != seal_of(file):
            return None
        entries = json.loads(metadata["records"])
        specs = {site: Spec.from_json(said["spec"]) for site, said in entries.items()}
        return [Record(site, Packed(file, site, specs[site], seal), e["notes"]) for site, e in entries.items()]
    except (CheckpointError, LookupError, ValueError, RecursionError):
        return None  # not ours, or damaged since: it is simply done again


def tensors_in(file: Path, key: str) -> dict[str, torch.Tensor] | None:
    """The tensors of a file that was written under this very key; None where it is not, or was damaged since."""
    try:
        metadata = read_header(file).metadata
        if metadata.get("key") != key or metadata.get(SEAL) != seal_of(file):
            return None
        return read_tensors(file)
    except CheckpointError:
        return None


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
