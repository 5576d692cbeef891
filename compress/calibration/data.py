"""Samples that passes learn from or are measured on: of one source or several, images from a file, batches."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import CheckpointError, DataError
from compress.io.safetensors_file import read_header, read_tensors
from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

CALIBRATED_AT_ONCE = 2048  # tokens, or positions, of a batch that calibration data runs through the model in
NUMBERS_AT_ONCE = 1 << 21  # of inputs that are no token ids


@dataclass(frozen=True)
class Dataset:
    """Samples from one source, or from several that have names.

    Attributes:
        inputs: (N, length) int64 token ids, or (N, ...) images or other inputs; those of one source after another.
        labels: (N,) int64 of a classifier's inputs, where they are known.
        parts: name of each source -> how many of the samples are its own, in order; empty of one without a name.
    """

    inputs: Tensor
    labels: Tensor | None = None
    parts: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.inputs)

    def split(self) -> dict[str, Dataset]:
        """Name of each source -> its samples; one without a name is called ""."""
        found, start = {}, 0
        for name, count in (self.parts or {"": len(self)}).items():
            rows = slice(start, start + count)
            found[name] = Dataset(self.inputs[rows], None if self.labels is None else self.labels[rows])
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
        shapes = {name: tuple(part.inputs.shape[1:]) for name, part in parts.items()}
        if len(set(shapes.values())) > 1:
            said = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            raise DataError(f"inputs of all sources must have one shape; got {said}")
        labels = {name: part.labels for name, part in parts.items()}
        bare = [name for name, found in labels.items() if found is None]
        if bare and len(bare) < len(labels):
            raise DataError(f"{bare[0]} has no labels, and other sources have; give all or none")
        return Dataset(
            torch.cat([part.inputs for part in parts.values()]),
            None if bare else torch.cat([found for found in labels.values() if found is not None]),
            {name: len(part) for name, part in parts.items()},
        )


def load_images(source: str, samples: int) -> tuple[Tensor, Tensor | None]:
    """Images, evenly spread over a .safetensors file, and their labels where it has them.

    Args:
        source: a file with a tensor `images` (N, ...), as the model takes them, and a tensor `labels` (N,) of integers.
        samples: number of images; 0 for all.

    Returns:
        (samples, ...) and (samples,) int64, or None.

    Raises:
        DataError: not such a file, or fewer images than asked for.
    """
    try:
        names = list(read_header(Path(source)).tensors)
        found = read_tensors(Path(source), [name for name in ("images", "labels") if name in names])
    except CheckpointError as error:
        raise DataError(f"{source} cannot be read: {error}") from error
    if "images" not in found:
        raise DataError(f"{source} has no tensor `images`; it has {', '.join(names)}")
    images, labels = found["images"], found.get("labels")
    if labels is not None and labels.shape != images.shape[:1]:
        raise DataError(f"{source}: {tuple(labels.shape)} labels for {len(images)} images")
    if labels is not None and labels.is_floating_point():
        raise DataError(f"{source}: labels are {labels.dtype}; they must be the whole numbers of the classes")
    if len(images) < max(1, samples):
        raise DataError(f"{source} holds {len(images)} images; {samples} were asked for: lower samples, or give more")
    wanted = samples or len(images)
    chosen = [i * len(images) // wanted for i in range(wanted)]
    return images[chosen], None if labels is None else labels[chosen].long()


def batches(tokens: Tensor, tokens_at_once: int, divided: int = 1) -> list[Tensor]:
    """Samples in batches of about so many tokens (or NUMBERS_AT_ONCE), all of one size where that is possible.

    `divided`: how many parts such a batch is divided into.
    """
    if tokens.dim() == 2 and not tokens.is_floating_point():
        rows = tokens_at_once // tokens.shape[1]
    else:
        rows = min(tokens_at_once, NUMBERS_AT_ONCE // max(1, tokens[0].numel()))
    return list(torch.split(tokens, max(1, min(len(tokens), rows) // divided)))
