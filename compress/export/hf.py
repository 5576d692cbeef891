"""OUT/hf: the compressed model's values in a plain folder, which transformers loads without this package."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from compress.checkpoint.packed_layout import spec_at
from compress.checkpoint.sources import SINGLE
from compress.errors import NonFiniteError
from compress.export.base import Exporter
from compress.export.on_hub import groups_on_hub
from compress.export.refusals import refuse_added, refuse_rounded
from compress.io.atomic import write_json, writing
from compress.io.safetensors_file import compare_tensors, in_range, write_tensors
from compress.io.small_file import read_object
from compress.lazy import torch
from compress.models import loading
from compress.models.companions import copy_companions
from compress.models.graph import forward
from compress.models.logits import logits_in
from compress.models.site import parameter_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from compress.checkpoint.artifact import Artifact
    from compress.encodings import Spec
    from compress.export.base import Logits, PackedFolder
    from compress.io.safetensors_file import Entry
    from compress.models.graph import Graph
    from compress.models.hub_names import Undone
    from compress.models.site import Site
    from compress.progress import Bars


@dataclass(frozen=True)
class Dense:
    """Every weight as it is computed with.

    What is packed is unpacked to float32 and kept in the type the pipeline computes in: the very numbers that were
    measured. All else is kept as the packed folder has it.

    Attributes:
        dtype: of every weight that is packed; None for the narrowest one that surely holds all its values.
        corrected: low-rank corrections are added; without, they are left out.
    """

    artifact: Artifact
    dtype: torch.dtype | None
    corrected: bool = True

    def layout(self) -> list[tuple[str, list[Entry]]]:
        """Parameters in the model's order, tied ones once, then buffers, then what is carried along, each by itself."""
        artifact = self.artifact
        found: list[tuple[str, list[Entry]]] = []
        for name, tensor in artifact.graph.tensors():
            if name not in artifact.graph.tied:
                sites = artifact.made_sites(name)
                dtype = self._dtype(sites) if sites else artifact.source.dtype(artifact.name_in_source(name))
                found.append((name, [(name, tuple(tensor.shape), dtype)]))
        source = artifact.source
        return found + [(name, [(name, source.shape(name), source.dtype(name))]) for name in artifact.carried]

    def read(self, name: str) -> dict[str, Tensor]:
        """One of them, decompressed."""
        sites = self.artifact.made_sites(name)
        if not sites:
            return {name: self.artifact.tensor(name)}
        dtype = self._dtype(sites)
        return {name: parameter_of(sites, (self._matrix(site, dtype) for site in sites), dtype)}

    def _matrix(self, site: Site, dtype: torch.dtype) -> Tensor:
        """(out, in) float32 of a site that is packed."""
        weight = self.artifact.weight(site)
        value = weight.dequantize() if self.corrected else weight.base()
        if not in_range(value, torch.finfo(dtype).max):
            raise NonFiniteError(
                f"{site.place} holds numbers that are too large for {dtype}, which "
                "the pipeline computes in; set `dtype: bfloat16` or `dtype: float32` in the pipeline".replace(
                    "torch.", ""
                )
            )
        return value

    def _dtype(self, sites: Sequence[Site]) -> torch.dtype:
        if self.dtype is not None:
            return self.dtype
        found = {self._narrowest(site) for site in sites}
        return found.pop() if len(found) == 1 else torch.float32

    def _narrowest(self, site: Site) -> torch.dtype:
        spec = spec_at(self.artifact, site.name)
        plain = spec.form is None and spec.low_rank is None
        return getattr(torch, spec.value_dtype) if plain and spec.value_dtype else torch.float32


