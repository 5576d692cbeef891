"""The manifest of a finished folder: the mark that this program wrote it, and a SHA-256 of every file and tensor in it.

A folder in the folder that has a manifest of its own, such as an export, is described there. What a manifest does not
name is not this program's, and is never removed.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from compress.errors import CheckpointError
from compress.io.atomic import flush_names, write_text
from compress.io.keys import digest_now, key_of
from compress.io.safetensors_file import read_header

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

MANIFEST = "manifest.json"
FORMAT, VERSION = "compress-folder", 1
CARD = "README.md"  # people write their own words into it
READ_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Manifest:
    """What a folder was written with.

    Attributes:
        files: relative path -> {"bytes", "sha256"}.
        tensors: relative path of a safetensors file -> tensor -> SHA-256 of its bytes.
        replacing: files that are being replaced at the moment, as they are going to be.
    """

    files: dict[str, dict[str, Any]]
    tensors: dict[str, dict[str, str]]
    replacing: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> str:
        """The content of manifest.json."""
        head = {"format": FORMAT, "version": VERSION, "sha256": self.digest}
        return json.dumps({**head, **self._parts()}, indent=1) + "\n"

    @property
    def digest(self) -> str:
        """SHA-256 of all that it says."""
        return key_of(self._parts())

    def _parts(self) -> dict[str, Any]:
        return {"files": self.files, "tensors": self.tensors, "replacing": self.replacing}

    def refuse_malformed(self) -> None:
        """Refuse what this program does not write.

        Raises:
            ValueError: a file that would lie outside the folder, or no size.
            TypeError: no SHA-256, or no names.
        """
        for name, said in (*self.files.items(), *self.replacing.items()):
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or str(path) != name or said["bytes"] != int(said["bytes"]):
                raise ValueError(f"it names {name!r}")
            bytes.fromhex(said["sha256"])
        for tensors in self.tensors.values():
            bytes.fromhex("".join(tensors.values()))


def write_manifest(folder: Path) -> None:
    """Describe every file that is in a folder now."""
    files, tensors = {}, {}
    for name in _own_files(folder):
        files[name] = _described(folder / name)
        if name.endswith(".safetensors"):
            tensors[name] = _tensor_digests(folder / name)
    write_text(folder / MANIFEST, Manifest(files, tensors).to_json())


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder; None where it has none, or another program's file of that name.

    Raises:
        CheckpointError: it is damaged, or of a newer version.
    """
    file = folder / MANIFEST
    try:
        text = file.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    ours = any(word in text for word in (FORMAT, '"tensors"'))  # one of them stands even if a bit of the other flipped
    try:
        found = json.loads(text)
        ours = ours and isinstance(found, dict)
        if not ours:
            return None
        if found["format"] == FORMAT and found["version"] != VERSION:
            raise CheckpointError(f"{file} was written by another version of compress; update to read it")
        manifest = Manifest(found["files"], found["tensors"], found["replacing"])
        if found["format"] != FORMAT or found["sha256"] != manifest.digest:
            raise ValueError("it is not what was written")
        manifest.refuse_malformed()
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        if not ours:
            return None
        raise CheckpointError(f"{file} is damaged: {error}; write or fetch the folder again") from error
    return manifest


def is_marked(folder: Path) -> bool:
    """Whether a folder holds a manifest of this program, be it damaged."""
    try:
        return read_manifest(folder) is not None
    except CheckpointError:
        return True


