"""The lazy checkpoint: names, shapes, and values as they stand after the passes so far.

A source (a folder of safetensors, or a module in memory) is never changed. What passes did lies over it, site by site.
Passes read through the artifact; only the manager writes to it.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, apply_renamings

from compress.encodings import Inputs, LowRank, Spec, Weight, unpack
from compress.errors import CheckpointError
from compress.graph import Graph, Site

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
RUNNING = ("running_mean", "running_var")  # without them a batch normalisation is another one


class Source(Protocol):
    """Where the uncompressed values come from."""

    def names(self) -> Iterable[str]:
        """Every tensor's name."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape."""

    def dtype(self, name: str) -> torch.dtype:
        """Its stored type."""

    def read(self, name: str) -> Tensor:
        """Its value, as a tensor of its own."""

    def piece(self, name: str, start: int, stop: int) -> Tensor:
        """Elements of its value, flattened, as a tensor of its own."""

    def fingerprint(self) -> str:
        """Identifies the content."""


class FolderSource:
    """A folder as `save_pretrained` writes it, or one file of a folder, read one tensor at a time.

    Raises:
        CheckpointError: nothing to read, a truncated or corrupt file, an index that points outside its folder.
    """

    def __init__(self, folder: Path, name: str | None = None):
        self.folder = folder
        self._where: dict[str, Path] = {}
        self._meta: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self._begins: dict[Path, dict[str, int]] = {}
        self._files = self._find_files() if name is None else [folder / name]
        for file in self._files:
            for tensor, meta in read_header(file).items():
                if tensor in self._where:
                    raise CheckpointError(f"{file}: tensor {tensor} also stands in {self._where[tensor].name}")
                self._where[tensor] = file
                self._meta[tensor] = meta

    def _find_files(self) -> list[Path]:
        index = self.folder / INDEX
        if not index.is_file():
            single = self.folder / SINGLE
            if single.is_file():
                return [single]
            pickled = sorted(self.folder.glob("*.bin")) + sorted(self.folder.glob("*.pt"))
            hint = f"; {pickled[0].name} is a pickle, which is never loaded: convert it first" if pickled else ""
            raise CheckpointError(f"{self.folder}: no {SINGLE} and no {INDEX}{hint}")
        try:
            named = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            if not named or not all(isinstance(name, str) for name in named):
                raise ValueError("weight_map must map tensor names to file names")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index}: not a safetensors index: {error}") from error
        for name in named:
            if Path(name).name != name:
                raise CheckpointError(f"{index}: names {name!r}, which is outside its folder; refused")
            if not (self.folder / name).is_file():
                raise CheckpointError(f"{index}: names {name}, which does not exist; download or copy it")
        return [self.folder / name for name in named]

    def names(self) -> Iterable[str]:
        return self._where

    def shape(self, name: str) -> tuple[int, ...]:
        return self._meta[name][0]

    def dtype(self, name: str) -> torch.dtype:
        return self._meta[name][1]

    def read(self, name: str) -> Tensor:
        # Opened for one tensor and closed: pages of the mapped file do not pile up in memory.
        with safe_open(self._where[name], "pt") as file:
            value: Tensor = file.get_tensor(name)
            return value.clone()

    def piece(self, name: str, start: int, stop: int) -> Tensor:
        dtype, file = self._meta[name][1], self._where[name]
        if file not in self._begins:
            self._begins[file] = _data_offsets(file)
        found = torch.empty(stop - start, dtype=dtype)
        # Read, not mapped: of a tensor of any size only the piece is in memory.
        with file.open("rb") as opened:
            opened.seek(self._begins[file][name] + start * dtype.itemsize)
            raw: Any = found.view(torch.uint8).numpy()
            if opened.readinto(memoryview(raw)) != raw.nbytes:
                raise CheckpointError(f"{file} ended while it was read; fetch it again")
        return found

    def fingerprint(self) -> str:
        """Of names, sizes, change times, headers and samples of the data: cheap, and different for a changed file."""
        digest = hashlib.sha256()
        for path in self._files:
            stat = path.stat()
            digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
            with path.open("rb") as file:
                for start in range(0, stat.st_size, max(1, stat.st_size // 64)):
                    file.seek(start)
                    digest.update(file.read(4096))
        config = self.folder / "config.json"
        if config.is_file():  # the values of a module of its own class stand alone
            digest.update(config.read_bytes())
        return digest.hexdigest()


class WrittenSource(FolderSource):
    """One file that this run has written: names as in the model, tied ones once, in the order of a result."""

    @property
    def file(self) -> Path:
        """Where it is."""
        return self._files[0]


def read_header(file: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of every tensor of a safetensors file, after checking that the file is whole.

    Raises:
        CheckpointError: truncated, corrupt, or not a safetensors file.
    """
    try:
        with safe_open(file, "pt") as opened:
            found = {}
            for name in opened.keys():  # noqa: SIM118  (not a mapping)
                part = opened.get_slice(name)
                found[name] = (tuple(part.get_shape()), _DTYPES[part.get_dtype()])
            return found
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} does not exist; write or copy the folder again") from error
    except (SafetensorError, OSError) as error:
        size = file.stat().st_size
        raise CheckpointError(f"{file} ({size} bytes) is truncated or corrupt: {error}; fetch it again") from error
    except KeyError as error:
        raise CheckpointError(f"{file}: tensors of type {error} are not supported") from error


def _data_offsets(file: Path) -> dict[str, int]:
    """Where in a safetensors file the bytes of every tensor begin."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
    return {name: 8 + size + e["data_offsets"][0] for name, e in header.items() if name != "__metadata__"}


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class ModuleSource:
    """The parameters and buffers of a module in memory."""

    def __init__(self, module: nn.Module):
        self._values = {**dict(module.named_buffers()), **dict(module.named_parameters())}

    def names(self) -> Iterable[str]:
        return self._values

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._values[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._values[name].dtype

    def read(self, name: str) -> Tensor:
        return self._values[name].detach().clone()

    def piece(self, name: str, start: int, stop: int) -> Tensor:
        return self._values[name].detach().flatten()[start:stop].clone()

    def fingerprint(self) -> str:
        return "in memory"


@dataclass(frozen=True)
class Packed:
    """A weight committed to a file: read when asked for."""

    file: Path
    site: str
    spec: Spec

    def tensors(self) -> dict[str, Tensor]:
        """Its stored tensors."""
        return self._read(self.spec.tensors())

    def load(self) -> Weight:
        """The weight."""
        return unpack(self.spec, self.tensors())

    @property
    def inputs(self) -> Inputs | None:
        """The grid of its inputs; the weight is not read for it."""
        form = self.spec.inputs
        return None if form is None else form.inputs(self._read(form.tensors()))

    @property
    def low_rank(self) -> LowRank | None:
        """Its correction; the weight is not read for it."""
        form = self.spec.low_rank
        return None if form is None else form.low_rank(self._read(form.tensors(self.spec.shape)), self.spec.shape)

    def leaf(self, name: str) -> Tensor:
        """One of its stored tensors."""
        return self._read([name])[name]

    def _read(self, leaves: Iterable[str]) -> dict[str, Tensor]:
        with safe_open(self.file, "pt") as opened:
            return {leaf: opened.get_tensor(f"{self.site}.{leaf}").clone() for leaf in leaves}


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
        configured: entries of the source's configuration that are others now.
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

    def plain(self) -> "Artifact":
        """The same model before every pass."""
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

    def inputs(self, site: str) -> Inputs | None:
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
    source = FolderSource(folder)
    there = set(source.names())
    model = graph.model
    assert isinstance(model, PreTrainedModel)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    # Old spellings that transformers renames while loading, such as GPT-NeoX's embed_out for lm_head.
    renamings = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]
    spelled = {apply_renamings(name, renamings): name for name in source.names()}
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
