"""OUT/hf: the compressed model's values in a plain folder, which transformers loads without this package."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compress.artifact import SINGLE, Artifact
from compress.encodings import Spec
from compress.export.files import Entry, compare_tensors, copy_companions, write_json, write_tensors
from compress.graph import Graph
from compress.ledger import writing
from compress.progress import Bars

FILES: tuple[str, ...] = (SINGLE, "config.json")


@dataclass(frozen=True)
class Dense:
    """Every weight as it is computed with.

    What a pass made is float32; it is kept in the type the pipeline computes in, the very numbers that were measured.
    What no pass touched is kept as the source has it.

    Attributes:
        dtype: of every weight that a pass made.
        corrected: low-rank corrections are added; without, they are left out.
    """

    artifact: Artifact
    dtype: torch.dtype
    corrected: bool = True

    def layout(self) -> list[tuple[str, list[Entry]]]:
        """Parameters in the model's order, tied ones once, then buffers, each by itself."""
        artifact = self.artifact
        found: list[tuple[str, list[Entry]]] = []
        for name, _ in artifact.graph.tensors():
            if name not in artifact.graph.tied:
                stored = artifact.name_in_source(name)
                made = artifact.made_site(name) or name in artifact.vectors
                dtype = self.dtype if made else artifact.source.dtype(stored)
                found.append((name, [(name, artifact.source.shape(stored), dtype)]))
        return found

    def read(self, name: str) -> dict[str, Tensor]:
        """One of them, decompressed."""
        site = self.artifact.made_site(name)
        if site is None:
            value = self.artifact.tensor(name)
            return {name: value.to(self.dtype) if name in self.artifact.vectors else value}
        weight = self.artifact.weight(site)
        return {name: site.value(weight.dequantize() if self.corrected else weight.base()).to(self.dtype)}


def refusals(graph: Graph, specs: Mapping[str, Spec]) -> Iterator[str]:
    """Why this folder could not hold what a pipeline makes; `specs` has every site that is worked on."""
    rounded = [name for name, spec in specs.items() if spec.inputs is not None]
    if rounded:
        yield (
            f"plain weights cannot round what they are multiplied with, and {len(rounded)} layers do, such as "
            f"{rounded[0]}; leave activation_bits out of the quantizer, or this format out of `export:`"
        )


def write(artifact: Artifact, folder: Path, final: Path, source: Path, dtype: torch.dtype, bars: Bars) -> None:
    """Write weights, configuration and the source's tokenizer files into `folder`."""
    write_dense(Dense(artifact, dtype), folder, source, bars, "hf")


def verify(artifact: Artifact, folder: Path, dtype: torch.dtype, bars: Bars) -> int:
    """Compare every written tensor with what was meant; returns how many.

    Raises:
        CompressError: a tensor differs.
    """
    return verify_dense(Dense(artifact, dtype), folder, bars, "hf")


def write_dense(dense: Dense, folder: Path, source: Path, bars: Bars, heading: str) -> None:
    """Write a plain folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with writing(folder / SINGLE):
        write_tensors(dense.layout(), dense.read, folder / SINGLE, bars, heading)
    config = json.loads((source / "config.json").read_text())
    config.pop("torch_dtype", None)  # the old name; a loader would otherwise round once more
    config |= dense.artifact.configured
    write_json({**config, "dtype": str(dense.dtype).removeprefix("torch.")}, folder / "config.json")
    copy_companions(source, folder)


def verify_dense(dense: Dense, folder: Path, bars: Bars, heading: str) -> int:
    """Compare a plain folder with what was meant; returns how many tensors there are."""
    return compare_tensors(dense.layout(), dense.read, folder / SINGLE, bars, heading)
