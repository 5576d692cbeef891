"""Folders that hold something other than a plain model: told by name what they are, before anything is built."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from compress.errors import CheckpointError
from compress.lazy import transformers

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
SECTIONS = ("quantization_config", "compression_config")  # the second is what early compressed-tensors called it
QUANTIZERS_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
# How configurations count what they build one by one. A count above the number of tensors in the files is wrong, and
# building it could take for ever.
COUNTS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_experts",
    "num_local_experts", "n_routed_experts", "n_shared_experts", "depths",
)  # fmt: skip
# They take every token they predict as input, unless they are configured as decoders.
ENCODERS = ("bert-generation",)  # and all that transformers knows as masked language models


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


def refuse_adapter(folder: Path) -> None:
    """An adapter is no model, and beside a model's own weights it would be left out.

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
    beside = any(folder.glob("model*.safetensors"))
    what = f"holds an adapter{of} ({there}) beside a model's weights" if beside else f"is an adapter{of} ({there})"
    other = ", or take its files out of the folder if the weights have it already" if beside else ""
    raise CheckpointError(
        f"{folder} {what}, which is not applied here: merge it first (in peft: merge_and_unload, then "
        f"save_pretrained){other}"
    )


def refuse_quantized(folder: Path, settings: Mapping[str, Any]) -> None:
    """Passes start from dense weights.

    Raises:
        CheckpointError: the folder says that its weights are codes.
    """
    for place, section in _sections(settings):
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


def refuse_other_tasks(
    folder: Path, settings: Mapping[str, Any], config: transformers.PreTrainedConfig, built: Sequence[str]
) -> list[str]:
    """Models that predict no next token and no class of an image, and models whose code is not part of transformers.

    Args:
        folder: for messages.
        settings: config.json as it stands.
        config: the same as transformers reads it.
        built: names of the classes that transformers may build of it.

    Returns:
        Sentences on what was taken for what.

    Raises:
        CheckpointError: another task, or code of the folder's own.
    """
    kind = f"{folder}/config.json describes "
    only = "only causal language models and image classifiers are compressed and measured"
    if getattr(config, "is_encoder_decoder", False):
        raise CheckpointError(f"{kind}an encoder-decoder ({config.model_type}); {only}")
    if not built:
        raise CheckpointError(
            f"{kind}no causal language model and no image classifier that transformers can build, but a "
            f"{config.model_type}"
        )
    if _sees_the_answer(config):
        raise CheckpointError(
            f"{kind}a masked language model ({config.model_type}, not configured as a decoder): it is shown every "
            f"token that it predicts, so its perplexity would say nothing; {only}"
        )
    architectures = settings.get("architectures")
    listed = [n for n in architectures if isinstance(n, str)] if isinstance(architectures, list) else []
    own_code = bool(settings.get("auto_map"))
    base = built[0].split("For")[0].removesuffix("LMHeadModel")
    known = not listed or listed[0].lower() in (name.lower() for name in (*built, f"{base}Model"))  # MPT, Mpt
    if not known and own_code:
        raise CheckpointError(
            f"{kind}a {listed[0]:.80}, whose code comes with the model (auto_map in config.json). Such code is never "
            "run here, and transformers has no class of that name: a model of a class that it has is needed"
        )
    if not known and hasattr(transformers, listed[0]):
        raise CheckpointError(f"{kind}a {listed[0]:.80}, and what transformers can build of it is a {built[0]}; {only}")
    if not known:
        return [f"config.json calls the model a {listed[0]:.80}, which transformers does not have; it is a {built[0]}"]
    if own_code:
        return [
            "the model comes with code of its own (auto_map in config.json), which is never run: it is transformers' "
            f"{built[0]}, and auto_map is left out of what is written"
        ]
    return []


def _sees_the_answer(config: transformers.PreTrainedConfig) -> bool:
    masked = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING or config.model_type in ENCODERS
    causal = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    return masked and not causal
