"""The lazy checkpoint: names, shapes, and values as they stand after the passes so far.

A source (a folder of safetensors, or a module in memory) is never changed. What passes did lies over it, site by site.
Passes read through the artifact; only the manager writes to it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from compress.checkpoint.sources import FolderSource
from compress.encodings import Weight, unpack
from compress.errors import CheckpointError, NonFiniteError
from compress.io.safetensors_file import read_tensors
from compress.lazy import torch, transformers

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from torch import Tensor

    from compress.checkpoint.sources import Source
    from compress.encodings import InputGrid, LowRankFactors, Spec
    from compress.models.graph import Graph
    from compress.models.site import Site

RUNNING = ("running_mean", "running_var")  # without them a batch normalisation is another one


@dataclass(frozen=True)
class Packed:
    """A weight committed to a file: read when asked for.

    Attributes:
        seal: that the file must bear whenever it is read; empty for one that bears none.
    """

    file: Path
    site: str
    spec: Spec
    seal: str = ""

    def tensors(self) -> dict[str, Tensor]:
        """Its stored tensors."""
        return self._read(self.spec.tensors())

    def load(self) -> Weight:
        """The weight."""
        return unpack(self.spec, self.tensors())

    @property
    def inputs(self) -> InputGrid | None:
        """The grid of its inputs; the weight is not read for it."""
        form = self.spec.inputs
        return None if form is None else form.input_grid(self._read(form.tensors()))

    @property
    def low_rank(self) -> LowRankFactors | None:
        """Its correction; the weight is not read for it."""
        form = self.spec.low_rank
        return None if form is None else form.low_rank(self._read(form.tensors(self.spec.shape)), self.spec.shape)

    def leaf(self, name: str) -> Tensor:
        """One of its stored tensors."""
        return self._read([name])[name]

    def _read(self, leaves: Iterable[str]) -> dict[str, Tensor]:
        names = {f"{self.site}.{leaf}": leaf for leaf in leaves}
        return {names[name]: value for name, value in read_tensors(self.file, names, self.seal).items()}


@dataclass
class Artifact:
    """A model's values by name.

    Attributes:
        graph: the model's blocks and sites.
        source: the uncompressed values.
        renamed: parameter name in the model -> name in the source, where they differ (tied and prefixed names).
        committed: what passes made of each site so far.
        restated: original weights as a pass wrote them anew without changing what the model computes.
        vectors: parameters that are no site's, such as biases and scales of norms, as passes made them, (1, N) each.
            One that the source does not have is a bias that a layer was given.
        configured: changed entries of the source's configuration, with their new values.
    """

    graph: Graph
    source: Source
    renamed: dict[str, str] = field(default_factory=dict)
    committed: dict[str, Weight | Packed] = field(default_factory=dict)
    restated: dict[str, Weight | Packed] = field(default_factory=dict)
    vectors: dict[str, Weight | Packed] = field(default_factory=dict)
    configured: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sites = {site.name: site for site in self.graph.sites}
        self._by_parameter = {site.parameter: site for site in self.graph.sites}
        self.stored = set(self.source.names())

    def name_in_source(self, parameter: str) -> str:
        """Where a parameter's uncompressed value stands."""
        return self.renamed.get(parameter, parameter)

    def original(self, site: Site) -> Tensor:
        """(out, in) as stored in the source, or as it was restated."""
        restated = self.restated.get(site.name)
        if restated is not None:
            values = (restated.load() if isinstance(restated, Packed) else restated).values
            assert values is not None
            return values
        return site.matrix(self.source.read(self.name_in_source(site.parameter)))

    def plain(self) -> Artifact:
        """The model as it was before any pass."""
        return replace(self, committed={}, vectors={})

    def fits(self) -> bool:
        """Whether every value has the shape that the model says."""
        source = self.source
        return all(source.shape(self.name_in_source(n)) == tuple(t.shape) for n, t in self.graph.tensors())

    def added(self, parameter: str) -> bool:
        """Whether a parameter is a bias that a pass gave to a layer without one."""
        site = self.sites.get(parameter.removesuffix(".bias"))
        return site is not None and self.name_in_source(parameter) not in self.stored

    def store_dtype(self, site: Site) -> torch.dtype:
        """The type that new dense values of a site are kept in: the source's."""
        return self.source.dtype(self.name_in_source(site.parameter))

    def vector_dtype(self, parameter: str) -> torch.dtype:
        """The type that a vector is kept in: the source's, or that of the layer whose bias it is."""
        if self.added(parameter):
            return self.store_dtype(self.sites[parameter.removesuffix(".bias")])
        return self.source.dtype(self.name_in_source(parameter))

    def weight(self, site: Site) -> Weight:
        """A site as it stands now."""
        done = self.committed.get(site.name)
        if done is not None:
            return done.load() if isinstance(done, Packed) else done
        return Weight(self.original(site))

    def inputs(self, site: str) -> InputGrid | None:
        """The grid that a site's inputs are rounded to, as it stands now; its weight is not read."""
        done = self.committed.get(site)
        return None if done is None else done.inputs

    def made_site(self, parameter: str) -> Site | None:
        """The site whose weight a parameter is, where a pass made something of it."""
        site = self._by_parameter.get(parameter)
        return site if site is not None and site.name in self.committed else None

    def tensor(self, name: str) -> Tensor:
        """A parameter or buffer as the model takes it, compressed or not; float32 for compressed ones."""
        site = self.made_site(name)
        if site is not None:
            return site.value(self.weight(site).dequantize())
        vector = self.vectors.get(name)
        if vector is not None:
            values = (vector.load() if isinstance(vector, Packed) else vector).values
            assert values is not None
            return values[0]
        if self.added(name):
            return torch.zeros(self.sites[name.removesuffix(".bias")].shape[0], dtype=self.vector_dtype(name))
        return self.source.read(self.name_in_source(name))


