"""Folders that several tests of a module read, each written when the first one asks for it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Folders:
    """`folders / name`: what was written under a name; to be read only.

    Attributes:
        root: where they lie.
        write: writes one of them into a folder that does not exist yet.
    """

    root: Path
    write: Callable[[str, Path], object]

    def __truediv__(self, name: str) -> Path:
        folder = self.root / name
        if not folder.exists():
            self.write(name, folder)
        return folder
