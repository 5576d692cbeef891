"""The model that a configuration describes, built without weights; and a folder loaded."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from compress.errors import CheckpointError
from compress.io.heap import align
from compress.lazy import nn, transformers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import torch


def read_config(folder: Path) -> transformers.PreTrainedConfig:
    """config.json of a folder; custom code is never run."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json; a model is a folder as save_pretrained writes it")
    try:
        read = transformers.AutoConfig.from_pretrained
        config: transformers.PreTrainedConfig = read(folder, trust_remote_code=False, local_files_only=True)
        return config
    except Exception as error:  # each model's configuration class refuses in its own way
        raise CheckpointError(f"{folder}/config.json cannot be used: {error}") from error


def find_tokenizer(folder: Path) -> Any | None:
    """The tokenizer of a folder; None where there is none that can be read."""
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception:  # the libraries behind it raise many kinds; all mean the same
        return None


def loader(config: transformers.PreTrainedConfig) -> Any:
    """The class of transformers that loads a model of this configuration."""
    known = type(config)
    images, texts = transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    image = known in images and known not in texts
    return transformers.AutoModelForImageClassification if image else transformers.AutoModelForCausalLM


def build(config: transformers.PreTrainedConfig) -> transformers.PreTrainedModel:
    """The language model or image classifier a configuration describes, parameters on the meta device, buffers real.

    Raises:
        CheckpointError: neither a causal language model nor an image classifier transformers knows.
    """
    try:
        return built(lambda: loader(config).from_config(config, trust_remote_code=False))
    except Exception as error:  # as above: a wrong value surfaces wherever the model's code first uses it
        raise CheckpointError(
            "config.json describes no causal language model and no image classifier that transformers can build: "
            f"{error}"
        ) from error


def built(make: Callable[[], transformers.PreTrainedModel]) -> transformers.PreTrainedModel:
    """What `make` makes, parameters on the meta device, buffers real."""
    from transformers.initialization import no_init_weights

    with no_init_weights(), _parameters_on_meta():
        model = make()
    model.tie_weights()
    model.eval()
    return model


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made inside keep real buffers (rotary frequencies are computed, not stored) but no parameter data."""
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        original(self, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def load_model(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """A folder, packed or not, as a model in memory, without transformers' own progress bar.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = loader(read_config(folder)).from_pretrained(folder, dtype=dtype or "auto").eval()
        align(model)
        return model
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        files = ", ".join(sorted(p.name for p in folder.glob("*.safetensors"))) or "no safetensors"
        raise CheckpointError(f"{folder} ({files}) cannot be loaded: {error}") from error
    finally:
        if shown:
            logging.enable_progress_bar()