def open_folder(folder: Path, graph: Graph) -> Artifact:
    """A folder's weights matched with the model its configuration describes.

    Raises:
        CheckpointError: names or shapes do not fit the model.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    source = FolderSource(folder)
    there = set(source.names())
    model = graph.model
    assert isinstance(model, transformers.PreTrainedModel)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    # Old spellings that transformers renames while loading, such as GPT-NeoX's embed_out for lm_head.
    renamings = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]
    spelled = {_transformers_name(name, renamings): name for name in source.names()}
    tied: dict[str, list[str]] = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        tied.setdefault(graph.tied.get(name, name), []).append(name)
    tied.update((name, [name]) for name in graph.buffers)
    shapes = {name: tuple(tensor.shape) for name, tensor in graph.tensors()}
    renamed, missing, absent = {}, [], []
    for names in tied.values():
        spellings = [s for n in names for s in (n, n.removeprefix(prefix), prefix + n)]
        stored = next((s for s in spellings if s in there), None) or next(
            (spelled[s] for s in spellings if s in spelled), None
        )
        if stored is None:
            if names[0] in graph.buffers and not names[0].endswith(RUNNING):
                absent.append(names[0])  # as the model computes it; batch counts are read by nothing but training
            else:
                missing.append(names[0])
            continue
        shape = shapes[names[0]]
        if source.shape(stored) != shape:
            raise CheckpointError(
                f"{folder}: {stored} has shape {source.shape(stored)}, but config.json says {shape}; "
                "the configuration belongs to another model"
            )
        renamed.update({n: stored for n in names if n != stored})
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} parameters or buffers of {type(model).__name__} are not in the files, such as "
            f"{missing[0]} (the files have, for example, {min(there)}); "
            "load it with transformers and save it again with save_pretrained"
        )
    _refuse_more_blocks(folder, graph, there)
    graph = replace(graph, buffers=tuple(name for name in graph.buffers if name not in absent))
    return Artifact(graph, source, renamed)


def _transformers_name(name: str, renamings: Iterable[Any]) -> str:
    """The name that transformers looks for, every renaming applied in turn."""
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name


def _refuse_more_blocks(folder: Path, graph: Graph, stored: set[str]) -> None:
    """A configuration with fewer blocks than the files would silently drop the rest."""
    # A block may lie in a list that lies in a list: stages.0.layers.1.
    parts = [name.split(".") for name in graph.blocks]
    known = {".".join(p[: i + 1]) for p in parts for i, part in enumerate(p) if part.isdigit()}
    lists = {name.rpartition(".")[0] for name in known}
    for name in sorted(stored):
        for prefix in lists:
            tail = name.removeprefix(f"{prefix}.")
            block = f"{prefix}.{tail.split('.')[0]}"
            if prefix and tail != name and tail.split(".")[0].isdigit() and block not in known:
                raise CheckpointError(
                    f"{folder}: {name} belongs to block {block}, but config.json describes only {len(graph.blocks)} "
                    "blocks; the rest would be dropped. Correct the number of layers in config.json"
                )


def finite_weight(site: Site, weight: Weight) -> Tensor:
    """A site's weight as (out, in) float32.

    Raises:
        NonFiniteError: it holds NaN or infinity, which can only come from the source.
    """
    dense = weight.dequantize()
    # A sum is NaN or infinite if any term is: one pass, nothing the size of the weight is made.
    if not torch.isfinite(dense.sum()) and not torch.isfinite(dense).all():
        bad = int((~torch.isfinite(dense)).sum())
        raise NonFiniteError(
            f"{site.parameter}: {bad} of {dense.numel()} weights are NaN or infinite in the source; "
            "the checkpoint is damaged or overflowed its type: get a clean one"
        )
    return dense