@dataclass(frozen=True)
class OnHub:
    """The same tensors under the names that the hub has for them, a matrix for each expert of a mixture.

    Where loading those would not give the parameters back, or there are no other names, they are those of the model.
    """

    dense: Dense

    @cached_property
    def groups(self) -> dict[str, Undone]:
        """The parameters that lie together on the hub, by what they are called there; empty without other names."""
        described = {}
        for name, ((_, shape, dtype),) in self.dense.layout():
            if name not in self.dense.artifact.carried:
                described[name] = shape, dtype
        return {group.first: group for group in groups_on_hub(self.dense.artifact.graph, described)}

    def layout(self) -> list[tuple[str, list[Entry]]]:
        """Groups of parameters that lie together, in the model's order; last what is carried along."""
        plain = dict(self.dense.layout())
        if not self.groups:
            return list(plain.items())

        def blank(name: str) -> Tensor:
            ((_, shape, dtype),) = plain[name]
            return torch.empty(shape, dtype=dtype, device="meta")

        found = [
            (first, [(name, tuple(t.shape), t.dtype) for name, t in group.tensors(blank).items()])
            for first, group in self.groups.items()
        ]
        return found + [(name, plain[name]) for name in self.dense.artifact.carried]

    def read(self, owner: str) -> dict[str, Tensor]:
        """The tensors of a group."""
        group = self.groups.get(owner)
        return self.dense.read(owner) if group is None else group.tensors(lambda name: self.dense.read(name)[name])


@dataclass(frozen=True, kw_only=True)
class Hf(Exporter):
    """The decompressed model in a plain folder, which transformers loads without this package."""

    key: ClassVar[str] = "hf"
    files: ClassVar[tuple[str, ...]] = (SINGLE, "config.json")
    used: ClassVar[tuple[str, str]] = (
        "python",
        'from transformers import LOADER\n\nmodel = LOADER.from_pretrained("FOLDER")',
    )

    def refusals(self, graph: Graph, specs: Mapping[str, Spec], added: Collection[str]) -> Iterator[str]:
        yield from refuse_added(graph, added)
        yield from refuse_rounded(specs)

    def expected_bytes(self, spec: Spec, computed: torch.dtype) -> int:
        return spec.shape[0] * spec.shape[1] * computed.itemsize

    def write(self, made: PackedFolder, folder: Path, final: Path, bars: Bars) -> None:
        write_dense(OnHub(Dense(made.artifact, made.dtype)), folder, made.folder, bars, self.key)

    def verify(self, made: PackedFolder, folder: Path, bars: Bars) -> dict[str, Any]:
        return {"tensors_equal": verify_dense(OnHub(Dense(made.artifact, made.dtype)), folder, bars, self.key)}

    def tolerance(self, specs: Mapping[str, Spec]) -> float:
        return 0.0

    def runner(self, made: PackedFolder, folder: Path) -> Logits:
        return loaded(made, folder)


def loaded(made: PackedFolder, folder: Path, dtype: torch.dtype | None = None) -> Logits:
    """A folder that transformers can read, in memory, in the type of the pipeline or another."""
    return running(made, loading.load_model(folder, dtype or made.dtype))


def running(made: PackedFolder, model: Any) -> Logits:
    """What a model of the same class in memory computes."""
    from compress.runtime.linear import unpack_all  # imports torch

    unpack_all(model)
    graph = replace(made.artifact.graph, model=model)

    def logits(inputs: Tensor) -> Tensor:
        with torch.no_grad():
            return logits_in(forward(graph, inputs)).float()

    return logits


def write_dense(dense: Dense | OnHub, folder: Path, source: Path, bars: Bars, heading: str) -> None:
    """Write a plain folder; everything but weights comes from the packed folder `source`."""
    folder.mkdir(parents=True, exist_ok=True)
    with writing(folder / SINGLE):
        write_tensors(dense.layout(), dense.read, folder / SINGLE, bars, heading)
    dtype = dense.dense.dtype if isinstance(dense, OnHub) else dense.dtype
    assert dtype is not None
    write_json(plain_config(source, dtype), folder / "config.json")
    copy_companions(source, folder)


def plain_config(source: Path, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of the packed folder `source` without what is packed, to be loaded in a type."""
    config: dict[str, Any] = read_object(source / "config.json")
    del config["quantization_config"]
    config.pop("torch_dtype", None)  # the old name; a loader would otherwise round once more
    return {**config, "dtype": str(dtype).removeprefix("torch.")}


def verify_dense(dense: Dense | OnHub, folder: Path, bars: Bars, heading: str) -> int:
    """Compare a plain folder with what was meant; returns how many tensors there are."""
    return compare_tensors(dense.layout(), dense.read, folder / SINGLE, bars, heading)
