"""Names and versions of what this package writes."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version

METHOD = "compress"
WEIGHTS = "compress.safetensors"


def version() -> str:
    """The version of this package."""
    try:
        return installed_version("compress-pipeline")
    except PackageNotFoundError:
        return "unknown"
