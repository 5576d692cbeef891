"""OUT/compressed-tensors: uniform codes as the compressed-tensors library keeps them, in a plain transformers folder.

Format `pack-quantized`: the codes of a row are one little-endian bit stream, as in `encodings/bits.py`, filled up to
whole 32-bit words. Zero points are packed the same way, but along the rows.

The library multiplies in the type of the scales. Unless told to `dequantize`, transformers first turns them into the
type of the model; told to, it takes them as they are stored. But then it also takes the first layer's setting for all
layers; and otherwise it cannot read zero points. So zero points are kept only where all layers have one scheme.
"""

from __future__ import annotations

import re
from collections import defaultdict
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import cached_property
from io import StringIO
from typing import TYPE_CHECKING, Any, ClassVar

from compress.checkpoint.sources import SINGLE
from compress.encodings.bits import pack_bits, row_bytes
from compress.export.base import (
    Exporter,
    refuse_added,
    refuse_experts,
    refuse_missing,
    refuse_shared,
    refuse_tables,
)
from compress.export.hf import Dense, loaded, plain_config, refuse_rounded
from compress.export.packed import specs_in
from compress.io.atomic import write_json, writing
from compress.io.safetensors_file import compare_tensors, write_tensors
from compress.lazy import nn, torch
from compress.models.companions import copy_companions

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    from compress.encodings import Form, Spec
    from compress.export.base import Logits, PackedFolder
    from compress.io.safetensors_file import Entry
    from compress.models.graph import Graph
    from compress.progress import Bars

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
MOST_BITS = 8


@dataclass(frozen=True)
class Scheme:
    """What readers are told about a layer.

    Attributes:
        bits: of a code in the file.
        symmetric: codes count from the middle one, and there are no zero points.
        group_size: columns that share a scale; None where each row has one.
    """

    bits: int
    symmetric: bool
    group_size: int | None

    def to_json(self) -> dict[str, Any]:
        """The entry `weights` of a config group."""
        strategy = "group" if self.group_size else "channel"
        return {"num_bits": self.bits, "type": "int", "symmetric": self.symmetric, "strategy": strategy,
                "group_size": self.group_size}  # fmt: skip


def schemes(specs: Mapping[str, Spec]) -> dict[str, Scheme]:
    """How every layer whose codes count steps is kept.

    Among layers of several settings, distances from the zero point are kept in the place of codes, in one more bit.
    """
    found = {name: _own(spec, spec.form) for name, spec in specs.items() if spec.form is not None and spec.form.steps}
    if len(set(found.values())) <= 1:
        return found
    return {n: s if s.symmetric else Scheme(s.bits + 1, True, s.group_size) for n, s in found.items()}


