"""What the shell completes: names of ready-made pipelines, pipeline files, and formats."""

from __future__ import annotations

from pathlib import Path


def presets() -> list[str]:
    """The names of ready-made pipelines."""
    from compress.config.pipeline import PRESETS

    return sorted(file.stem for file in PRESETS.glob("*.yaml"))


def pipelines(incomplete: str) -> list[str]:
    """Ready-made pipelines, and the folders and YAML files that begin like this."""
    folder, _, leaf = incomplete.rpartition("/")
    files = sorted(Path(f"{folder}/" if folder or incomplete.startswith("/") else ".").glob(f"{leaf}*"))
    chosen = [
        f"{file}/" if file.is_dir() else str(file)
        for file in files
        if file.is_dir() or file.suffix in (".yaml", ".yml")
    ]
    return [*(name for name in presets() if name.startswith(incomplete)), *chosen]


def formats(incomplete: str) -> list[str]:
    """Formats that a finished folder can be exported to."""
    from compress.config.pipeline import FORMATS

    return [name for name in FORMATS if name.startswith(incomplete)]
