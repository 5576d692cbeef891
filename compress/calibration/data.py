"""Where calibration and evaluation data come from: the bundled source, local files, a Hugging Face data set."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compress.demo import data as demo
from compress.errors import CheckpointError, DataError
from compress.io.safetensors_file import read_header, read_tensors
from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

Split = Literal["calibration", "evaluation"]
IMAGE_SUFFIX = ".safetensors"
LOCAL = (".txt", ".jsonl", ".parquet", IMAGE_SUFFIX)
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


def check_source(source: str) -> str | None:
    """What is wrong with a `source`, before any of it is read; None if nothing can be seen."""
    if source == "demo":
        return None
    path = Path(source)
    try:
        there = path.exists()
    except OSError as error:
        return f"cannot be looked up: {error.strerror}"
    if path.suffix in LOCAL or there:
        if not path.is_file():
            return f"no such file: {source}"
        if path.suffix not in LOCAL:
            return f"{source} is not one of {', '.join(LOCAL)}"
        if path.stat().st_size == 0:
            return f"{source} is empty"
        return None
    if source.count("/") > 1 or source.startswith("."):
        return f"no such file: {source}"
    try:
        import datasets  # noqa: F401
    except ImportError:
        return (
            f"{source!r} is neither 'demo' nor a local {', '.join(LOCAL)} file; the id of a Hugging Face data set "
            "needs the extra: pip install 'compress-pipeline[datasets]'"
        )
    return None


Ticking = Callable[[Iterable[str], int | None, str], Iterator[str]]


def load_tokens(
    source: str,
    tokenizer: Any,
    *,
    samples: int,
    length: int,
    split: Split = "calibration",
    field: str = "text",
    subset: str | None = None,
    over: Ticking | None = None,
) -> Tensor:
    """Windows of token ids, evenly spread over the source.

    Args:
        source: `demo`, a .txt, .jsonl or .parquet file, or the id of a Hugging Face data set.
        tokenizer: of the model that will see the tokens.
        samples: number of windows.
        length: tokens per window.
        split: for `demo`, which half of the standard library's documentation; for a data set id, its `train` split
            calibrates and its `test` split evaluates.
        field: the field or column that holds the text.
        subset: the configuration name of a data set id.
        over: draws progress over the texts: (texts, how many or None, label).

    Returns:
        (samples, length) int64.

    Raises:
        DataError: nothing there, no such field, or fewer tokens than asked for.
    """
    problem = check_source(source)
    if problem:
        raise DataError(problem)
    if source.endswith(IMAGE_SUFFIX):
        raise DataError(f"{source} holds images; tokens come from a text")
    texts = _texts(source, split, field, subset)
    separator = tokenizer.eos_token_id
    stream: list[int] = []
    known = len(texts) if isinstance(texts, Sized) else None
    for text in texts if over is None else over(texts, known, f"tokenize {split}: texts"):
        stream += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if separator is not None:
            stream.append(separator)
    return windows(torch.tensor(stream), samples, length, source)


def windows(stream: Tensor, samples: int, length: int, source: str) -> Tensor:
    """(samples, length) windows of a (T,) stream of tokens, evenly spread, none overlapping.

    Raises:
        DataError: the stream is too short.
    """
    available = len(stream) // length
    if available < samples:
        raise DataError(
            f"{source} holds {len(stream)} tokens, {available} windows of {length}; {samples} were asked for: "
            "lower samples or length, or give more text"
        )
    chosen = [i * available // samples for i in range(samples)]
    return stream[: available * length].view(available, length)[chosen].long()


def _texts(source: str, split: Split, field: str, subset: str | None) -> Iterable[str]:
    if source == "demo":
        return demo.texts(split)
    path = Path(source)
    if path.suffix == ".txt":
        return [path.read_text(encoding="utf-8", errors="replace")]
    if path.suffix == ".jsonl":
        return _jsonl(path, field)
    if path.suffix == ".parquet":
        return _parquet(path, field)
    import datasets

    try:
        rows = datasets.load_dataset(source, subset, split="train" if split == "calibration" else "test")
        return list(rows[field])
    except Exception as error:  # the library raises many kinds; all mean the same to the user
        raise DataError(f"data set {source!r}, split for {split}, column {field!r}: {error}") from error


def _jsonl(path: Path, field: str) -> Iterable[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[field]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path}:{number}: not a JSON object with a {field!r} field ({error})") from error
            yield _checked_text(text, f"{path}:{number}: {field!r}")


def _parquet(path: Path, field: str) -> Iterable[str]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path}: reading parquet needs: pip install 'compress-pipeline[parquet]'") from error
    try:
        values = pyarrow.parquet.read_table(path, columns=[field])[field].to_pylist()
    except (OSError, KeyError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: no readable column {field!r} ({error})") from error
    return [_checked_text(text, f"{path}: row {number} of {field!r}") for number, text in enumerate(values, 1)]


def _checked_text(text: Any, place: str) -> str:
    if not isinstance(text, str):
        raise DataError(f"{place} is {type(text).__name__}, not a text")
    return text


def load_images(source: str, samples: int) -> tuple[Tensor, Tensor | None]:
    """Images, evenly spread over a .safetensors file, and their labels where it has them.

    Args:
        source: a file with a tensor `images` (N, ...), as the model takes them, and a tensor `labels` (N,) of integers.
        samples: number of images.

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
    if len(images) < samples:
        raise DataError(f"{source} holds {len(images)} images; {samples} were asked for: lower samples, or give more")
    chosen = [i * len(images) // samples for i in range(samples)]
    return images[chosen], None if labels is None else labels[chosen].long()


def batches(tokens: Tensor, tokens_at_once: int) -> list[Tensor]:
    """Samples in batches of about so many tokens (or NUMBERS_AT_ONCE), all of one size where that is possible."""
    if tokens.dim() == 2 and not tokens.is_floating_point():
        rows = tokens_at_once // tokens.shape[1]
    else:
        rows = min(tokens_at_once, NUMBERS_AT_ONCE // max(1, tokens[0].numel()))
    return list(torch.split(tokens, max(1, min(len(tokens), rows))))
