"""The ledger of several processes: process 0 keeps it, and the others read what it has committed.

Where another process sees the files of process 0, as on one machine, it reads them there. Where it does not, it is sent
a copy, which it keeps in a folder of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.engine.ledger import MemoryLedger, records_in, tensors_in
from compress.errors import CheckpointError
from compress.io.atomic import write_pieces
from compress.io.source_code import code_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import torch

    from compress.engine.exchange import Exchange
    from compress.engine.ledger import FolderLedger, Opened, Record, Write
    from compress.engine.resume import Dependencies


class SharedLedger(MemoryLedger):
    """What all processes of a run take the same results from.

    Args:
        exchange: between the processes.
        kept: the ledger of process 0; None in every other one.
        copies: a folder for what this process does not see.
        check: called before a unit is taken, and raises where what this process reads has changed.
    """

    def __init__(
        self, exchange: Exchange, kept: FolderLedger | None, copies: Path, check: Callable[[], None] = lambda: None
    ):
        self.exchange, self.kept, self.copies, self.check = exchange, kept, copies, check

    def code_of(self, kinds: Iterable[type], modules: Iterable[str] = ()) -> str:
        """A hash over the code of some passes and modules, and of what they import."""
        return code_of(kinds, modules)

    def depends_on(self, now: Dependencies) -> None:
        """Process 0 says what of the finished work is of no use any longer."""
        if self.kept:
            self.kept.depends_on(now)

    def load(self, unit: str, key: str) -> list[Record] | None:
        """The records of a unit finished under this very key, else None."""
        found = self.kept is not None and self.kept.load(unit, key) is not None
        return self._records(unit, key) if self.exchange.told(found) else None

    def commit(self, unit: str, key: str, records: list[Record]) -> list[Record]:
        """Process 0 writes its records; all are given those as they were written."""
        self.check()
        if self.kept:
            self.kept.commit(unit, key, records)
        return self._records(unit, key)

    def _records(self, unit: str, key: str) -> list[Record]:
        file = self._seen(f"{unit}.safetensors")
        found = records_in(file, key)
        if found is None:
            raise _differs(file)
        return found

    def load_tensors(self, unit: str, key: str) -> dict[str, torch.Tensor] | None:
        """What was kept under this very key, else None."""
        found = self.kept.load_tensors(unit, key) if self.kept else None
        if not self.exchange.told(found is not None):
            return None
        file = self._seen(f"{unit}.safetensors")
        found = tensors_in(file, key) if found is None else found
        if found is None:
            raise _differs(file)
        return found

    def commit_tensors(self, unit: str, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Process 0 keeps tensors of work that is not finished; all have the same."""
        if self.kept:
            self.kept.commit_tensors(unit, key, tensors)

    def make_file(self, unit: str, key: str, write: Write) -> Path:
        """A large file, in the writing of which all take part, unless it is there."""
        found = self.kept.find_file(unit, key) if self.kept else None
        if not self.exchange.told(found is not None):
            if self.kept:
                found = self.kept.make_file(unit, key, write)
            else:
                write(None)
        return self._seen(found.name if found else "")

    def open_file(self, unit: str, key: str, write: Write, opened: Callable[[Path], Opened]) -> Opened:
        """A large file, opened; made again, once, where it was damaged since."""
        for last in (False, True):
            file, found = self.make_file(unit, key, write), None
            try:
                found = opened(file)
            except CheckpointError:
                if last:
                    raise
            if all(self.exchange.gathered(found is not None)):
                assert found is not None
                return found
            if self.kept or file.parent == self.copies:
                file.unlink()
        raise AssertionError("the second time returns or raises")

    def forget(self, unit: str) -> None:
        """Remove large files of a unit, and copies of them."""
        if self.kept:
            self.kept.forget(unit)
        for copy in self.copies.glob(f"{unit}-*"):
            copy.unlink()

    def forget_tensors(self, unit: str) -> None:
        """Remove what `commit_tensors` kept of a unit and of its parts, and copies of it."""
        if self.kept:
            self.kept.forget_tensors(unit)
        (self.copies / f"{unit}.safetensors").unlink(missing_ok=True)
        self.forget(unit)

    def load_row(self, unit: str, key: str) -> dict[str, Any] | None:
        """What was measured under this very key, else None."""
        row: dict[str, Any] | None = self.exchange.told(self.kept.load_row(unit, key) if self.kept else None)
        return row

    def commit_row(self, unit: str, key: str, row: Mapping[str, Any]) -> None:
        """Process 0 writes what all have measured."""
        self.check()
        if self.kept:
            self.kept.commit_row(unit, key, row)

    def _seen(self, name: str) -> Path:
        """A file of process 0 where this process can read it: there, or a copy."""
        mine = self.kept.folder / name if self.kept else None
        where, identity = self.exchange.told([str(mine.absolute()), _identity(mine)] if mine else None)
        file = Path(where)
        sees = mine is not None or _identity(file) == identity
        if all(self.exchange.gathered(sees)):
            return file
        pieces = self.exchange.pieces(file, identity[0])
        if sees:
            for _ in pieces:  # the others'
                pass
            return file
        write_pieces(self.copies / file.name, pieces)
        return self.copies / file.name


def _identity(file: Path) -> list[int]:
    """What no other file has: its size, when it was written, its place on the disk; nothing where there is none."""
    try:
        stat = file.stat()
    except OSError:
        return []
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def _differs(file: Path) -> CheckpointError:
    return CheckpointError(f"{file} reads back differently; the disk or the network may be failing")


__all__ = ["SharedLedger"]
