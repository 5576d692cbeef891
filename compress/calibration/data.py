"""Samples that passes learn from or are measured on: of one source or several, images from a file, batches."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import CheckpointError, DataError
from compress.io.safetensors_file import read_header, read_tensors
from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

CALIBRATED_AT_ONCE = 2048  # tokens, or positions, of a batch that calibration data runs through the model in
NUMBERS_AT_ONCE = 1 << 21  # of inputs that are no token ids


@dataclass(frozen=True)
class Dataset:
    """Samples from one source, or from several that have names.

    Attributes:
        inputs: (N, length) int64 token ids, or (N, ...) images or other inputs; those of one source after another.
            (N,) numbers of samples that have several inputs.
        named: samples with several inputs by name, each a batch of one; empty where there is one.
        labels: (N,) int64 of a classifier's inputs, where they are known.
        parts: name of each source -> how many of the samples are its own, in order; empty of one without a name.
    """

    inputs: Tensor
    labels: Tensor | None = None
    parts: Mapping[str, int] = field(default_factory=dict)
    named: tuple[Mapping[str, Tensor], ...] = ()

    def __len__(self) -> int:
        return len(self.inputs)

    def split(self) -> dict[str, Dataset]:
        """Name of each source -> its samples; one without a name is called ""."""
        found, start = {}, 0
        for name, count in (self.parts or {"": len(self)}).items():
            rows = slice(start, start + count)
            labels = None if self.labels is None else self.labels[rows]
            found[name] = Dataset(self.inputs[rows], labels, named=self.named)
            start += count
        return found

    def of(self, inputs: Tensor) -> Dataset:
        """This data set with other inputs, of the same number."""
        return replace(self, inputs=inputs)

    @staticmethod
    def joined(parts: Mapping[str, Dataset]) -> Dataset:
        """Joins the data of several sources.

        Raises:
            DataError: inputs of different shapes, or labels for some only.
        """
        if any(part.named for part in parts.values()):
            return _joined_by_name(parts)
        shapes = {name: tuple(part.inputs.shape[1:]) for name, part in parts.items()}
        if len(set(shapes.values())) > 1:
            said = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            raise DataError(f"inputs of all sources must have one shape; got {said}")
        return Dataset(
            torch.cat([part.inputs for part in parts.values()]),
            _labels_of(parts),
            {name: len(part) for name, part in parts.items()},
        )


def of_samples(samples: Sequence[Mapping[str, Tensor]]) -> Dataset:
    """Samples with several inputs by name, each a batch of one."""
    return Dataset(torch.arange(len(samples)), named=tuple(samples))


def _joined_by_name(parts: Mapping[str, Dataset]) -> Dataset:
    one = [name for name, part in parts.items() if not part.named]
    if one:
        raise DataError(f"{one[0]} has one input and other sources have several; give all of one kind")
    samples = [sample for part in parts.values() for sample in part.named]
    counts = {name: len(part) for name, part in parts.items()}
    return replace(of_samples(samples), labels=_labels_of(parts), parts=counts)


def _labels_of(parts: Mapping[str, Dataset]) -> Tensor | None:
    """The labels of all sources; None where none has any."""
    labels = {name: part.labels for name, part in parts.items()}
    bare = [name for name, found in labels.items() if found is None]
    if bare and len(bare) < len(labels):
        raise DataError(f"{bare[0]} has no labels, and other sources have; give all or none")
    return None if bare else torch.cat([found for found in labels.values() if found is not None])


def numbered_together(*sets: Dataset | None) -> tuple[list[Dataset | None], tuple[Mapping[str, Tensor], ...]]:
    """Data sets whose samples have numbers of their own, and all samples with several inputs, by number."""
    found: list[Dataset | None] = []
    every: tuple[Mapping[str, Tensor], ...] = ()
    for data in sets:
        if data is not None and data.named:
            data = data.of(data.inputs + len(every))
            every += data.named
        found.append(data)
    return found, every


def load_samples(source: str, samples: int) -> Dataset:
    """Samples, evenly spread over a .safetensors file, and their labels where it has them.

    Args:
        source: a file with a tensor `images` (N, ...), as the model takes them, and a tensor `labels` (N,) of integers;
            or with tensors (N, ...) that are called as the model calls its inputs, such as `input_ids`.
        samples: number of samples; 0 for all.

    Returns:
        Images with their labels, or samples with inputs by name.

    Raises:
        DataError: not such a file, or fewer samples than asked for.
    """
    try:
        found = read_tensors(Path(source), list(read_header(Path(source)).tensors))
    except CheckpointError as error:
        raise DataError(f"{source} cannot be read: {error}") from error
    if "images" not in found and not any("_" in name for name in found):
        raise DataError(f"{source} has no tensor `images`; it has {', '.join(found)}")
    if "images" not in found:
        return _samples_by_name(source, found, samples)
    images, labels = found["images"], found.get("labels")
    if labels is not None and labels.shape != images.shape[:1]:
        raise DataError(f"{source}: {tuple(labels.shape)} labels for {len(images)} images")
    if labels is not None and labels.is_floating_point():
        raise DataError(f"{source}: labels are {labels.dtype}; they must be the whole numbers of the classes")
    if len(images) < max(1, samples):
        raise DataError(f"{source} holds {len(images)} images; {samples} were asked for: lower samples, or give more")
    chosen = _spread(len(images), samples)
    return Dataset(images[chosen], None if labels is None else labels[chosen].long())


def _spread(count: int, wanted: int) -> list[int]:
    """Numbers of so many samples of all, evenly spread; all for 0."""
    return [i * count // (wanted or count) for i in range(wanted or count)]


def _samples_by_name(source: str, found: Mapping[str, Tensor], samples: int) -> Dataset:
    counts = {name: len(value) for name, value in found.items() if value.dim()}
    if len(set(counts.values())) != 1 or len(counts) < len(found):
        said = ", ".join(f"{name} {tuple(value.shape)}" for name, value in found.items())
        raise DataError(f"{source}: every tensor needs an entry for each sample; got {said}")
    count = next(iter(counts.values()))
    if count < max(1, samples):
        raise DataError(f"{source} holds {count} samples; {samples} were asked for: lower samples, or give more")
    return of_samples([{name: value[i : i + 1] for name, value in found.items()} for i in _spread(count, samples)])


def batches(tokens: Tensor, tokens_at_once: int, divided: int = 1) -> list[Tensor]:
    """Samples in batches of about so many tokens (or NUMBERS_AT_ONCE), all of one size where that is possible.

    `divided`: how many parts such a batch is divided into. Samples that are given by their numbers come one by one.
    """
    if tokens.dim() == 1 and not tokens.is_floating_point():
        return list(torch.split(tokens, 1))
    if tokens.dim() == 2 and not tokens.is_floating_point():
        rows = tokens_at_once // tokens.shape[1]
    else:
        rows = min(tokens_at_once, NUMBERS_AT_ONCE // max(1, tokens[0].numel()))
    return list(torch.split(tokens, max(1, min(len(tokens), rows) // divided)))
