"""Data that a pipeline names or a caller gives, checked against the model that will see it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from compress.calibration.data import Dataset, load_images
from compress.calibration.given import gathered, kind_of, token_ids
from compress.calibration.masks import masked
from compress.calibration.texts import is_images
from compress.calibration.tokens import load_tokens
from compress.config.pipeline import GIVEN
from compress.errors import DataError
from compress.models.architecture import predicts_masked, predicts_next
from compress.models.families import family_of
from compress.models.graph import Graph
from compress.models.logits import vocabulary as vocabulary_of
from compress.models.tokenizers import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor, nn

    from compress.calibration.texts import Split, Ticking
    from compress.config.pipeline import DataSection

Given = Any  # one source, or several by name: what `calibration/given.py` takes


def dataset(graph: Graph, name: Split, data: Given | None, dtype: torch.dtype) -> Dataset | None:
    """Data from Python, of one source or by name of several, as the model takes them.

    Raises:
        DataError: the model cannot take it, or labels are not wanted, or of the wrong kind.
    """
    if data is None:
        return None
    return model_inputs(graph, name, gathered(name, data, kind_of(graph.model)), dtype)


def model_inputs(graph: Graph, name: str, data: Dataset, dtype: torch.dtype) -> Dataset:
    """Calibration or evaluation data as the model takes it: token ids as int64, images in the type it computes in.

    Raises:
        DataError: the model cannot take it.
    """
    inputs = data.inputs
    if graph.takes_tokens:
        known: int = graph.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        # Some tables have rows for more than text, such as the places of images, that are never predicted.
        predicted = vocabulary_of(graph.model) if graph.is_language_model else 0
        least = 2 if name == "evaluation" and graph.is_language_model else 1
        return data.of(token_ids(name, inputs, min(known, predicted or known), least))
    if inputs.numel() == 0:
        raise DataError(f"{name} is empty: shape {tuple(inputs.shape)}")
    if inputs.is_floating_point() and not torch.isfinite(inputs).all():
        raise DataError(f"{name} holds NaN or infinity")
    if graph.is_image_model:
        return data.of(_images(graph, name, inputs).to(dtype))
    own = isinstance(graph.model, PreTrainedModel) and inputs.is_floating_point()
    return data.of(inputs.to(dtype)) if own else data


def _images(graph: Graph, name: str, images: Tensor) -> Tensor:
    channels = getattr(graph.model.config, "num_channels", None)
    if images.dim() != 4 or not images.is_floating_point() or (channels and images.shape[1] != channels):
        raise DataError(
            f"{name} must be (images, {channels or 'channels'}, height, width) floating-point numbers, scaled as the "
            f"model expects; got {images.dtype} {tuple(images.shape)}"
        )
    return images


def with_masks(model: nn.Module, data: Dataset, folder: Path) -> Dataset:
    """Evaluation data as read, some of its tokens hidden where that is what the model predicts."""
    if data.labels is not None or not (isinstance(model, PreTrainedModel) and predicts_masked(model)):
        return data
    if predicts_next(model):
        return data
    mask = getattr(load_tokenizer(folder, "masked text"), "mask_token_id", None)
    return data if mask is None else masked(data, mask)


def given_section(cls: type[DataSection], data: Dataset | None, options: Mapping[str, Any]) -> Any:
    """Data given from Python, as a pipeline section; the length of an image is the number of its positions."""
    if data is None:
        return None
    inputs = data.inputs
    length = math.prod(inputs.shape[2:]) if inputs.dim() == 4 else inputs.shape[1] if inputs.dim() > 1 else 1
    source = dict.fromkeys(data.parts, GIVEN) or GIVEN
    return cls(source=source, samples=max(data.parts.values(), default=len(inputs)), length=length, **options)


def read_data(section: DataSection, folder: Path, split: Split, over: Ticking | None = None) -> Dataset:
    """The data a `calibration:` or `evaluate:` section describes: images and labels, or tokens by a model's tokenizer.

    `over` draws progress, as for `load_tokens`.

    Raises:
        DataError: nothing that can be read.
    """
    found = {name: _read_source(section, source, folder, split, over) for name, source in section.sources.items()}
    return found[""] if "" in found else Dataset.joined(found)


def _read_source(section: DataSection, source: str, folder: Path, split: Split, over: Ticking | None) -> Dataset:
    if is_images(source):
        images, labels = load_images(source, section.samples)
        return Dataset(images, labels)
    tokens = load_tokens(
        source,
        load_tokenizer(folder, f"{split} text"),
        samples=section.samples,
        length=section.length,
        split=split,
        field=section.field,
        subset=section.subset,
        protocol=section.protocol,
        over=over,
    )
    return Dataset(tokens)


def matched(model: PreTrainedModel, data: Dataset) -> Tensor | tuple[Tensor, Tensor]:
    """Data as read, for `evaluate` of a loaded model.

    Raises:
        DataError: images for a language model, or text for an image model.
    """
    graph, dtype = Graph(model, (), (), family_of(model)), getattr(model.config, "dtype", None)
    given = data.inputs if data.labels is None else (data.inputs, data.labels)
    whole = dataset(graph, "evaluation", given, dtype if isinstance(dtype, torch.dtype) else torch.float32)
    assert whole is not None
    return whole.inputs if whole.labels is None else (whole.inputs, whole.labels)
