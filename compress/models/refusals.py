"""Folders that hold something other than a plain model: told by name what they are, before anything is built."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from compress.errors import CheckpointError
from compress.lazy import transformers
from compress.models.architecture import class_of, listed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
SECTIONS = ("quantization_config", "compression_config")  # the second is what early compressed-tensors called it
READABLE = ("fp8", "mxfp4")  # by `checkpoint/dequantized.py`
QUANTIZERS_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
# How configurations count what they build one by one. A count above the number of tensors in the files is wrong, and
# building it could take for ever.
COUNTS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_experts",
    "num_local_experts", "n_routed_experts", "n_shared_experts", "depths",
)  # fmt: skip


def read_settings(folder: Path) -> dict[str, Any]:
    """config.json as it stands in the file.

    Raises:
        CheckpointError: there is none, or it is no JSON object.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder}: no config.json; a model is a folder as save_pretrained writes it")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be used: it is no JSON text ({error}); fetch it again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} cannot be used: it is no JSON object; fetch it again")
    return found


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter."""
    return any((folder / name).is_file() for name in ADAPTER)


def has_weights(folder: Path) -> bool:
    """Whether a folder holds a model's own weights."""
    return any(folder.glob("model*.safetensors"))


def refuse_adapter(folder: Path) -> None:
    """An adapter is no base of another one, and beside a model's own weights it would be left out.

    Raises:
        CheckpointError: the folder holds one.
    """
    there = next((name for name in ADAPTER if (folder / name).is_file()), None)
    if there is None:
        return
    try:
        base = json.loads((folder / ADAPTER[0]).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError):
        base = None
    of = f" of {base}" if isinstance(base, str) else ""
    if not has_weights(folder):
        raise CheckpointError(
            f"{folder} is an adapter{of} ({there}), and no base of another one: merge it first (in peft: "
            "merge_and_unload, then save_pretrained)"
        )
    raise CheckpointError(
        f"{folder} holds an adapter{of} ({there}) beside a model's weights, which is not applied here: take its files "
        "into a folder of their own and give that, or out of the folder if the weights have it already (as after "
        "merge_and_unload in peft)"
    )


def refuse_quantized(folder: Path, settings: Mapping[str, Any]) -> None:
    """Passes start from dense weights, or from codes that say what they mean without loss.

    Raises:
        CheckpointError: the folder says that its weights are other codes.
    """
    for place, section in _sections(settings):
        if place == SECTIONS[0] and is_readable(section):
            continue
        method = section.get("quant_method") or section.get("format") or "unknown"
        measure = ". To measure use `compress eval`" if place == SECTIONS[0] else ""
        raise CheckpointError(
            f"{folder} is already quantized ({method}: {place} in config.json); a pipeline starts from the "
            f"uncompressed model{measure}"
        )
    for name in QUANTIZERS_FILES:
        if (folder / name).is_file():
            raise CheckpointError(
                f"{folder} is already quantized: it holds {name}; a pipeline starts from the uncompressed model. If "
                "the weights are uncompressed all the same, take that file out of the folder"
            )


def coded_weights(settings: Mapping[str, Any]) -> str:
    """How weights are stored that are read as numbers all the same; empty where they are plain."""
    section = settings.get(SECTIONS[0])
    return str(section.get("format") or section["quant_method"]) if isinstance(section, dict) and section else ""


def is_readable(section: Mapping[str, Any]) -> bool:
    """Whether weights of this section of config.json are read as numbers: float8 with scales, and MXFP4."""
    method = section.get("quant_method")
    return method in READABLE or (method == "compressed-tensors" and section.get("format") == "float-quantized")


def _sections(settings: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Sections on quantization, with their place: in config.json, or in the part on one of its models."""
    parts = [("", settings), *((f"{key}.", part) for key, part in settings.items() if isinstance(part, dict))]
    for place, part in parts:
        yield from ((place + key, part[key]) for key in SECTIONS if isinstance(part.get(key), dict) and part[key])


def refuse_counts(folder: Path, settings: Mapping[str, Any], most: int) -> None:
    """More blocks, or experts, than there are tensors in the files.

    Args:
        folder: for the message.
        settings: of the model, or of a part of it.
        most: that the files can hold.

    Raises:
        CheckpointError: names the entry.
    """
    for key in COUNTS:
        value = settings.get(key)
        numbers = [n for n in (value if isinstance(value, list) else [value]) if isinstance(n, int)]
        if sum(numbers) > most:
            raise CheckpointError(
                f"{folder}/config.json cannot be used: {key} is {value}, and the files hold {most} tensors; they "
                "belong to another configuration: fetch both from one place"
            )
    for part in settings.values():
        if isinstance(part, dict):
            refuse_counts(folder, part, most)


def refuse_other_tasks(folder: Path, settings: Mapping[str, Any], config: transformers.PreTrainedConfig) -> list[str]:
    """Models of classes that transformers does not have, and models whose code is not part of transformers.

    Args:
        folder: for messages.
        settings: config.json as it stands.
        config: the same as transformers reads it.

    Returns:
        Sentences on what was taken for what.

    Raises:
        CheckpointError: no class of transformers, or code of the folder's own.
    """
    kind, named, own_code = f"{folder}/config.json describes ", listed(config), bool(settings.get("auto_map"))
    made = class_of(config)
    if made is None:
        raise CheckpointError(
            f"{kind}a {config.model_type}, of which transformers can build no language model and no image classifier, "
            "and names no class in `architectures`; add the name of the class that it was saved from"
        )
    built: str = made.__name__
    if not named or built.lower() == named.lower():
        return [
            "the model comes with code of its own (auto_map in config.json), which is never run: it is transformers' "
            f"{built}, and auto_map is left out of what is written"
        ] * own_code
    if own_code:
        raise CheckpointError(
            f"{kind}a {named:.80}, whose code comes with the model (auto_map in config.json). Such code is never "
            "run here, and transformers has no class of that name: a model of a class that it has is needed"
        )
    if hasattr(transformers, named):
        raise CheckpointError(
            f"{kind}a {named:.80}, which transformers does not build of a {config.model_type}, but a {built}; "
            "model_type and architectures are of two models: fetch config.json again"
        )
    return [f"config.json calls the model a {named:.80}, which transformers does not have; it is a {built}"]
