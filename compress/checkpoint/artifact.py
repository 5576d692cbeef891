"""The lazy checkpoint: names, shapes, and values as they stand after the passes so far.

A source (a folder of safetensors, or a module in memory) is never changed. What passes did lies over it, site by site.
Passes read through the artifact; only the manager writes to it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from compress.checkpoint.coded import coded_bytes, decoded
from compress.encodings import Weight, unpack
from compress.errors import NonFiniteError
from compress.io.safetensors_file import read_tensors
from compress.lazy import torch
from compress.models.site import parameter_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from compress.checkpoint.sources import Source
    from compress.encodings import InputGrid, LowRankFactors, Spec
    from compress.encodings.cache import CacheGrid
    from compress.encodings.rans import CodedForm
    from compress.models.graph import Graph
    from compress.models.site import Site


@dataclass(frozen=True)
class Packed:
    """A weight committed to a file: read when asked for.

    Attributes:
        seal: that the file must bear whenever it is read; empty for one that bears none.
        coded: those of its tensors that the file holds entropy-coded, by name: they are decoded when they are read.
    """

    file: Path
    site: str
    spec: Spec
    seal: str = ""
    coded: Mapping[str, CodedForm] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """Its stored tensors."""
        return self._read(self.spec.tensors())

    def load(self, device: torch.device | None = None) -> Weight:
        """The weight; with `device` it is moved there as it is stored, and unpacked there."""
        found = self.tensors()
        return unpack(self.spec, found if device is None else {name: t.to(device) for name, t in found.items()})

    @property
    def inputs(self) -> InputGrid | None:
        """The grid of its inputs; the weight is not read for it."""
        form = self.spec.inputs
        return None if form is None else form.input_grid(self._read(form.tensors(self.spec.shape[1])))

    @property
    def low_rank(self) -> LowRankFactors | None:
        """Its correction; the weight is not read for it."""
        form = self.spec.low_rank
        return None if form is None else form.low_rank(self._read(form.tensors(self.spec.shape)), self.spec.shape)

    @property
    def num_bytes(self) -> int:
        """What its tensors take in the file."""
        return coded_bytes(self.spec, self.coded)

    def leaf(self, name: str) -> Tensor:
        """One of its stored tensors."""
        return self._read([name])[name]

    def _read(self, leaves: Iterable[str]) -> dict[str, Tensor]:
        names = {f"{self.site}.{leaf}": leaf for leaf in leaves}
        found = {names[name]: value for name, value in read_tensors(self.file, names, self.seal).items()}
        shapes = self.spec.tensors()
        for leaf in found.keys() & self.coded.keys():
            found[leaf] = decoded(self.coded[leaf], found[leaf], shapes[leaf][0], f"{self.file}: {self.site}.{leaf}")
        return found


@dataclass
class Artifact:
    """A model's values by name.

    Attributes:
        graph: the model's blocks and sites.
        source: the uncompressed values.
        renamed: parameter name in the model -> name in the source, where they differ (tied and prefixed names).
        committed: what passes made of each site so far.
        restated: original weights as a pass wrote them anew without changing what the model computes; and biases that
            layers were given, where these count as the original's.
        vectors: parameters that are no site's, such as biases and scales of norms, as passes made them, (1, N) each.
            One that the source does not have is a bias that a layer was given.
        configured: changed entries of the source's configuration, with their new values, as `changed` takes them.
        carried: tensors of the source that the model has no place for, and that stay what they are.
        caches: attention layer -> how it rounds the keys and values that it keeps.
    """

    graph: Graph
    source: Source
    renamed: dict[str, str] = field(default_factory=dict)
    committed: dict[str, Weight | Packed] = field(default_factory=dict)
    restated: dict[str, Weight | Packed] = field(default_factory=dict)
    vectors: dict[str, Weight | Packed] = field(default_factory=dict)
    configured: dict[str, Any] = field(default_factory=dict)
    carried: tuple[str, ...] = ()
    caches: Mapping[str, CacheGrid] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sites = {site.name: site for site in self.graph.sites}
        self._by_parameter: dict[str, list[Site]] = {}
        for site in self.graph.sites:
            self._by_parameter.setdefault(site.parameter, []).append(site)
        tied = ((name, self._by_parameter.get(kept, [])) for name, kept in self.graph.tied.items())
        self._by_parameter |= {name: sites for name, sites in tied if any(s.looked_up or s.shared for s in sites)}
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
        stored = self.name_in_source(site.parameter)
        if site.is_expert:
            return site.of_piece(self.source.piece(stored, *site.piece))
        return site.matrix(self.source.read(stored))

    def plain(self) -> Artifact:
        """The original: the model as it was before any pass, or as the last that made it narrower left it."""
        vectors = {n: v for n, v in self.restated.items() if n not in self.sites}
        return replace(self, committed={}, vectors=vectors, caches={})

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

    def weight(self, site: Site, device: torch.device | None = None) -> Weight:
        """A site as it stands now. `device`: where what is packed is unpacked."""
        done = self.committed.get(site.name)
        if done is not None:
            return done.load(device) if isinstance(done, Packed) else done
        return Weight(self.original(site))

    def inputs(self, site: str) -> InputGrid | None:
        """The grid that a site's inputs are rounded to, as it stands now; its weight is not read."""
        done = self.committed.get(site)
        return None if done is None else done.inputs

    def sites_of(self, parameter: str) -> Sequence[Site]:
        """The sites that lie in a parameter: one, every expert of a fused one, or none."""
        return self._by_parameter.get(parameter, ())

    def made_sites(self, parameter: str) -> Sequence[Site]:
        """All sites that lie in a parameter, where a pass made something of any of them; else none."""
        sites = self.sites_of(parameter)
        return sites if any(site.name in self.committed for site in sites) else ()

    def tensor(self, name: str) -> Tensor:
        """A parameter or buffer as the model takes it, compressed or not; float32 for compressed ones."""
        sites = self.made_sites(name)
        if sites:
            return parameter_of(sites, (self.weight(site).dequantize() for site in sites))
        vector = self.vectors.get(self.graph.tied.get(name, name))
        if vector is not None:
            values = (vector.load() if isinstance(vector, Packed) else vector).values
            assert values is not None
            return values[0]
        if self.added(name):
            return torch.zeros(self.sites[name.removesuffix(".bias")].shape[0], dtype=self.vector_dtype(name))
        return self.source.read(self.name_in_source(name))


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
            f"{site.place}: {bad} of {dense.numel()} weights are NaN or infinite in the source; "
            "the checkpoint is damaged or overflowed its type: get a clean one"
        )
    return dense
