"""A finished packed folder, opened again: what every other container is made from."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from compress.checkpoint.artifact import Artifact, Packed
from compress.checkpoint.coded import stored_shapes
from compress.checkpoint.matching import RUNNING, ignored
from compress.checkpoint.opening import fitting_config
from compress.checkpoint.packed_layout import spec_at
from compress.checkpoint.sources import FolderSource
from compress.encodings.cache import SCALES, CacheGrid
from compress.encodings.format import METHOD, WEIGHTS
from compress.errors import CheckpointError, UsageError
from compress.export.base import PackedFolder
from compress.io.safetensors_file import read_header, refuse_other_tensors
from compress.io.small_file import read_object
from compress.lazy import torch
from compress.models import graph as graphs
from compress.models import loading
from compress.runtime.cache import cached_layers

if TYPE_CHECKING:
    from pathlib import Path

    from compress.checkpoint.sources import Source
    from compress.encodings import Spec
    from compress.encodings.cache import CacheForm
    from compress.runtime.register import CompressConfig


def read_quantization(folder: Path) -> dict[str, Any]:
    """The section of config.json that describes packed weights, every layer's description checked.

    Raises:
        UsageError: the folder is not one that this package wrote.
        CheckpointError: it describes what this version cannot read.
    """
    from compress.runtime.register import CompressConfig

    if not folder.is_dir():
        raise UsageError(f"no such folder: {folder}")
    section = read_object(folder / "config.json").get("quantization_config")
    if not isinstance(section, dict):
        raise UsageError(f"{folder} is not a folder that compress wrote: its config.json describes no packed weights")
    if section.get("quant_method") != METHOD:
        raise UsageError(f"{folder} was compressed by {section.get('quant_method')!r:.100}, not by this package")
    try:
        made = CompressConfig(**section)
        made.forms()
        made.cache_forms()
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder}/config.json: {error}; it is damaged, or was written by a newer version: update, or run again"
        ) from error
    return {**section, "modules": made.modules, "added_biases": made.added_biases}


def packed_layers(folder: Path) -> dict[str, Packed]:
    """Every packed layer of a folder, by name; reads the configuration and the header of the weights alone.

    Raises:
        UsageError: the folder is not one that this package wrote.
        CheckpointError: its weights are not there, or lack a layer that config.json packs.
    """
    from compress.runtime.register import CompressConfig

    section = CompressConfig(**read_quantization(folder))
    found = _layers_of(section, folder / WEIGHTS)
    there = {name: stored.shape for name, stored in read_header(folder / WEIGHTS).tensors.items()}
    wanted: dict[str, tuple[int, ...]] = {}
    for layer, packed in found.items():
        shapes = stored_shapes(packed.spec, packed.coded)
        wanted |= {f"{layer}.{leaf}": shape for leaf, shape in shapes.items()}
    more = {name: shape for name, shape in there.items() if name not in wanted}
    refuse_other_tensors(there, {**wanted, **more}, (), str(folder / WEIGHTS))
    return found


def packed_caches(folder: Path) -> dict[str, CacheForm]:
    """How attention layers of a folder round what they keep, by name; reads the configuration alone.

    Raises:
        UsageError: the folder is not one that this package wrote.
    """
    from compress.runtime.register import CompressConfig

    return CompressConfig(**read_quantization(folder)).cache_forms()


def _layers_of(section: CompressConfig, file: Path) -> dict[str, Packed]:
    coded = section.forms()
    return {name: Packed(file, name, spec, coded=coded.get(name, {})) for name, spec in section.specs().items()}


def _caches_of(section: CompressConfig, source: Source) -> dict[str, CacheGrid]:
    """How attention layers round what they keep; scales that are not there are refused with all other tensors."""
    there = set(source.names())
    forms = {n: form for n, form in section.cache_forms().items() if {f"{n}.{leaf}" for leaf in SCALES} <= there}
    return {name: CacheGrid(form, *(source.read(f"{name}.{leaf}") for leaf in SCALES)) for name, form in forms.items()}


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
    source = FolderSource(folder, WEIGHTS)
    config = fitting_config(folder, source)
    model = loading.build(config)
    add_biases(model, section.added_biases)
    graph = graphs.find(model)
    committed = _layers_of(section, folder / WEIGHTS)
    unknown = sorted(committed.keys() - {s.name for s in graph.sites})
    if unknown:
        raise UsageError(f"{folder}: config.json packs {unknown[0]}, which its model does not have")
    unknown = sorted(section.cache_forms().keys() - cached_layers(model).keys())
    if unknown:
        raise UsageError(f"{folder}: config.json names {unknown[0]} among `caches`, which keeps no keys and values")
    artifact = Artifact(graph, source, dict(graph.tied), {**committed})
    artifact = replace(artifact, caches=_caches_of(section, artifact.source))
    artifact = replace(artifact, carried=_refuse_other_tensors(artifact, folder, section))
    configured = getattr(config, "dtype", None)
    found = dtype or (configured if isinstance(configured, torch.dtype) else torch.float32)
    return PackedFolder(folder, artifact, found)


def _refuse_other_tensors(artifact: Artifact, folder: Path, section: CompressConfig) -> tuple[str, ...]:
    """Refuse a file that lacks a tensor of the model, or holds another; returns those that are carried along."""
    graph = artifact.graph
    wanted: dict[str, tuple[int, ...]] = {}
    for name, tensor in graph.tensors():
        sites = artifact.made_sites(name)
        for site in sites:
            done = artifact.committed.get(site.name)
            coded = done.coded if isinstance(done, Packed) else {}
            shapes = stored_shapes(spec_at(artifact, site.name), coded)
            wanted |= {f"{site.name}.{leaf}": shape for leaf, shape in shapes.items()}
        if not sites and name not in graph.tied:
            wanted[name] = tuple(tensor.shape)
    there = list(artifact.source.names())
    for layer, form in section.cache_forms().items():
        wanted |= {f"{layer}.{leaf}": shape for leaf, (shape, _) in form.tensors().items()}
    carried = ignored(graph.model, [name for name in there if name not in wanted])
    refuse_other_tensors(
        {name: artifact.source.shape(name) for name in there if name not in carried},
        wanted,
        {name for name in graph.buffers if not name.endswith(RUNNING)},
        str(folder / WEIGHTS),
    )
    return carried


def specs_in(made: PackedFolder) -> dict[str, Spec]:
    """The spec of every packed site."""
    return {name: done.spec for name, done in made.artifact.committed.items() if isinstance(done, Packed)}


def added_in(made: PackedFolder) -> list[str]:
    """Layers that were given a bias."""
    return list(read_quantization(made.folder).get("added_biases", []))
