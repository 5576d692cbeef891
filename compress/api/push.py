"""A finished folder, put on the Hugging Face hub as it is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from compress.api.verify import verify
from compress.errors import UsageError
from compress.io.manifest import MANIFEST, read_manifest

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Upload:
    """What goes to the hub.

    Attributes:
        repository: where to: org/name.
        folder: the result, or the export in it.
        files: name in the folder -> bytes.
        address: of what was uploaded; None before.
    """

    repository: str
    folder: Path
    files: Mapping[str, int]
    address: str | None = None

    @property
    def bytes(self) -> int:
        """All files together."""
        return sum(self.files.values())


def push(
    folder: str | Path,
    repository: str,
    *,
    export: str | None = None,
    private: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
) -> Upload:
    """Put a finished folder on the hub, once every file in it was found to be what was written.

    The folder goes without the exports in it, which are models of their own: push each to a repository of its own.
    Files that its manifest does not name stay here.

    Args:
        folder: that `run`, `sweep` or `export_to` wrote.
        repository: org/name. It is made if it is not there.
        export: of which the folder is pushed instead, such as `gguf`.
        private: a new repository is seen by its owner alone.
        revision: a branch that is there; by default the main one.
        dry_run: check all that can be checked here, and send nothing.

    Raises:
        UsageError: no such folder or export, no name of a repository, or the hub refuses.
        CheckpointError: a file is missing or is not what was written.

    Example:
        >>> import compress, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = compress.run({"passes": [{"rtn": {"bits": 4, "group_size": 64}}]}, "demo", f"{folder}/out")
        ...     upload = compress.push(f"{folder}/out", "me/demo-w4", dry_run=True)
        >>> "config.json" in upload.files
        True
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UsageError(f"{repository!r:.200} is no name of a repository, such as me/model-w4: {error}") from error
    if "/" not in repository:
        raise UsageError(f"{repository} names no owner; write org/name, such as me/{repository}")
    source = _folder_of(Path(folder), export)
    verify(source)
    made = read_manifest(source)
    assert made is not None, "verified"
    sizes = {name: int(file["bytes"]) for name, file in made.files.items()}
    sizes[MANIFEST] = (source / MANIFEST).stat().st_size
    upload = Upload(repository, source, dict(sorted(sizes.items())))
    return upload if dry_run else _sent(upload, private, revision)


def _folder_of(folder: Path, export: str | None) -> Path:
    if not folder.is_dir():
        raise UsageError(f"no such folder: {folder}")
    if export is None:
        return folder
    there = sorted(file.parent.name for file in folder.glob(f"*/{MANIFEST}"))
    if export not in there:
        held = f"it has {', '.join(there)}" if there else "it has none"
        raise UsageError(f"{folder} has no export {export!r:.100}; {held}: write it with `compress export`")
    return folder / export


def _sent(upload: Upload, private: bool, revision: str | None) -> Upload:
    from huggingface_hub import HfApi

    hub = HfApi(library_name="compress")
    try:
        address = hub.create_repo(upload.repository, private=private, exist_ok=True)
        hub.upload_folder(
            repo_id=upload.repository, folder_path=upload.folder, allow_patterns=list(upload.files), revision=revision,
            commit_message="Upload what compress wrote",
        )  # fmt: skip
    except Exception as error:  # network, permission and naming errors of many kinds: all the same to the user
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"the hub did not take {upload.folder} as {upload.repository}: {reason}; log in with `hf auth login`, and "
            "the same command goes on"
        ) from error
    return replace(upload, address=str(address))


__all__ = ["Upload", "push"]
