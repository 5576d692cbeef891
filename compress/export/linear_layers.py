"""Folders of linear layers whose codes lie in 32-bit words: what the layouts of GPTQ, AWQ and MLX have in common.

A layer with codes is a few tensors in the place of its weight. Everything else is dense, in its own type. Names are
those of the hub. Layers are read back by other code than packed them, and must have the packed model's very values.

Shapes: O = out features, I = in features, G = groups of columns.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from compress.checkpoint.sources import SINGLE
from compress.errors import CompressError
from compress.export.base import Exporter
from compress.export.hf import Dense, OnHub, plain_config
from compress.export.on_hub import dense_layers, layers_on_hub
from compress.export.pack_quantized import Steps
from compress.export.packed import specs_in
from compress.export.refusals import (
    refuse_added,
    refuse_corrected,
    refuse_experts,
    refuse_other_codes,
    refuse_other_layers,
    refuse_rounded,
    refuse_shared,
    refuse_uncoded,
)
from compress.io.atomic import write_json, writing
from compress.io.safetensors_file import compare_tensors, read_header, read_tensor, write_tensors
from compress.lazy import torch
from compress.models.companions import copy_companions

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    from compress.encodings import Spec
    from compress.export.base import PackedFolder
    from compress.export.pack_quantized import Scheme
    from compress.io.safetensors_file import Entry
    from compress.models.graph import Graph
    from compress.progress import Bars

    Leaves = dict[str, tuple[tuple[int, ...], torch.dtype]]  # shape and type of each tensor of a layer


FITS = 128  # columns that may share a scale in each of them


@dataclass(frozen=True, kw_only=True)
class LinearLayers(Exporter):
    """A folder in which each linear layer with codes is a few tensors.

    Attributes:
        title: what messages call the layout.
        widths: bits that codes may have.
        group_sizes: columns that may share a scale, where not all of a row do.
    """

    files: ClassVar[tuple[str, ...]] = (SINGLE, "config.json")
    title: ClassVar[str]
    widths: ClassVar[tuple[int, ...]]
    group_sizes: ClassVar[tuple[int, ...]]

    @abstractmethod
    def schemes(self, specs: Mapping[str, Spec]) -> dict[str, Scheme]:
        """How every matrix whose codes count steps is kept, whether it fits or not."""

    @abstractmethod
    def leaves(self, spec: Spec, scheme: Scheme) -> Leaves:
        """What a layer consists of."""

    @abstractmethod
    def packed(self, scheme: Scheme, steps: Steps) -> dict[str, Tensor]:
        """The tensors of a layer.

        Raises:
            CompressError: zero points that the layout cannot hold.
        """

    @abstractmethod
    def unpacked(self, scheme: Scheme, there: Mapping[str, Tensor]) -> Tensor:
        """(O, I) float32 of a layer that was read, by the words of the layout alone."""

    @abstractmethod
    def sections(self, contents: Contents) -> dict[str, Any]:
        """What config.json has beside the model's own."""

    def misfits(self, graph: Graph, specs: Mapping[str, Spec]) -> Iterator[str]:
        """Why layers do not fit whose codes count steps. `specs`: of those layers."""
        schemes = self.schemes(specs)
        wrong = [name for name, scheme in schemes.items() if scheme.bits not in self.widths]
        if wrong:
            bits = schemes[wrong[0]].bits
            fits = next((width for width in self.widths if width >= bits), self.widths[-1])
            yield (
                f"{self.title} has codes of {among(self.widths)} bits, and {len(wrong)} layers have others, such as "
                f"{wrong[0]} ({bits}); set bits: {fits}, or `exclude` them in the quantizer"
            )
        wrong = [name for name, scheme in schemes.items() if scheme.group_size not in (None, *self.group_sizes)]
        if wrong:
            yield (
                f"{self.title} has a scale for each row or for {among(self.group_sizes)} columns, and {len(wrong)} "
                f"layers have one for another number, such as {wrong[0]} ({schemes[wrong[0]].group_size}); set "
                f"group_size: {FITS}, or another of these, or `exclude` them in the quantizer"
            )

    def refusals(self, graph: Graph, specs: Mapping[str, Spec], added: Collection[str]) -> Iterator[str]:
        coded = {name: spec for name, spec in specs.items() if spec.form is not None}
        steps = {name: spec for name, spec in coded.items() if spec.form is not None and spec.form.steps}
        yield from refuse_added(graph, added)
        yield from refuse_rounded(specs)
        yield from refuse_uncoded(coded)
        yield from refuse_other_codes({name: coded[name] for name in coded if name not in steps}, self.title)
        yield from refuse_corrected(coded, self.title)
        yield from refuse_experts(graph, coded, self.title)
        yield from refuse_shared(graph, coded, self.title)
        yield from refuse_other_layers(graph, coded, self.title)
        yield from self.misfits(graph, steps)

    def expected_bytes(self, spec: Spec, computed: torch.dtype) -> int:
        scheme = self.schemes({"": spec}).get("")
        if scheme is None:
            return super().expected_bytes(spec, computed)
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.leaves(spec, scheme).values())

    def write(self, made: PackedFolder, folder: Path, final: Path, bars: Bars) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        contents = Contents(made, self)
        with writing(folder / SINGLE):
            write_tensors(contents.layout(), contents.read, folder / SINGLE, bars, self.key)
        config = plain_config(made.folder, made.dtype)
        write_json({**config, **self.sections(contents)}, folder / "config.json")
        copy_companions(made.folder, folder)

    def verify(self, made: PackedFolder, folder: Path, bars: Bars) -> dict[str, Any]:
        file, contents = folder / SINGLE, Contents(made, self)
        dense = [(owner, entries) for owner, entries in contents.layout() if owner not in contents.schemes]
        count, header = compare_tensors(dense, contents.read, file, bars, self.key), read_header(file).tensors
        schemes = contents.schemes
        for name, scheme in bars.over(schemes.items(), len(schemes), f"unpack: {self.key}"):
            there = {}
            for entry, shape, dtype in contents.entries(name):
                stored = header.get(entry)
                if stored is None or (stored.shape, stored.dtype) != (shape, dtype):
                    raise _differs(file, entry)
                there[entry.rpartition(".")[2]] = read_tensor(file, stored)
            weight = made.artifact.weight(made.artifact.sites[name])
            if not torch.equal(self.unpacked(scheme, there), weight.base()):
                raise _differs(file, contents.called[name])
            count += len(there)
        return {"tensors_equal": count}


