"""A finished packed folder, opened again: what every other container is made from."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from compress.checkpoint.artifact import Artifact, Packed
from compress.checkpoint.sources import FolderSource
from compress.encodings.format import METHOD, WEIGHTS
from compress.errors import UsageError
from compress.export.base import PackedFolder
from compress.lazy import torch
from compress.models import graph as graphs
from compress.models import loading

if TYPE_CHECKING:
    from pathlib import Path

    from compress.encodings import Spec


def read_quantization(folder: Path) -> dict[str, Any]:
    """The section of config.json that describes packed weights.

    Raises:
        UsageError: the folder is not one that this package wrote.
    """
    try:
        section: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))[
            "quantization_config"
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder} is not a folder that compress wrote: {error}") from error
    if section.get("quant_method") != METHOD:
        raise UsageError(f"{folder} was compressed by {section.get('quant_method')}, not by this package")
    return section


def open_packed(folder: Path, dtype: torch.dtype | None = None) -> PackedFolder:
    """A finished folder; reads headers, no weight.

    Args:
        folder: OUT.
        dtype: what its pipeline computed in; by default what config.json says.

    Raises:
        UsageError: not a folder that this package wrote.
        CheckpointError: a damaged file.
    """
    from compress.runtime.register import CompressConfig, add_biases

    section = CompressConfig(**read_quantization(folder))
    config = loading.read_config(folder)
    model = loading.build(config)
    add_biases(model, section.added_biases)
    graph = graphs.find(model)
    source = FolderSource(folder, WEIGHTS)
    committed = {name: Packed(folder / WEIGHTS, name, spec) for name, spec in section.specs().items()}
    unknown = sorted(committed.keys() - {s.name for s in graph.sites})
    if unknown:
        raise UsageError(f"{folder}: config.json packs {unknown[0]}, which its model does not have")
    configured = getattr(config, "dtype", None)
    found = dtype or (configured if isinstance(configured, torch.dtype) else torch.float32)
    return PackedFolder(folder, Artifact(graph, source, dict(graph.tied), {**committed}), found)


def specs_in(made: PackedFolder) -> dict[str, Spec]:
    """The spec of every packed site."""
    return {name: done.spec for name, done in made.artifact.committed.items() if isinstance(done, Packed)}


def added_in(made: PackedFolder) -> list[str]:
    """Layers that were given a bias."""
    return list(read_quantization(made.folder).get("added_biases", []))
