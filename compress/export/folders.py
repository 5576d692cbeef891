"""The folders that a pipeline's `export:` adds to OUT, beside the packed weights that are always written."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch

from compress.artifact import Artifact
from compress.encodings import Spec
from compress.export import hf, peft
from compress.graph import Graph
from compress.progress import Bars


class Folder(Protocol):
    """A module that writes one: OUT/<its name in `export:`>."""

    @property
    def FILES(self) -> tuple[str, ...]:
        """Without one of these the folder is not whole."""

    def refusals(self, graph: Graph, specs: Mapping[str, Spec]) -> Iterator[str]:
        """Why it could not hold what a pipeline makes; `specs` has every site that is worked on."""

    def write(
        self, artifact: Artifact, folder: Path, final: Path, source: Path, dtype: torch.dtype, bars: Bars
    ) -> None:
        """Write into `folder`, which will be renamed to `final`. `dtype` is what the pipeline computes in."""

    def verify(self, artifact: Artifact, folder: Path, dtype: torch.dtype, bars: Bars) -> int:
        """Compare every written tensor with what was meant; returns how many."""


FOLDERS: dict[str, Folder] = {"hf": hf, "peft": peft}
