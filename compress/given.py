"""Data that a pipeline names or a caller gives, checked against the model that will see it."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.calibration.data import IMAGES, Over, Split, load_images, load_tokens
from compress.errors import DataError
from compress.graph import Graph
from compress.pipeline import GIVEN, Calibration

Labelled = tuple[Tensor, Tensor]  # inputs (samples, ...), labels (samples,)


def labelled(graph: Graph, evaluation: Tensor | Labelled) -> tuple[Tensor, Tensor | None]:
    """Evaluation data as inputs and labels, which language models have none of.

    Raises:
        DataError: labels missing, not wanted, or of the wrong kind.
    """
    if graph.is_language_model:
        if isinstance(evaluation, tuple):
            raise DataError("a language model is evaluated on (windows, length) token ids, without labels")
        return evaluation, None
    if not isinstance(evaluation, tuple):
        raise DataError("a model that takes no tokens is evaluated on (inputs, labels), for its accuracy")
    inputs, labels = evaluation
    if labels.dtype not in (torch.uint8, torch.int16, torch.int32, torch.int64) or labels.shape != inputs.shape[:1]:
        raise DataError(
            f"labels must be ({len(inputs)},) integers, one an input; got {labels.dtype} {tuple(labels.shape)}"
        )
    return inputs, labels.long()


def checked(graph: Graph, name: str, data: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Calibration or evaluation data as the model takes it: token ids as int64, images in the type it computes in.

    Raises:
        DataError: the model cannot take it.
    """
    if data is None:
        return None
    if data.numel() == 0:
        raise DataError(f"{name} is empty: shape {tuple(data.shape)}")
    if graph.is_language_model:
        return _tokens(graph, name, data)
    if data.is_floating_point() and not torch.isfinite(data).all():
        raise DataError(f"{name} holds NaN or infinity")
    return _images(graph, name, data).to(dtype) if graph.is_image_model else data


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


def described(cls: type[Calibration], data: Tensor | None, options: Mapping[str, Any]) -> Any:
    """Data given from Python, as a pipeline section; the length of an image is the number of its positions."""
    if data is None:
        return None
    length = math.prod(data.shape[2:]) if data.dim() == 4 else data.shape[1] if data.dim() > 1 else 1
    return cls(source=GIVEN, samples=len(data), length=length, **options)


def read(section: Calibration, folder: Path, split: Split, over: Over | None = None) -> tuple[Tensor, Tensor | None]:
    """The data a `calibration:` or `evaluate:` section describes: images and labels, or tokens by a model's tokenizer.

    `over` draws progress, as for `load_tokens`.

    Raises:
        DataError: nothing that can be read.
    """
    if section.source.endswith(IMAGES):
        images, labels = load_images(section.source, section.samples)
        if split == "evaluation" and labels is None:
            raise DataError(f"{section.source} has no tensor `labels` to measure accuracy with")
        return images, labels
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{folder} has no tokenizer that transformers can read, and {split} text needs one: {error}"
        ) from error
    tokens = load_tokens(
        section.source,
        tokenizer,
        samples=section.samples,
        length=section.length,
        split=split,
        field=section.field,
        subset=section.subset,
        over=over,
    )
    return tokens, None


def matched(model: PreTrainedModel, inputs: Tensor, labels: Tensor | None) -> Tensor | Labelled:
    """Data as read, for `evaluate` of a loaded model.

    Raises:
        DataError: images for a language model, or text for an image model.
    """
    graph = Graph(model, (), ())
    inputs, labels = labelled(graph, inputs if labels is None else (inputs, labels))
    if labels is None:
        return inputs
    dtype = getattr(model.config, "dtype", None)
    return _images(graph, "evaluation", inputs).to(dtype if isinstance(dtype, torch.dtype) else inputs.dtype), labels
