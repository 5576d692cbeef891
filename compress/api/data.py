"""Data that a pipeline names or a caller gives, checked against the model that will see it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compress.calibration.data import IMAGE_SUFFIX, Dataset, load_images, load_tokens
from compress.config.pipeline import GIVEN
from compress.errors import DataError
from compress.models.families import family_of
from compress.models.graph import Graph

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from compress.calibration.data import Split, Ticking
    from compress.config.pipeline import Calibration

Labelled = tuple[Tensor, Tensor]  # inputs (samples, ...), labels (samples,)
Given = Tensor | Labelled | Mapping[str, Tensor | Labelled]  # one source, or several by name


def dataset(graph: Graph, name: Split, data: Given | None, dtype: torch.dtype) -> Dataset | None:
    """Data from Python, of one source or by name of several, as the model takes them.

    Raises:
        DataError: the model cannot take it, or labels are missing, not wanted, or of the wrong kind.
    """
    if data is None:
        return None
    if isinstance(data, Mapping):
        if not data:
            raise DataError(f"{name} names no source; give at least one, such as {{'maths': tokens}}")
        return model_inputs(
            graph, name, Dataset.joined({n: labelled(graph, name, part) for n, part in data.items()}), dtype
        )
    return model_inputs(graph, name, labelled(graph, name, data), dtype)


def labelled(graph: Graph, name: Split, data: Tensor | Labelled) -> Dataset:
    """Inputs with labels, which language models have none of, and others need where they are evaluated.

    Raises:
        DataError: labels missing, not wanted, or of the wrong kind.
    """
    inputs, labels = data if isinstance(data, tuple) else (data, None)
    if graph.is_language_model:
        if isinstance(data, tuple):
            raise DataError(f"{name} of a language model is (windows, length) token ids, without labels")
        return Dataset(inputs)
    if labels is None:
        if name == "evaluation":
            raise DataError("a model that takes no tokens is evaluated on (inputs, labels), for its accuracy")
        return Dataset(inputs)
    if labels.dtype not in (torch.uint8, torch.int16, torch.int32, torch.int64) or labels.shape != inputs.shape[:1]:
        raise DataError(
            f"labels must be ({len(inputs)},) integers, one per input; got {labels.dtype} {tuple(labels.shape)}"
        )
    return Dataset(inputs, labels.long())


def model_inputs(graph: Graph, name: str, data: Dataset, dtype: torch.dtype) -> Dataset:
    """Calibration or evaluation data as the model takes it: token ids as int64, images in the type it computes in.

    Raises:
        DataError: the model cannot take it.
    """
    inputs = data.inputs
    if inputs.numel() == 0:
        raise DataError(f"{name} is empty: shape {tuple(inputs.shape)}")
    if graph.is_language_model:
        return data.of(_tokens(graph, name, inputs))
    if inputs.is_floating_point() and not torch.isfinite(inputs).all():
        raise DataError(f"{name} holds NaN or infinity")
    return data.of(_images(graph, name, inputs).to(dtype)) if graph.is_image_model else data


def _tokens(graph: Graph, name: str, tokens: Tensor) -> Tensor:
    if tokens.dim() != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise DataError(f"{name} must be (samples, length) integer token ids; got {tokens.dtype} {tuple(tokens.shape)}")
    vocabulary = graph.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if int(tokens.max()) >= vocabulary or int(tokens.min()) < 0:
        raise DataError(f"{name} has token ids outside 0..{vocabulary - 1}: they belong to another tokenizer")
    return tokens.long()


def _images(graph: Graph, name: str, images: Tensor) -> Tensor:
    channels = getattr(graph.model.config, "num_channels", None)
    if images.dim() != 4 or not images.is_floating_point() or (channels and images.shape[1] != channels):
        raise DataError(
            f"{name} must be (images, {channels or 'channels'}, height, width) floating-point numbers, scaled as the "
            f"model expects; got {images.dtype} {tuple(images.shape)}"
        )
    return images


def given_section(cls: type[Calibration], data: Dataset | None, options: Mapping[str, Any]) -> Any:
    """Data given from Python, as a pipeline section; the length of an image is the number of its positions."""
    if data is None:
        return None
    inputs = data.inputs
    length = math.prod(inputs.shape[2:]) if inputs.dim() == 4 else inputs.shape[1] if inputs.dim() > 1 else 1
    source = dict.fromkeys(data.parts, GIVEN) or GIVEN
    return cls(source=source, samples=max(data.parts.values(), default=len(inputs)), length=length, **options)


def read_data(section: Calibration, folder: Path, split: Split, over: Ticking | None = None) -> Dataset:
    """The data a `calibration:` or `evaluate:` section describes: images and labels, or tokens by a model's tokenizer.

    `over` draws progress, as for `load_tokens`.

    Raises:
        DataError: nothing that can be read.
    """
    found = {name: _read_source(section, source, folder, split, over) for name, source in section.sources.items()}
    return found[""] if "" in found else Dataset.joined(found)


def _read_source(section: Calibration, source: str, folder: Path, split: Split, over: Ticking | None) -> Dataset:
    if source.endswith(IMAGE_SUFFIX):
        images, labels = load_images(source, section.samples)
        if split == "evaluation" and labels is None:
            raise DataError(f"{source} has no tensor `labels` to measure accuracy with")
        return Dataset(images, labels)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer("a text", add_special_tokens=False, verbose=False)  # some settings are first read when used
    except Exception as error:  # a damaged file raises whatever its reader meets
        raise DataError(
            f"{folder} has no tokenizer that transformers can read, and {split} text needs one: {error}"
        ) from error
    tokens = load_tokens(
        source,
        tokenizer,
        samples=section.samples,
        length=section.length,
        split=split,
        field=section.field,
        subset=section.subset,
        over=over,
    )
    return Dataset(tokens)


def matched(model: PreTrainedModel, data: Dataset) -> Tensor | Labelled:
    """Data as read, for `evaluate` of a loaded model.

    Raises:
        DataError: images for a language model, or text for an image model.
    """
    graph, dtype = Graph(model, (), (), family_of(model)), getattr(model.config, "dtype", None)
    whole = labelled(graph, "evaluation", data.inputs if data.labels is None else (data.inputs, data.labels))
    if whole.labels is None:
        return whole.inputs
    images = _images(graph, "evaluation", whole.inputs)
    return images.to(dtype if isinstance(dtype, torch.dtype) else images.dtype), whole.labels
