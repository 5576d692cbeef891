"""A folder compared with its manifest."""

from __future__ import annotations

from pathlib import Path

from compress.errors import UsageError
from compress.io.manifest import MANIFEST, verify_folder


def verify(folder: str | Path) -> int:
    """Compare every file of a folder that this package wrote, its exports too, with the SHA-256 in its manifest.

    Args:
        folder: that `run`, `export_to` or `apply_delta` wrote.

    Returns:
        How many files are named there; all are what was written. Files that it does not name are not looked at.

    Raises:
        UsageError: a folder without a manifest.
        CheckpointError: names a file that is missing or is not what was written, and the tensor in it.

    Example:
        >>> import compress, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = compress.run({"passes": [{"rtn": {"bits": 4, "group_size": 64}}]}, "demo", f"{folder}/out")
        ...     count = compress.verify(f"{folder}/out")
        >>> count >= 4
        True
    """
    found = verify_folder(Path(folder), everything=True)
    if found is None:
        raise UsageError(f"{folder} has no {MANIFEST}: it is not there, or was not written by this version of compress")
    return len(found.files)
