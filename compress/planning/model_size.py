"""About how many weights a model has, by the sizes of its files: for estimates that must not wait for torch."""

from __future__ import annotations

from pathlib import Path

from compress.config.measured import original
from compress.io.small_file import read_object

BYTES = {"float32": 4, "float64": 8}  # of a number, by the type that config.json names; others have two


def weights_of(model: str) -> int | None:
    """How many weights `demo` or a local folder has; None for what is neither, or holds no safetensors."""
    if model == "demo":
        return original().weights
    folder, total = Path(model), 0
    for file in folder.glob("*.safetensors") if folder.is_dir() else ():
        total += file.stat().st_size
    if not total:
        return None
    config = read_object(folder / "config.json") if (folder / "config.json").is_file() else {}
    return total // BYTES.get(str(config.get("dtype", config.get("torch_dtype"))), 2)


__all__ = ["weights_of"]
