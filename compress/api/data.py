"""Data that a pipeline names or a caller gives, checked against the model that will see it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from compress.calibration.data import Dataset, load_samples
from compress.calibration.given import by_name, gathered, is_texts, kind_of, token_ids
from compress.calibration.masks import masked
from compress.calibration.processed import Processing, takes_rows
from compress.calibration.rows import may_hold_media, rows_in
from compress.calibration.texts import SELF, is_images
from compress.calibration.tokens import load_tokens
from compress.config.pipeline import GIVEN, Calibration
from compress.errors import CompressError, DataError
from compress.models.architecture import predicts_masked, predicts_next
from compress.models.families import family_of
from compress.models.families.transformers_model import TOKENS, called_with
from compress.models.graph import Graph
from compress.models.loading import build, read_config
from compress.models.logits import vocabulary as vocabulary_of
from compress.models.logits import words as words_of
from compress.models.named import inputs_of, needs_several
from compress.models.processors import processor_folder
from compress.models.tokenizers import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor, nn

    from compress.calibration.texts import Split, Ticking
    from compress.config.pipeline import DataSection, Pipeline

Given = Any  # one source, or several by name: what `calibration/given.py` takes


def dataset(graph: Graph, name: Split, data: Given | None, dtype: torch.dtype) -> Dataset | None:
    """Data from Python, of one source or by name of several, as the model takes them.

    Raises:
        DataError: the model cannot take it, or labels are not wanted, or of the wrong kind.
    """
    if data is None:
        return None
    named = by_name(name, data, graph.model)
    return model_inputs(graph, name, named or gathered(name, data, kind_of(graph.model)), dtype)


def tokenized(name: Split, data: Given | None, section: DataSection | None, tokenizer: Path) -> Given | None:
    """Texts from Python, of one source or of several by name, as windows of tokens; anything else as it is.

    Args:
        name: what the data is for.
        data: as it was given.
        section: of the pipeline, which says how many windows and of what length; without one all that there are.
        tokenizer: the folder of the model's.

    Raises:
        DataError: too few texts, or no tokenizer.
    """
    if isinstance(data, Mapping) and data and all(map(is_texts, data.values())):
        return {source: tokenized(name, texts, section, tokenizer) for source, texts in data.items()}
    if data is None or not is_texts(data):
        return data
    asked, samples = section or Calibration(), section.samples if section else 0
    reader = load_tokenizer(tokenizer, f"{name} text")
    return load_tokens(data, reader, samples=samples, length=asked.length, split=name, protocol=asked.protocol)


def model_inputs(graph: Graph, name: str, data: Dataset, dtype: torch.dtype) -> Dataset:
    """Calibration or evaluation data as the model takes it: token ids as int64, images in the type it computes in.

    Raises:
        DataError: the model cannot take it.
    """
    inputs = data.inputs
    if data.named:
        data = _with_one_input(graph, name, data)
        inputs = data.inputs
    if needs_several(graph.model) and not data.named:
        raise DataError(
            f"{type(graph.model).__name__} is called with text and images, and {name} has one input; give what its "
            "processor returns: a mapping of input_ids and pixel_values, or a list with one for each sample"
        )
    if data.named:
        return replace(data, named=tuple(_sample(graph, name, sample, dtype) for sample in data.named))
    if graph.takes_tokens:
        known = words_of(graph.model)
        # Some tables have rows for more than text, such as the places of images, that are never predicted.
        predicted = vocabulary_of(graph.model) if graph.is_language_model else 0
        least = 2 if name == "evaluation" and graph.is_language_model else 1
        return data.of(token_ids(name, inputs, min(filter(None, (known, predicted)), default=None), least))
    if inputs.numel() == 0:
        raise DataError(f"{name} is empty: shape {tuple(inputs.shape)}")
    if inputs.is_floating_point() and not torch.isfinite(inputs).all():
        raise DataError(f"{name} holds NaN or infinity")
    if graph.is_image_model:
        return data.of(_images(graph, name, inputs).to(dtype))
    own = isinstance(graph.model, PreTrainedModel) and inputs.is_floating_point()
    return data.of(inputs.to(dtype)) if own else data


def _with_one_input(graph: Graph, name: str, data: Dataset) -> Dataset:
    """Samples by name, as one tensor where they have no other input than the model's first.

    Raises:
        DataError: an input that the model does not take.
    """
    names = {key for sample in data.named for key in sample}
    strange = sorted(names - inputs_of(graph.model)) if isinstance(graph.model, PreTrainedModel) else sorted(names)
    if strange:
        raise DataError(f"{name} has {strange[0]}, which {type(graph.model).__name__} does not take; leave it out")
    if names != {called_with(graph.model)}:
        return data
    values = [value for sample in data.named for value in sample.values()]
    if len({value.shape[1:] for value in values}) > 1:
        return data
    return replace(data, inputs=torch.cat(values), named=())


def _sample(graph: Graph, name: str, sample: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """A sample with several inputs as the model takes it: numbers in the type it computes in, as `input_ids` fit."""
    found = {}
    for key, value in sample.items():
        if key == TOKENS:
            value = token_ids(f"{name}: {key}", value, words_of(graph.model))
        elif value.is_floating_point():
            if not torch.isfinite(value).all():
                raise DataError(f"{name}: {key} holds NaN or infinity")
            value = value.to(dtype)
        found[key] = value
    return found


def _images(graph: Graph, name: str, images: Tensor) -> Tensor:
    channels = getattr(graph.model.config, "num_channels", None)
    if images.dim() != 4 or not images.is_floating_point() or (channels and images.shape[1] != channels):
        raise DataError(
            f"{name} must be (images, {channels or 'channels'}, height, width) floating-point numbers, scaled as the "
            f"model expects; got {images.dtype} {tuple(images.shape)}"
        )
    return images


def refuse_by_name(steps: Pipeline, data: Dataset | None) -> None:
    """Refuse samples with several inputs for a pass that learns from whole models, or from batches.

    Raises:
        DataError: names the pass.
    """
    if data is None or not data.named:
        return
    for pass_ in (p for stage in steps.passes for p in stage):
        if pass_.loss is not None or getattr(pass_, "judged", False):
            raise DataError(
                f"{pass_.key} learns from tokens or images alone, and the calibration data has several inputs; give it "
                "one, in a pipeline of its own"
            )
        if pass_.reach == "norms":
            raise DataError(
                f"{pass_.key} counts what batches of samples have together, and samples with several inputs run one by "
                "one; give it data with one input, in a pipeline of its own"
            )


def with_masks(model: nn.Module, data: Dataset, folder: Path) -> Dataset:
    """Evaluation data as read, some of its tokens hidden where that is what the model predicts."""
    if data.named or data.labels is not None or not (isinstance(model, PreTrainedModel) and predicts_masked(model)):
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
    if data.named:
        lengths = [sample[TOKENS].shape[1] if TOKENS in sample else 1 for sample in data.named]
        source = dict.fromkeys(data.parts, GIVEN) or GIVEN
        return cls(source=source, samples=max(data.parts.values(), default=len(inputs)), length=max(lengths), **options)
    length = math.prod(inputs.shape[2:]) if inputs.dim() == 4 else inputs.shape[1] if inputs.dim() > 1 else 1
    source = dict.fromkeys(data.parts, GIVEN) or GIVEN
    return cls(source=source, samples=max(data.parts.values(), default=len(inputs)), length=length, **options)


@dataclass(frozen=True)
class Reader:
    """A model that data is read for.

    Attributes:
        tokenizer: the folder with its tokenizer.
        model: it, its values not looked at; None where it is not known, and rows are text.
        folder: the model's own, where the tokenizer's has no processor; by default that of the tokenizer.
    """

    tokenizer: Path
    model: Any = None
    folder: Path | None = None

    def takes_rows(self, source: str, field: str) -> bool:
        """Whether a source is a file of rows that it takes one by one; see `calibration.processed.takes_rows`."""
        return self.model is not None and takes_rows(self.model, source, field)

    def processing(self, source: str) -> Processing:
        """What makes samples of rows."""
        folders = [self.tokenizer] if self.folder is None else [self.tokenizer, self.folder]
        return Processing(self.model, processor_folder(*folders), source)


def reader_of(section: DataSection, tokenizer: Path, folder: Path | None = None) -> Reader:
    """What reads data for the model of a folder, which is built without values where rows may be for it.

    Args:
        section: says which data.
        tokenizer: the folder with the tokenizer.
        folder: the model's; by default the same.
    """
    model = None
    if any(map(may_hold_media, section.sources.values())):
        with suppress(CompressError, OSError):  # what cannot be built is said where it is loaded
            model = build(read_config(folder or tokenizer))
    return Reader(tokenizer, model, folder)


def read_data(
    section: DataSection,
    reader: Reader,
    split: Split,
    over: Ticking | None = None,
    own: Callable[[], Tensor] | None = None,
) -> Dataset:
    """The data a `calibration:` or `evaluate:` section describes: images and labels, or tokens by a model's tokenizer.

    `over` draws progress, as for `load_tokens`; `own` makes the windows of the source `self`.

    Raises:
        DataError: nothing that can be read.
    """

    def read(source: str) -> Dataset:
        return Dataset(own()) if own and source == SELF else _read_source(section, source, reader, split, over)

    found = {name: read(source) for name, source in section.sources.items()}
    return found[""] if "" in found else Dataset.joined(found)


def _read_source(section: DataSection, source: str, reader: Reader, split: Split, over: Ticking | None) -> Dataset:
    if is_images(source):
        return load_samples(source, section.samples)
    if reader.takes_rows(source, section.field):
        processing = reader.processing(source)
        rows, _ = rows_in(source, section.samples, section.field)
        return processing.samples(rows, over, f"process {split}: rows")
    tokens = load_tokens(
        source,
        load_tokenizer(reader.tokenizer, f"{split} text"),
        samples=section.samples,
        length=section.length,
        split=split,
        field=section.field,
        subset=section.subset,
        protocol=section.protocol,
        over=over,
    )
    return Dataset(tokens)


def matched(model: PreTrainedModel, data: Dataset) -> Dataset:
    """Data as read, as a loaded model takes it, for `evaluate`.

    Raises:
        DataError: images for a language model, or text for an image model.
    """
    graph, dtype = Graph(model, (), (), family_of(model)), getattr(model.config, "dtype", None)
    return model_inputs(graph, "evaluation", data, dtype if isinstance(dtype, torch.dtype) else torch.float32)