@dataclass(frozen=True)
class Contents:
    """The tensors of the file: those of the layout where a layer has codes, dense values elsewhere."""

    made: PackedFolder
    exporter: LinearLayers

    @cached_property
    def specs(self) -> dict[str, Spec]:
        """The spec of every packed matrix, by name."""
        return specs_in(self.made)

    @cached_property
    def schemes(self) -> dict[str, Scheme]:
        """How every layer with codes is kept, by its name in the model."""
        return self.exporter.schemes(self.specs)

    @cached_property
    def plain(self) -> OnHub:
        """Everything as it is without codes."""
        return OnHub(Dense(self.made.artifact, None))

    @cached_property
    def called(self) -> dict[str, str]:
        """What layers with codes are called in the file, by their names in the model."""
        return layers_on_hub(self.schemes, self.plain.groups.values())

    def dense(self) -> list[str]:
        """Layers without codes, by all their names."""
        named = layers_on_hub(dense_layers(self.made.artifact.graph, self.schemes), self.plain.groups.values())
        return distinct(each for pair in named.items() for each in pair)

    def head(self) -> str | None:
        """The layer that makes the logits, where the model says so."""
        model: Any = self.made.artifact.graph.model
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        return next((name for name, module in model.named_modules() if module is head), None)

    def entries(self, name: str) -> list[Entry]:
        """What stands in the file of a layer with codes."""
        leaves = self.exporter.leaves(self.specs[name], self.schemes[name])
        return [(f"{self.called[name]}.{leaf}", shape, dtype) for leaf, (shape, dtype) in leaves.items()]

    def layout(self) -> list[tuple[str, list[Entry]]]:
        """The entries of each layer and of everything else, in the model's order."""
        artifact, groups = self.made.artifact, self.plain.groups
        alone = dict(self.plain.dense.layout())
        found = []
        for owner, parts in self.plain.layout():
            names = groups[owner].names if owner in groups else (owner,)
            coded = {n: [s.name for s in artifact.made_sites(n) if s.name in self.schemes] for n in names}
            if not any(coded.values()):
                found.append((owner, parts))
                continue
            for name in names:  # what lies together on the hub and has codes stands by itself
                found += [(site, self.entries(site)) for site in coded[name]] or [(name, alone[name])]
        return found

    def read(self, owner: str) -> dict[str, Tensor]:
        """The tensors of one entry of the layout.

        Raises:
            CompressError: zero points that the layout cannot hold.
        """
        if owner not in self.schemes:
            return self.plain.read(owner)
        scheme, encoding = self.schemes[owner], self.made.artifact.weight(self.made.artifact.sites[owner]).encoding
        assert encoding is not None
        steps = Steps.of(encoding, scheme.groups(encoding.codes.shape[1]))
        try:
            leaves = self.exporter.packed(scheme, steps)
        except CompressError as error:
            raise CompressError(f"{owner}: {error}") from error
        return {f"{self.called[owner]}.{leaf}": value for leaf, value in leaves.items()}


def among(numbers: Iterable[int]) -> str:
    """Numbers in words: 2, 3 or 4."""
    *first, last = map(str, numbers)
    return f"{', '.join(first)} or {last}" if first else last


def distinct(names: Iterable[str]) -> list[str]:
    """Each name once, in order."""
    return list(dict.fromkeys(names))


def _differs(file: Path, name: str) -> CompressError:
    return CompressError(f"{file}: {name} reads back differently; the disk may be failing")
