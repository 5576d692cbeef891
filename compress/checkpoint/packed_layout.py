"""The Hugging Face folder: packed weights in one safetensors file, written and checked tensor by tensor."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint.artifact import Packed
from compress.checkpoint.sources import WrittenSource
from compress.encodings import Spec, Weight, pack, spec_of
from compress.encodings.format import METHOD, WEIGHTS
from compress.io.atomic import write_json, writing
from compress.io.safetensors_file import compare_tensors, size_of_file, write_tensors
from compress.lazy import torch
from compress.models.changed_settings import changed
from compress.models.companions import copy_companions

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from compress.checkpoint.artifact import Artifact
    from compress.io.safetensors_file import Entry
    from compress.progress import Bars


def entries(artifact: Artifact) -> Iterator[tuple[str, list[Entry]]]:
    """(tensor or site name, its stored tensors): parameters in the model's order, tied ones once, then buffers.

    Then come scales of caches, by attention layer, and last tensors that the model has no place for, under the names
    that they have in the source.
    """
    for name, _ in artifact.graph.tensors():
        sites = artifact.made_sites(name)
        if name in artifact.graph.tied or (artifact.added(name) and name not in artifact.vectors):
            continue
        if sites:
            for owner in (site.name for site in sites):
                leaves = spec_at(artifact, owner).tensors()
                yield owner, [(f"{owner}.{leaf}", shape, dtype) for leaf, (shape, dtype) in leaves.items()]
        elif name in artifact.vectors:
            size = spec_at(artifact, name).shape[1]
            yield name, [(name, (size,), artifact.vector_dtype(name))]
        else:
            stored = artifact.name_in_source(name)
            yield name, [(name, artifact.source.shape(stored), artifact.source.dtype(stored))]
    for name, grid in artifact.caches.items():
        yield name, [(f"{name}.{leaf}", shape, dtype) for leaf, (shape, dtype) in grid.form.tensors().items()]
    for name in artifact.carried:
        yield name, [(name, artifact.source.shape(name), artifact.source.dtype(name))]


def spec_at(artifact: Artifact, name: str) -> Spec:
    """The spec of a committed site or vector, or of an expert that no pass made anything of beside one that it did."""
    done = artifact.committed.get(name) or artifact.vectors.get(name)
    if done is None:
        site = artifact.sites[name]
        return Spec(site.shape, value_dtype=str(artifact.store_dtype(site)).removeprefix("torch."))
    return done.spec if isinstance(done, Packed) else spec_of(done)


def packed_sites(artifact: Artifact) -> list[str]:
    """Every site that is written in the packed layout: those that are committed, and the experts beside them."""
    parameters = dict.fromkeys(artifact.sites[name].parameter for name in artifact.committed)
    return sorted(site.name for parameter in parameters for site in artifact.sites_of(parameter))


def stored_bytes(artifact: Artifact) -> int:
    """Bytes of all weights as they would be written now."""
    return sum(
        torch.Size(shape).numel() * dtype.itemsize for _, parts in entries(artifact) for _, shape, dtype in parts
    )


def forecast_size(artifact: Artifact, specs: Mapping[str, Spec]) -> int:
    """Bytes of the file of weights if sites were stored like this: site -> its spec; exact, with the header."""
    made: dict[str, Weight | Packed] = {name: Packed(Path(), name, spec) for name, spec in specs.items()}
    layout = entries(replace(artifact, committed={**artifact.committed, **made}))
    return size_of_file([entry for _, parts in layout for entry in parts])


def write_packed(
    artifact: Artifact,
    folder: Path,
    config: dict[str, Any],
    source: Path | None,
    version: str,
    bars: Bars,
    tokenizer: Path | None = None,
) -> None:
    """Write weights, configuration and the source's tokenizer files, or those of `tokenizer`, into `folder`.

    `config` is the source's; entries that passes changed take their place.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with writing(folder / WEIGHTS):
        _write_weights(artifact, folder / WEIGHTS, bars)
    modules = {name: spec_at(artifact, name).to_json() for name in packed_sites(artifact)}
    section: dict[str, Any] = {"quant_method": METHOD, "version": version, "modules": modules}
    added = sorted(name.removesuffix(".bias") for name in artifact.vectors if artifact.added(name))
    if added:
        section["added_biases"] = added
    shared = {n: name for name, site in artifact.sites.items() if name in artifact.committed for n in site.shared}
    if shared:
        section["shared"] = shared
    if artifact.caches:
        section["caches"] = {name: grid.form.to_json() for name, grid in artifact.caches.items()}
    settings = changed(config, artifact.configured, getattr(artifact.graph.model, "config", None))
    write_json({**settings, "quantization_config": section}, folder / "config.json")
    if source:
        copy_companions(source, folder, tokenizer)


def _write_weights(artifact: Artifact, file: Path, bars: Bars) -> None:
    source = artifact.source
    if isinstance(source, WrittenSource) and not _changed(artifact):
        try:  # nothing was changed since: the file gets another name instead of a copy
            file.hardlink_to(source.file)
            return
        except OSError:
            pass
    write_tensors(list(entries(artifact)), partial(stored_tensors, artifact), file, bars, "weights")


def _changed(artifact: Artifact) -> bool:
    return bool(artifact.committed or artifact.vectors or artifact.configured or artifact.caches)


def stored_tensors(artifact: Artifact, owner: str) -> dict[str, Tensor]:
    """The tensors of one entry, by full name."""
    done = artifact.committed.get(owner)
    if owner in artifact.caches:
        return {f"{owner}.{leaf}": value for leaf, value in artifact.caches[owner].tensors().items()}
    if owner in artifact.vectors:
        return {owner: artifact.tensor(owner)}
    if done is None and owner in artifact.sites:
        done = Weight(artifact.original(artifact.sites[owner]))  # an expert beside others that passes worked on
    if done is None:
        return {owner: artifact.source.read(artifact.name_in_source(owner))}
    packed = done.tensors() if isinstance(done, Packed) else pack(done)[1]
    return {f"{owner}.{leaf}": value for leaf, value in packed.items()}


def verify(artifact: Artifact, folder: Path, bars: Bars) -> int:
    """Re-open the written file and compare every tensor with what was meant; returns how many were compared.

    Raises:
        CompressError: a tensor differs.
    """
    layout = list(entries(artifact))
    return compare_tensors(layout, partial(stored_tensors, artifact), folder / WEIGHTS, bars, "weights")
