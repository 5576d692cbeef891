"""A written file as transformers reads it, where it does: a second opinion on names, order and keys."""

from __future__ import annotations

from contextlib import redirect_stderr
from io import StringIO
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError
from compress.export.gguf.architectures import architecture_of
from compress.lazy import transformers
from compress.models.loading import build

if TYPE_CHECKING:
    from pathlib import Path


# Options that no result depends on, or that files do not say.
ELSEWHERE = {
    "_name_or_path", "architectures", "attention_dropout", "dtype", "hidden_dropout", "initializer_range", "model_type",
    "pretraining_tp", "tie_word_embeddings", "transformers_version", "use_cache", "layer_types", "max_window_layers",
    "sliding_window", "quantization_config",
}  # fmt: skip
CLOSE = 1e-6


def read_back(file: Path, config: Any) -> Any:
    """A file as transformers reads it, in float32; None where it makes another model of it.

    It knows few architectures, no biases of attention, and no scaling of positions: that shows in the configuration
    that it makes of a file.
    """
    architecture = architecture_of(config)
    if architecture is None or not architecture.read_by_transformers:
        return None
    found = transformers.AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    if not _alike(found, config):
        return None
    # from_pretrained(folder, gguf_file=...) does the same, but wants the accelerate package installed.
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    model = build(found)
    with redirect_stderr(StringIO()):  # a progress bar
        tensors = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"]
    missing = model.load_state_dict(tensors, strict=False, assign=True).missing_keys
    model.tie_weights()
    if any(parameter.is_meta for parameter in model.parameters()):
        raise CompressError(f"{file}: transformers does not find {missing[0]} in it")
    return model.eval()


def _alike(found: Any, meant: Any) -> bool:
    """Whether two configurations say the same, up to the rounding of a file's numbers."""
    if getattr(meant, "sliding_window", None):
        return False
    ours, theirs = meant.to_dict(), found.to_dict()
    if theirs.get("tie_word_embeddings") and not ours.get("tie_word_embeddings"):
        return False  # the other way round is fine: some files have what is tied twice
    names = [n for n in ours if n in theirs and n not in ELSEWHERE and not n.endswith(("_token_id", "dropout"))]
    return all(_same(ours[name], theirs[name]) for name in names)


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return all(_same(value, theirs.get(name, value)) for name, value in ours.items())
    if isinstance(ours, float) and isinstance(theirs, float | int):
        return abs(ours - theirs) <= CLOSE * abs(ours)
    return bool(ours == theirs)