def _own(spec: Spec, form: Form) -> Scheme:
    tables = form.tables(spec.shape)
    groups = tables["scale"][0][1]
    return Scheme(form.bits, "zero_point" not in tables, spec.shape[1] // groups if groups > 1 else None)


@dataclass(frozen=True)
class Packing:
    """The tensors of the file: codes where there are any, dense values elsewhere."""

    made: PackedFolder

    @cached_property
    def schemes(self) -> dict[str, Scheme]:
        """The scheme of every layer with codes, by name."""
        return schemes(specs_in(self.made))

    @property
    def dense(self) -> Dense:
        """All layers without codes."""
        return Dense(self.made.artifact, None)

    @property
    def dequantized(self) -> bool:
        """Whether layers are unpacked while they are loaded, in the type of their scales."""
        return any(not s.symmetric for s in self.schemes.values())

    def layout(self) -> list[tuple[str, list[Entry]]]:
        """The entries of each layer, in the model's order."""
        found = []
        for owner, parts in self.dense.layout():
            name = owner.removesuffix(".weight")
            found.append((name, self._entries(name)) if name in self.schemes else (owner, parts))
        return found

    def _entries(self, name: str) -> list[Entry]:
        scheme, spec = self.schemes[name], specs_in(self.made)[name]
        rows, columns = spec.shape
        (_, groups), stored = spec.tensors()["scale"]
        scale_dtype = torch.float32 if self.dequantized else stored
        found: list[Entry] = [
            (f"{name}.weight_packed", (rows, _words(columns, scheme.bits)), torch.int32),
            (f"{name}.weight_scale", (rows, groups), scale_dtype),
            (f"{name}.weight_shape", (2,), torch.int64),
        ]
        if not scheme.symmetric:
            found.append((f"{name}.weight_zero_point", (_words(rows, scheme.bits), groups), torch.int32))
        return found

    def read(self, owner: str) -> dict[str, Tensor]:
        """The tensors of one entry of the layout."""
        if owner not in self.schemes:
            return self.dense.read(owner)
        encoding = self.made.artifact.weight(self.made.artifact.sites[owner]).encoding
        assert encoding is not None
        scheme, codes, rows, lookup = self.schemes[owner], encoding.codes, len(encoding.codes), encoding.lookup()
        assert lookup.scale is not None
        scale, zero = lookup.scale.as_stored().expand(rows, -1), lookup.steps_from().expand(rows, -1)
        if scheme.bits > encoding.form.bits:
            codes = (lookup.units(codes) + 2 ** (scheme.bits - 1)).to(torch.uint8)
        found = {
            "weight_packed": _packed_words(codes, scheme.bits),
            "weight_scale": scale.float() if self.dequantized else scale,
            "weight_shape": torch.tensor(codes.shape),
        }
        if not scheme.symmetric:
            found["weight_zero_point"] = _packed_words(zero.T.contiguous(), scheme.bits).T
        return {f"{owner}.{leaf}": value for leaf, value in found.items()}

    def config(self) -> dict[str, Any]:
        """`quantization_config`."""
        alike: dict[Scheme, list[str]] = defaultdict(list)
        for name, scheme in self.schemes.items():
            alike[scheme].append(f"re:{re.escape(name)}$")
        linear = (name for name, module in self.made.artifact.graph.model.named_modules() if type(module) is nn.Linear)
        found = {
            "quant_method": METHOD,
            "format": FORMAT,
            "quantization_status": "compressed",
            "ignore": [name for name in linear if name not in self.schemes],
            "config_groups": {
                f"group_{i}": {
                    "targets": targets,
                    "weights": scheme.to_json(),
                    "input_activations": None,
                    "output_activations": None,
                    "format": FORMAT,
                }
                for i, (scheme, targets) in enumerate(alike.items())
            },
        }
        return {**found, "dequantize": True} if self.dequantized else found


def _words(count: int, bits: int) -> int:
    return -(-row_bytes(count, bits) // 4)


def _packed_words(codes: Tensor, bits: int) -> Tensor:
    """(R, N) uint8 codes -> (R, W) int32."""
    packed = pack_bits(codes, bits)
    filled = packed.new_zeros(len(packed), 4 * _words(codes.shape[1], bits))
    filled[:, : packed.shape[1]] = packed
    return filled.view(torch.int32)


@dataclass(frozen=True, kw_only=True)
class CompressedTensors(Exporter):
    """Uniform codes in the format of the compressed-tensors library, which transformers loads with it."""

    key: ClassVar[str] = METHOD
    files: ClassVar[tuple[str, ...]] = (SINGLE, "config.json")
    computes: ClassVar[str | None] = "float32"

    def refusals(self, graph: Graph, specs: Mapping[str, Spec], added: Collection[str]) -> Iterator[str]:
        yield from refuse_missing("compressed_tensors", METHOD)
        yield from refuse_added(graph, added)
        yield from refuse_rounded(specs)
        coded = {name: spec for name, spec in specs.items() if spec.form is not None}
        if not coded:
            yield "no layer has codes, so there is nothing to pack; quantize with rtn or gptq, or export hf"
        others = [name for name, spec in coded.items() if name not in schemes(specs)]
        if others:
            form = coded[others[0]].form
            assert form is not None
            yield (
                f"{FORMAT} holds uniform codes only, and {len(others)} layers have others, such as {others[0]} "
                f"({form.family}); use a uniform quantizer such as rtn or gptq, or export hf"
            )
        corrected = [name for name, spec in coded.items() if spec.low_rank is not None]
        if corrected:
            yield (
                f"{FORMAT} has no place for low-rank corrections, and {len(corrected)} layers have one, such as "
                f"{corrected[0]}; leave eora out, or export peft or hf"
            )
        yield from refuse_experts(graph, coded, FORMAT)
        yield from refuse_shared(graph, coded, "compressed-tensors")
        yield from refuse_tables(graph, coded, "transformers reads no packed embeddings of compressed-tensors")
        modules = dict(graph.model.named_modules())
        tables = {site.name for site in graph.sites if site.looked_up}
        layers = [name for name in coded if name in modules and name not in tables]
        strange = [name for name in layers if type(modules[name]) is not nn.Linear]
        if strange:
            kind = type(modules[strange[0]]).__name__
            yield (
                f"the library packs Linear layers only, and {len(strange)} layers are not, such as {strange[0]} "
                f"({kind}); `exclude` them in the quantizer, or export hf"
            )
        low = [
            name for name, scheme in schemes(specs).items()
            if not scheme.symmetric and scheme.group_size and _words(specs[name].shape[0], scheme.bits) == 1
        ]  # fmt: skip
        if low:
            yield (
                f"the library cannot read the zero points of layers with as few rows as {low[0]} "
                f"({specs[low[0]].shape[0]}; {len(low)} in all); set symmetric: true, or `exclude` them there"
            )
        wide = [name for name, scheme in schemes(specs).items() if scheme.bits > MOST_BITS]
        if wide:
            yield (
                f"asymmetric codes of {MOST_BITS} bits, such as those of {wide[0]}, can be read only if all layers "
                "have the same bits, groups and symmetry; use one setting for all layers, or symmetric: true"
            )

    def write(self, made: PackedFolder, folder: Path, final: Path, bars: Bars) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        packing = Packing(made)
        with writing(folder / SINGLE):
            write_tensors(packing.layout(), packing.read, folder / SINGLE, bars, self.key)
        config = plain_config(made.folder, made.dtype)
        write_json({**config, "quantization_config": packing.config()}, folder / "config.json")
        copy_companions(made.folder, folder)

    def verify(self, made: PackedFolder, folder: Path, bars: Bars) -> dict[str, Any]:
        packing = Packing(made)
        return {"tensors_equal": compare_tensors(packing.layout(), packing.read, folder / SINGLE, bars, self.key)}

    def tolerance(self, specs: Mapping[str, Spec]) -> float:
        return 1e-5

    def runner(self, made: PackedFolder, folder: Path) -> Logits:
        return _unpacked_model(made, folder, torch.float32)

    def shipped(self, made: PackedFolder, folder: Path) -> Logits | None:
        return None if made.dtype == torch.float32 else _unpacked_model(made, folder, made.dtype)


def _unpacked_model(made: PackedFolder, folder: Path, dtype: torch.dtype) -> Logits:
    """The folder in memory. Layers are unpacked in the first pass, under progress bars of the library's own."""
    with redirect_stderr(StringIO()):
        logits = loaded(made, folder, dtype)
        logits(torch.zeros(1, 1, dtype=torch.long))
    return logits