def verify_folder(folder: Path, *, everything: bool = False) -> Manifest | None:
    """Compare the files of a folder with its manifest; None where there is none.

    Args:
        folder: that is checked.
        everything: also the model card, and the folders in it that have manifests of their own.

    Raises:
        CheckpointError: names a file that is missing, or is not what was written.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    for name in manifest.files:
        if everything or name != CARD:
            _compare(folder, name, manifest)
    for inner in _marked_folders(folder) if everything else ():
        verify_folder(inner, everything=True)
    return manifest


def changed_files(folder: Path, names: Iterable[str]) -> list[str]:
    """Those of some files of a folder that are there and are not what was written."""
    manifest, found = read_manifest(folder), []
    for name in names:
        if manifest is not None and name in manifest.files and (folder / name).is_file():
            try:
                _compare(folder, name, manifest)
            except CheckpointError:
                found.append(name)
    return found


def foreign_files(folder: Path) -> list[str]:
    """Files and links in a folder that no manifest in it names; everything where it has none.

    Raises:
        CheckpointError: a manifest is damaged.
    """
    manifest = read_manifest(folder)
    known = {MANIFEST, *manifest.files} if manifest is not None else set()
    found = [name for name in _own_files(folder, all_files=True) if name not in known]
    for inner in _marked_folders(folder):
        found += [str((inner / name).relative_to(folder)) for name in foreign_files(inner)]
    return sorted(found)


def remove_result(folder: Path) -> bool:
    """Remove what a folder's manifests name, file by file, each manifest last; False where something else is left."""
    manifest = read_manifest(folder)
    if manifest is None:
        return False
    for inner in _marked_folders(folder):
        remove_result(inner)
    for name in manifest.files:
        (folder / name).unlink(missing_ok=True)
    for place, _, _ in os.walk(folder, topdown=False):
        if place != str(folder) and not os.listdir(place):
            os.rmdir(place)
    if os.listdir(folder) != [MANIFEST]:
        return False
    (folder / MANIFEST).unlink()
    folder.rmdir()
    return True


def replace_file(folder: Path, name: str, text: str) -> None:
    """Replace a text file of a finished folder; at every moment the manifest accepts the one that is there."""
    manifest = read_manifest(folder)
    if manifest is None:
        write_text(folder / name, text)
        return
    data = text.encode()
    new = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write_text(folder / MANIFEST, Manifest(manifest.files, manifest.tensors, {name: new}).to_json())
    write_text(folder / name, text)
    write_text(folder / MANIFEST, Manifest({**manifest.files, name: new}, manifest.tensors).to_json())
    flush_names(folder)


def _described(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": digest_now(file)}


def _compare(folder: Path, name: str, manifest: Manifest) -> None:
    file = folder / name
    if not file.is_file():
        raise CheckpointError(f"{file} is missing; write or fetch the folder again")
    size = file.stat().st_size
    wanted = [each for each in (manifest.files[name], manifest.replacing.get(name)) if each is not None]
    if all(each["bytes"] != size for each in wanted):
        said = f"it has {size} bytes and was written with {wanted[0]['bytes']}"
    elif digest_now(file) in [each["sha256"] for each in wanted]:
        return
    else:
        said = _differing_tensor(file, manifest.tensors.get(name, {}))
    raise CheckpointError(f"{file} is not what was written: {said}; write or fetch the folder again")


def _differing_tensor(file: Path, wanted: dict[str, str]) -> str:
    """Which tensor of a file holds other bytes, in words."""
    try:
        found = _tensor_digests(file)
    except CheckpointError:
        return "its header is damaged"
    differing = [name for name, digest in wanted.items() if found.get(name) != digest]
    return f"tensor {differing[0]} differs" if differing else "its SHA-256 differs"


def _tensor_digests(file: Path) -> dict[str, str]:
    found = {}
    with file.open("rb") as opened:
        for name, stored in read_header(file).tensors.items():
            opened.seek(stored.begin)
            digest, left = hashlib.sha256(), stored.count * stored.dtype.itemsize
            while left:
                piece = opened.read(min(left, READ_AT_ONCE))
                if not piece:
                    raise CheckpointError(f"{file} ended while it was read; fetch it again")
                digest.update(piece)
                left -= len(piece)
            found[name] = digest.hexdigest()
    return found


def _own_files(folder: Path, *, all_files: bool = False) -> list[str]:
    """Relative paths of the files of a folder, those of folders with their own manifest left out.

    `all_files`: the manifest, and links to folders, as well.
    """
    found = []
    for place, folders, files in os.walk(folder):
        here = folder / os.path.relpath(place, folder)
        linked = [name for name in folders if (here / name).is_symlink()]
        folders[:] = sorted(n for n in folders if n not in linked and not (here == folder and is_marked(here / n)))
        names = [*files, *linked] if all_files else [n for n in files if here != folder or n != MANIFEST]
        found += [str((here / name).relative_to(folder)) for name in names]
    return sorted(found)


def _marked_folders(folder: Path) -> Iterator[Path]:
    """The folders directly in a folder that have manifests of their own."""
    for inner in sorted(folder.iterdir()):
        if inner.is_dir() and not inner.is_symlink() and is_marked(inner):
            yield inner
