"""From what the user calls a model to a folder on disk."""

from __future__ import annotations

from pathlib import Path

from compress.errors import UsageError
from compress.models.companions import COMPANIONS
from compress.models.refusals import ADAPTER, QUANTIZERS_FILES

DEMO = Path(__file__).parent.parent / "demo" / "model"
# Weights in the layout that transformers reads, compressed folders, deltas, and adapters to tell them by. No weights in
# another layout or type of file, and no code.
FETCHED = (
    "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "compress.safetensors",
    "delta.safetensors", "README.md", "config.json", "report.json", "pipeline.yaml", *ADAPTER, *QUANTIZERS_FILES,
    *COMPANIONS,
)  # fmt: skip


def is_hub_id(name: str) -> bool:
    """Whether what is no folder can be a name on the hub: org/name."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def resolve(model: str | Path) -> Path:
    """`demo`, a local folder, or a Hugging Face hub id -> a local folder.

    Raises:
        UsageError: neither a folder nor a hub id that can be fetched.
    """
    if str(model) == "demo":
        return DEMO
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists():
        raise UsageError(f"{model} is a file; a model is a folder as save_pretrained writes it")
    name = str(model)
    if not is_hub_id(name):
        raise UsageError(f"no such folder: {model} (a model is `demo`, a local folder, or a hub id such as org/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(FETCHED)))
    except Exception as error:  # network, permission and naming errors of many kinds: all the same to the user
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"{name} is not a local folder, and fetching it from the hub failed: {reason}") from error
