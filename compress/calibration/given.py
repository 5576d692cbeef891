"""The one gate for data from Python: what holds token ids, images or other inputs becomes tensors, or is refused.

Taken are tensors and arrays, lists, what a tokenizer or an image processor returns, data loaders and other iterables of
these, and several such sources by name. Nothing is cut, filled up or left out: where that would be needed, a sentence
says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from compress.calibration.data import Dataset, of_samples
from compress.errors import DataError
from compress.lazy import torch, transformers
from compress.models.architecture import predicts_next
from compress.models.families.transformers_model import TOKENS, called_with, called_with_images
from compress.models.named import has_several, inputs_of

if TYPE_CHECKING:
    from torch import Tensor, nn

# What a model is called with; `labelled`: with tokens of which it predicts not the next, but perhaps a class.
Kind = Literal["tokens", "labelled", "images", "inputs"]
OF_TOKENS = ("tokens", "labelled")

ACCEPTED: dict[Kind, str] = {
    "tokens": "give (samples, length) integer token ids as a tensor or an array, a list of windows of one length, what "
    "a tokenizer returns, a data loader of these, or several sources by name. compress.load_tokens(source, tokenizer, "
    "samples=..., length=...) makes them of a text, or of a list of texts",
    "labelled": "give (samples, length) integer token ids as a tensor or an array, a list of windows of one length, "
    "what a tokenizer returns, a data loader of these, or several sources by name; with labels (tokens, labels)",
    "images": "give floating-point images (samples, channels, height, width) as a tensor or an array, a list of them, "
    "what an image processor returns, a data loader of these, or several sources by name; with labels (images, labels)",
    "inputs": "give inputs (samples, ...) as a tensor or an array, a list or a data loader of them, or several sources "
    "by name; with labels (inputs, labels)",
}
DIMENSIONS: dict[Kind, int] = {"tokens": 1, "labelled": 1, "images": 3, "inputs": 1}  # of one sample in a list
KEYS: dict[Kind, str] = {"tokens": "input_ids", "labelled": "input_ids", "images": "pixel_values", "inputs": ""}
LABELS = ("labels", "label")
PROCESSED = {"input_ids", "attention_mask", "pixel_values", "inputs_embeds", "input_features", "input_values"}
# What a tokenizer returns beside the ids, and no model is called with.
ASIDE = {"special_tokens_mask", "offset_mapping", "overflow_to_sample_mapping", "length", "num_truncated_tokens"}
MOST_NUMBERS = 1 << 28  # that are taken from something that is only iterated, and may never end
INTEGERS = {"uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"}


def kind_of(model: nn.Module) -> Kind:
    """What a model is called with; of other modules than those of transformers nothing is known."""
    if not isinstance(model, transformers.PreTrainedModel):
        return "inputs"
    if called_with(model) == TOKENS:
        return "tokens" if predicts_next(model) else "labelled"
    return "images" if called_with_images(model) else "inputs"


def by_name(name: str, data: Any, model: nn.Module) -> Dataset | None:
    """Samples with several inputs, as a model's processor returns them; None where there is one input.

    Args:
        name: what messages call them.
        data: a mapping of one sample or of several, a list or a loader of such mappings, or several sources by name.
        model: that they are for.

    Raises:
        DataError: several samples in a mapping that cannot be told apart, or an input that the model does not take.
    """
    if not isinstance(model, transformers.PreTrainedModel):
        return None
    if isinstance(data, Mapping) and not has_several(model, {*data}):
        if not data or PROCESSED & {*data}:
            return None
        parts = {str(n): by_name(f"{name} {n!r}", part, model) for n, part in data.items()}
        found = {n: part for n, part in parts.items() if part is not None}
        return Dataset.joined(found) if len(found) == len(parts) else None
    items = [data] if isinstance(data, Mapping) else data if isinstance(data, list) else None
    if not items or not all(isinstance(item, Mapping) and has_several(model, {*item}) for item in items):
        return None
    return of_samples([sample for i, item in enumerate(items) for sample in _samples(f"{name}, item {i}", item, model)])


def _samples(name: str, item: Mapping[str, Any], model: nn.Module) -> list[dict[str, Tensor]]:
    """The samples of a mapping, each a batch of one."""
    known = inputs_of(model)
    strange = sorted({*item} - known - {"labels", "label", *ASIDE})
    if strange:
        raise DataError(f"{name} has {strange[0]}, which {type(model).__name__} does not take; leave it out")
    values = {n: _tensor(f"{name}: {n}", v, "inputs") for n, v in item.items() if n in known and n != "labels"}
    count = len(values[called_with(model)])
    if count == 1:
        return [values]
    if any(len(value) != count for value in values.values()):
        raise DataError(
            f"{name} holds {count} samples, and some inputs have no entry for each: give a list with a mapping for "
            "each sample"
        )
    return [{n: value[i : i + 1] for n, value in values.items()} for i in range(count)]


def gathered(name: str, data: Any, kind: Kind) -> Dataset:
    """Data of one source, or of several by name, as tensors.

    Args:
        name: what messages call it, such as `calibration`.
        data: what was given.
        kind: what the model is called with.

    Returns:
        Inputs of any type and shape, and labels where they were given, unchecked against a model.

    Raises:
        DataError: none of what is accepted.
    """
    if isinstance(data, Mapping) and not PROCESSED & {*data}:
        if not data:
            raise DataError(f"{name} names no source; give at least one, such as {{'maths': tokens}}")
        return Dataset.joined({str(n): _source(f"{name} {n!r}", part, kind) for n, part in data.items()})
    return _source(name, data, kind)


def integer_labels(labels: Tensor, inputs: Tensor) -> Tensor:
    """(samples,) int64 labels; (samples, length) with one for each token.

    Raises:
        DataError: not one whole number for each input, or token of it.
    """
    if not _is_integer(labels) or labels.shape not in (inputs.shape[:1], inputs.shape[:2]):
        raise DataError(
            f"labels must be ({len(inputs)},) integers, one per input; got {labels.dtype} {tuple(labels.shape)}"
        )
    return labels.long()


def token_ids(name: str, tokens: Tensor, vocabulary: int | None, least: int = 1) -> Tensor:
    """(samples, length) int64 token ids.

    Args:
        name: what messages call them.
        tokens: as they were given.
        vocabulary: how many tokens the model knows; None: nobody knows.
        least: tokens that a window must have.

    Raises:
        DataError: another shape or type, none at all, or ids that the model does not know.
    """
    if tokens.dim() != 2 or not _is_integer(tokens):
        said = "; a single window is (1, length)" if tokens.dim() == 1 else ""
        raise DataError(
            f"{name} must be (samples, length) integer token ids{said}; got {tokens.dtype} {tuple(tokens.shape)}"
        )
    if tokens.numel() == 0:
        raise DataError(f"{name} is empty: shape {tuple(tokens.shape)}")
    if tokens.shape[1] < least:
        raise DataError(
            f"{name} has windows of one token; at least two tokens are needed, of which the second is predicted: got "
            f"shape {tuple(tokens.shape)}"
        )
    tokens = tokens.long()
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        most = "" if vocabulary is None else vocabulary - 1
        raise DataError(
            f"{name} has token ids outside 0..{most}, such as {low if low < 0 else high}: they belong to another "
            "tokenizer, or mark padding"
        )
    return tokens


def _source(name: str, data: Any, kind: Kind) -> Dataset:
    if isinstance(data, tuple) and kind == "tokens":
        raise DataError(f"{name} of a language model is (windows, length) token ids, without labels; got a tuple")
    if isinstance(data, tuple) and len(data) != 2:
        raise DataError(f"{name} is a tuple of {len(data)}; with labels it is (inputs, labels)")
    inputs, labels = _batch(name, data[0] if isinstance(data, tuple) else data, kind)
    if isinstance(data, tuple):
        labels = _tensor(f"{name}, its labels", data[1], kind)
    return Dataset(inputs, None if labels is None else integer_labels(labels, inputs))


Batch = tuple["Tensor", "Tensor | None"]  # inputs and labels


def _batch(name: str, data: Any, kind: Kind) -> Batch:
    """Everything that one source holds."""
    if isinstance(data, Mapping):
        return _processed(name, data, kind)
    if _is_array(data) or _is_numbers(data):
        return _tensor(name, data, kind), None
    if isinstance(data, str | bytes) or not (isinstance(data, Iterable) or hasattr(data, "__getitem__")):
        _refuse(name, data, kind)
    batches: list[Tensor] = []
    labels: list[Tensor] = []
    numbers = 0
    for number, item in enumerate(data):
        inputs, marks = _item(f"{name}, item {number}", item, kind)
        if inputs.dim() == DIMENSIONS[kind]:
            inputs, marks = inputs[None], marks if marks is None else marks.reshape(1)
        batches.append(inputs)
        labels += [] if marks is None else [marks]
        numbers += inputs.numel()
        if numbers > MOST_NUMBERS:
            raise DataError(f"{name} goes on after {numbers} numbers; give as many batches as are to be used")
    if not batches:
        raise DataError(f"{name} is empty: it holds no window" if kind == "tokens" else f"{name} is empty")
    if labels and len(labels) != len(batches):
        raise DataError(f"{name}: {len(labels)} of {len(batches)} items have labels; give all or none")
    return _together(name, batches, kind), torch.cat(labels) if labels else None


def _together(name: str, batches: list[Tensor], kind: Kind) -> Tensor:
    shapes = {tuple(part.shape[1:]): None for part in batches}
    if len(shapes) > 1:
        if kind in OF_TOKENS:
            lengths = ", ".join(str(shape[0]) if len(shape) == 1 else str(shape) for shape in [*shapes][:4])
            raise DataError(
                f"{name} has windows of different length ({lengths} tokens): give windows of one length. Cut them, or "
                "put the texts into one file for compress.load_tokens, which cuts windows from the stream"
            )
        raise DataError(f"{name} has inputs of different shapes ({', '.join(map(str, [*shapes][:4]))}): give one shape")
    if len({part.dtype for part in batches}) > 1:
        raise DataError(f"{name} mixes {' and '.join(sorted({str(p.dtype) for p in batches}))}: give one type")
    return torch.cat(batches)


def _item(name: str, item: Any, kind: Kind) -> Batch:
    """What one item of a list or of a loader holds: a sample, or a batch of them, perhaps with labels."""
    if isinstance(item, list | tuple) and len(item) == 1 and not _is_numbers(item):
        return _item(name, item[0], kind)
    if isinstance(item, Mapping):
        return _processed(name, item, kind)
    if isinstance(item, list | tuple) and any(map(_is_array, item)):
        if kind != "tokens" and len(item) == 2:
            return _tensor(name, item[0], kind), _tensor(f"{name}, its labels", item[1], kind)
        raise DataError(
            f"{name} is {len(item)} tensors, and nothing says what each is: give one tensor, or name them as a "
            "tokenizer does, input_ids and attention_mask"
            if kind == "tokens"
            else f"{name} is {len(item)} tensors; give one, or (inputs, labels)"
        )
    return _tensor(name, item, kind), None


def _processed(name: str, given: Mapping[str, Any], kind: Kind) -> Batch:
    """What a tokenizer or an image processor returns."""
    key = KEYS[kind]
    if key not in given or not key:
        there = ", ".join(map(str, given))
        raise DataError(
            f"{name} has {there}, and " + (f"no {key}; " if key else "the model takes none; ") + ACCEPTED[kind]
        )
    values = given[key]
    if kind in OF_TOKENS and isinstance(values, list) and any(map(_is_array, values)):
        raise DataError(
            f"{name}: input_ids is a list of tensors, which data loaders make of lists of numbers with windows and "
            "positions changed round; let the data set return tensors, such as set_format('torch')"
        )
    inputs = _tensor(f"{name}: {key}", values, kind)
    if kind in OF_TOKENS:
        inputs = inputs[None] if inputs.dim() == 1 else inputs
        for other, value in given.items():
            if other != key and (kind == "tokens" or other not in LABELS):
                _check_beside(f"{name}: {other}", other, value, inputs)
    labels = None if kind == "tokens" else next((given[label] for label in LABELS if label in given), None)
    marks = None if labels is None else _tensor(f"{name}, its labels", labels, kind)
    return inputs, marks


def _check_beside(name: str, key: str, value: Any, tokens: Tensor) -> None:
    """What stands beside the token ids must change nothing: every position counts, and is called with the ids alone."""
    if key in ASIDE or value is None or isinstance(value, str) or is_texts(value):
        return
    if key not in ("attention_mask", "token_type_ids", "labels", "position_ids"):
        raise DataError(f"{name} is not used: leave it out, and give the input_ids alone")
    found = _tensor(name, value, "tokens")
    found = found[None] if found.dim() == 1 else found
    if found.shape != tokens.shape:
        raise DataError(f"{name} is {tuple(found.shape)}, and input_ids {tuple(tokens.shape)}")
    if key == "attention_mask" and not bool(found.bool().all()):
        rows = found.bool().reshape(-1, found.shape[-1])
        row = int((~rows.all(1)).nonzero()[0])
        empty = int((~rows[row]).sum())
        raise DataError(
            f"{name} leaves out {empty} of {rows.shape[1]} positions of window {row}, which is padded: every position "
            "counts here. Give windows of one length without padding; compress.load_tokens cuts them from a text"
        )
    same = {
        "token_type_ids": not bool(found.any()),
        "labels": torch.equal(found.long(), tokens.long()),
        "position_ids": bool((found.long() == torch.arange(tokens.shape[-1], device=found.device)).all()),
    }
    if not same.get(key, True):
        raise DataError(f"{name} is not what the model has without it, and is not used: give the input_ids alone")


def _tensor(name: str, value: Any, kind: Kind) -> Tensor:
    """An array, a tensor, or numbers in lists, as a plain tensor."""
    import numpy

    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.is_nested or value.is_meta or value.is_quantized:
            raise DataError(f"{name} must be a plain tensor with values; got {_described(value)}")
        return value.detach()
    if not _is_array(value) and not isinstance(value, list | tuple | int | float):
        _refuse(name, value, kind)
    try:
        array = numpy.array(value)
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
    except (TypeError, ValueError, OverflowError) as error:
        if is_texts(value):
            _refuse(name, value, kind)
        if isinstance(value, list | tuple) and all(isinstance(row, list | tuple) for row in value):
            lengths = ", ".join(str(length) for length in [*dict.fromkeys(map(len, value))][:4])
            raise DataError(f"{name} has rows of different length ({lengths}): give windows of one length") from error
        raise DataError(f"{name} is no array of numbers: {error}") from error


def _refuse(name: str, value: Any, kind: Kind) -> NoReturn:
    raise DataError(f"{name} is {_described(value)}; {ACCEPTED[kind]}")


def _described(value: Any) -> str:
    if isinstance(value, str):
        return f"the text {value[:40]!r}"
    if is_texts(value):
        return "a list of texts"
    if isinstance(value, torch.Tensor):
        layout = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        return f"a tensor on {value.device}, {layout}, {value.dtype}"
    return f"of type {type(value).__name__}"


def _is_array(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or hasattr(value, "__array__")


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], int | float)


def is_texts(value: Any) -> bool:
    """Whether it is a list of texts."""
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], str)


def _is_integer(value: Tensor) -> bool:
    return str(value.dtype).removeprefix("torch.") in INTEGERS
