"""The ledger of one run among several: what another has finished under the very same key is not done again.

The runs share a folder. What one finishes of the stages that they have in common is linked there under its key, and
whoever comes to the same key links it into its own folder of unfinished work, where it is as if done there: sealed
files are read as any other, and one that was damaged is done again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.engine.ledger import FolderLedger
from compress.engine.resume import UNIT
from compress.io.atomic import link

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from compress.engine.ledger import Record, Write
    from compress.engine.resume import Resume

KEY_LETTERS = 32  # of a key in a name; the file holds the whole


class SharingLedger(FolderLedger):
    """Keeps every finished unit in a folder of its own, and those of the first stages for others as well.

    Args:
        folder: of this run.
        resume: as of `FolderLedger`.
        check: as of `FolderLedger`.
        shared: what the runs share.
        stages: how many of the first stages are of use to others.
    """

    def __init__(self, folder: Path, resume: Resume | None, check: Callable[[], None], *, shared: Path, stages: int):
        super().__init__(folder, resume, check)
        self.shared, self.stages = shared, stages
        shared.mkdir(parents=True, exist_ok=True)

    def load(self, unit: str, key: str) -> list[Record] | None:
        self._take(unit, key, f"{unit}.safetensors")
        return super().load(unit, key)

    def commit(self, unit: str, key: str, records: list[Record]) -> list[Record]:
        found = super().commit(unit, key, records)
        self._give(unit, key, f"{unit}.safetensors")
        return found

    def load_row(self, unit: str, key: str) -> dict[str, Any] | None:
        self._take(unit, key, f"{unit}.json")
        return super().load_row(unit, key)

    def commit_row(self, unit: str, key: str, row: Mapping[str, Any]) -> None:
        super().commit_row(unit, key, row)
        self._give(unit, key, f"{unit}.json")

    def find_file(self, unit: str, key: str) -> Path | None:
        for file in self.shared.glob(f"{key[:KEY_LETTERS]}-{unit}-{key[:16]}-*.safetensors"):
            self._take(unit, key, file.name[KEY_LETTERS + 1 :])
        return super().find_file(unit, key)

    def make_file(self, unit: str, key: str, write: Write) -> Path:
        file = super().make_file(unit, key, write)
        self._give(unit, key, file.name)
        return file

    def _place(self, unit: str, key: str, name: str) -> Path | None:
        """Where others find a file; None for one that is of no use to them."""
        match = UNIT.match(unit)
        if match is not None and int(match["stage"]) >= self.stages:
            return None
        return self.shared / f"{key[:KEY_LETTERS]}-{name}"

    def _take(self, unit: str, key: str, name: str) -> None:
        place = self._place(unit, key, name)
        if place is not None and place.is_file() and not (self.folder / name).exists():
            link(place, self.folder / name)

    def _give(self, unit: str, key: str, name: str) -> None:
        place = self._place(unit, key, name)
        if place is not None:
            link(self.folder / name, place)


__all__ = ["SharingLedger"]
