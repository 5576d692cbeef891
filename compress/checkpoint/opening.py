"""A model folder, matched with its structure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.checkpoint.artifact import open_folder
from compress.models import graph as graphs
from compress.models import hub, loading
from compress.models.companions import companions

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from compress.checkpoint.artifact import Artifact


@dataclass(frozen=True)
class OpenedModel:
    """A model folder, matched with its structure."""

    folder: Path
    config: Any
    artifact: Artifact

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Parameter or buffer name -> stored type."""
        a = self.artifact
        return {n: a.source.dtype(a.name_in_source(n)) for n, _ in a.graph.tensors()}

    @property
    def companion_bytes(self) -> int:
        """Bytes of what travels along with the weights, configuration included."""
        return sum(file.stat().st_size for file in (self.folder / "config.json", *companions(self.folder)))


def open_model(model: str | Path) -> OpenedModel:
    """Resolve, check and match a model; reads headers, no weight."""
    folder = hub.resolve(model)
    config = loading.read_config(folder)
    hub.refuse_quantized(folder, config)
    graph = graphs.find(loading.build(config))
    return OpenedModel(folder, config, open_folder(folder, graph))
