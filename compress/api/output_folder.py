"""Where a result may be written, and how it takes the place of an earlier one.

Unfinished work lies in OUT.work, which carries the mark of this program and lets in one process at a time. A finished
folder has a manifest. Nothing else is ever removed, and what is the user's is refused by name before any work.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from compress.config.pipeline import walk
from compress.encodings.format import WEIGHTS
from compress.engine.ledger import UNITS
from compress.errors import CheckpointError, UsageError
from compress.io import lock, manifest
from compress.io.atomic import flush_folder, flush_names, remove_made
from compress.io.keys import digest_of_file
from compress.logs import LOGGER
from compress.models.adapters import existing_parts
from compress.passes import MergePass

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from compress.config.pipeline import Pipeline

APPLIED = "delta.json"  # says what a base and a delta were put together from
LOG = "log.txt"  # in the folder of unfinished work
RESULT = "out"  # the result in it, until it has its name
WRITTEN_INTO = ("README.md", "pipeline.yaml")  # files of a result that people write their own words into
BUNDLED = "demo"  # the bundled model, and its text
SHOWN = 3  # names in a message


def work_of(destination: Path) -> Path:
    """The folder of unfinished work of a result."""
    return destination.parent / f"{destination.name}.work"


def refuse_destination(destination: Path, inputs: Mapping[str, Iterable[Path]], overwrite: bool) -> None:
    """Refuse what could not be written at the end, or would destroy something.

    Args:
        destination: the folder to write.
        inputs: what is read, by what it is called: folders or files.
        overwrite: whether an earlier result may be replaced.

    Raises:
        UsageError: says which.
    """
    work = work_of(destination)
    for kind, paths in inputs.items():
        for path in paths:
            _refuse_overlap(destination, work, kind, path)
    if destination.is_symlink():
        raise UsageError(f"{destination} is a link; give the folder that it points to, or another -o")
    if destination.exists() and not destination.is_dir():
        raise UsageError(f"{destination} is a file; -o names a folder to write")
    if os.path.ismount(destination):
        raise UsageError(f"{destination} is a mount point, which cannot be replaced; give a folder in it")
    ancestor = next(p for p in destination.parents if p.exists())
    if not ancestor.is_dir():
        raise UsageError(f"{ancestor} is a file; {destination} cannot be made in it")
    lock.refuse_others(work)
    if overwrite:
        refuse_foreign(destination)


def _refuse_overlap(destination: Path, work: Path, kind: str, path: Path) -> None:
    read = path.resolve()
    for place, name in ((destination, destination), (work, f"{work}, where unfinished work is kept,")):
        written = place.resolve()
        if written == read or written in read.parents or read in written.parents:
            raise UsageError(f"{name} is, holds or lies in the {kind} {path}; write somewhere else")


def refuse_foreign(destination: Path) -> None:
    """Refuse to replace a folder with anything in it that is not a result.

    Raises:
        UsageError: names it.
    """
    if not destination.is_dir() or not os.listdir(destination):
        return
    if not manifest.is_marked(destination):
        first = sorted(os.listdir(destination))[0]
        raise UsageError(
            f"{destination} holds files that no run wrote, such as {first}, or is the result of an earlier version; "
            "--overwrite only replaces results: remove it yourself if nothing in it is needed, or choose another -o"
        )
    foreign = manifest.foreign_files(destination)
    if foreign:
        raise UsageError(
            f"{destination} holds files that no run wrote: {_shown(foreign)}; --overwrite only replaces results: move "
            "them somewhere else"
        )
    changed = manifest.changed_files(destination, WRITTEN_INTO)
    if changed:
        raise UsageError(
            f"{destination} holds files that were changed after the run: {_shown(changed)}; --overwrite would lose "
            "that: move them somewhere else"
        )


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def inputs_of(steps: Pipeline, model: list[Path], pipeline: object) -> dict[str, list[Path]]:
    """Every folder and file on disk that a run reads, by what it is called."""
    data = [source for section in (steps.calibration, steps.evaluate) if section for source in section.sources.values()]
    merged = [model for _, _, pass_ in walk(steps) if isinstance(pass_, MergePass) for model in pass_.models]
    files = [Path(pipeline)] if isinstance(pipeline, str | Path) else []
    return {
        "model": model,
        "merged model": [part for name in merged if name != BUNDLED for part in existing_parts(name)],
        "data": [Path(name) for name in data if name != BUNDLED and Path(name).exists()],
        "pipeline": [file for file in files if file.is_file()],  # not a ready-made one
    }


@contextmanager
def working_for(destination: Path) -> Iterator[Path]:
    """The folder of unfinished work of a result, held; what a killed process left of a replacement is put right.

    Raises:
        UsageError: another process has it.
    """
    work = work_of(destination)
    with lock.held(work):
        mend(destination)
        yield work


def mend(destination: Path) -> None:
    """Give an earlier result that was set aside its name back if there is no new one, or else remove it."""
    for aside in _set_aside(destination):
        if not destination.exists() and not _lacks_files(aside):
            LOGGER.warning("%s is put back: whoever was replacing it did not finish", destination)
            aside.rename(destination)
            flush_names(destination.parent)
        else:
            _remove_aside(aside)


def publish_folder(made: Path, destination: Path) -> None:
    """Give a finished folder its manifest and its name, in the place of an earlier result.

    At every moment the earlier result or the new one is whole, and under its name or set aside, where `mend` finds it.
    """
    for inner in sorted(p for p in made.iterdir() if p.is_dir()):
        manifest.write_manifest(inner)
    manifest.write_manifest(made)
    flush_folder(made)
    aside = None
    if destination.exists():
        refuse_foreign(destination)  # once more: someone may have put something there while this ran
        if os.listdir(destination):
            aside = destination.with_name(_aside_name(destination))
            destination.rename(aside)
        else:
            destination.rmdir()
    try:
        made.rename(destination)
    except BaseException:
        if aside is not None and not destination.exists():
            aside.rename(destination)
        raise
    flush_names(destination.parent)
    if aside is not None:
        _remove_aside(aside)


@contextmanager
def clear_result(work: Path) -> Iterator[None]:
    """Before and afterwards, no half written result lies in a folder of unfinished work."""
    remove_made(work / RESULT)
    try:
        yield
    finally:
        remove_made(work / RESULT)


def refuse_file(file: Path, result: Path) -> None:
    """Refuse to write a file about a result in the place of another, or into the result.

    Raises:
        UsageError: says which.
    """
    if file.exists():
        raise UsageError(f"{file} exists; give another name")
    if result.resolve() in file.resolve().parents:
        raise UsageError(f"{file} lies in {result}, which holds what a run wrote and nothing else; write it elsewhere")
    if not file.absolute().parent.is_dir():
        raise UsageError(f"no such folder: {file.parent}")


def refuse_changed(folder: Path) -> None:
    """Refuse a result whose files are not what was written; of one without a manifest, say that nobody knows.

    Raises:
        CheckpointError: names the file, and the tensor in it.
    """
    if manifest.verify_folder(folder) is None and (folder / WEIGHTS).exists():
        LOGGER.warning(
            "%s has no %s: it was written by an earlier version, and whether it is still what was written cannot be "
            "checked",
            folder,
            manifest.MANIFEST,
        )


def clear(work: Path) -> None:
    """Remove from a folder of unfinished work what this program put there, by name."""
    remove_made(work / RESULT)
    for name in os.listdir(work):
        if name == LOG or UNITS.fullmatch(name):
            (work / name).unlink()
    left = sorted(set(os.listdir(work)) - {lock.LOCK})
    if left:
        LOGGER.warning("%s is kept: it holds %s, which no run wrote", work, _shown(left))


def _aside_name(folder: Path) -> str:
    """A name that only this program gives."""
    return f"{folder.name}.old-{_mark(folder)}"


def _mark(folder: Path) -> str:
    return digest_of_file(folder / manifest.MANIFEST)[:12]


def _set_aside(destination: Path) -> list[Path]:
    """Earlier results that a process was replacing."""
    begin = f"{destination.name}.old-"
    if not destination.parent.is_dir():
        return []
    found = [destination.parent / name for name in os.listdir(destination.parent) if name.startswith(begin)]
    return [
        path
        for path in sorted(found)
        if not path.is_symlink() and (path / manifest.MANIFEST).is_file() and manifest.is_marked(path)
        and _mark(path) == path.name.removeprefix(begin)
    ]  # fmt: skip


def _lacks_files(folder: Path) -> bool:
    """Whether its removal had begun."""
    found = manifest.read_manifest(folder)
    return found is None or not all((folder / name).is_file() for name in found.files)


def _remove_aside(aside: Path) -> None:
    try:
        removed = manifest.remove_result(aside)
    except CheckpointError:
        removed = False
    if not removed:
        LOGGER.warning("%s is kept: it holds files that no run wrote, or is damaged; remove it yourself", aside)
