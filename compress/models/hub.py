"""From what the user calls a model to a folder on disk."""

from __future__ import annotations

from pathlib import Path

from compress.errors import CheckpointError, UsageError

DEMO = Path(__file__).parent.parent / "demo" / "model"
FILES = ("*.safetensors", "*.json", "*.model", "merges.txt", "vocab.txt")


def resolve(model: str | Path) -> Path:
    """`demo`, a local folder, or a Hugging Face hub id -> a local folder.

    Raises:
        UsageError: neither a folder nor a hub id that can be fetched.
        CheckpointError: the folder holds a model that is already quantized.
    """
    if str(model) == "demo":
        return DEMO
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists():
        raise UsageError(f"{model} is a file; a model is a folder as save_pretrained writes it")
    name = str(model)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UsageError(f"no such folder: {model} (a model is `demo`, a local folder, or a hub id such as org/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except Exception as error:  # network, permission and naming errors of many kinds: all the same to the user
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"{name} is not a local folder, and fetching it from the hub failed: {reason}") from error


def refuse_quantized(folder: Path, config: object) -> None:
    """Passes start from dense weights."""
    there = getattr(config, "quantization_config", None)
    if there:
        method = there.get("quant_method") if isinstance(there, dict) else getattr(there, "quant_method", "?")
        raise CheckpointError(
            f"{folder} is already quantized ({method}); a pipeline starts from the uncompressed model. To measure use "
            "`compress eval`"
        )
