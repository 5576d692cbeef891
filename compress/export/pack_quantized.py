"""The tensors and the configuration of the format `pack-quantized` of the compressed-tensors library.

The codes of a row are one little-endian bit stream, as in `encodings/bits.py`, filled up to whole 32-bit words. Zero
points are packed the same way, but along the rows. Experts are a matrix each, under the names of the hub.

The library multiplies in the type of the scales. Unless told to `dequantize`, transformers first turns them into the
type of the model; told to, it takes them as they are stored. But then it also takes the first layer's setting for all
layers; and otherwise it cannot read zero points. So zero points are kept only where all layers have one scheme.

Layers of floats are in formats of their own beside these: see `float_schemes.py`.

Experts are always unpacked while they are loaded, all with one scheme, without zero points, in the type of their
scales.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from compress.encodings.bits import pack_bits, row_bytes
from compress.export.float_schemes import FloatScheme, float_schemes
from compress.export.hf import Dense, OnHub
from compress.export.on_hub import HubMatrix, dense_layers, layers_on_hub, matrices_on_hub, module_on_hub
from compress.export.packed import specs_in
from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch import Tensor

    from compress.encodings import Encoding, Form, Spec
    from compress.encodings.cache import CacheForm
    from compress.export.base import PackedFolder
    from compress.io.safetensors_file import Entry

METHOD, FORMAT, MIXED = "compressed-tensors", "pack-quantized", "mixed-precision"


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

    format: ClassVar[str] = FORMAT

    def __str__(self) -> str:
        """The scheme in words."""
        share = f"groups of {self.group_size}" if self.group_size else "rows"
        return f"{'symmetric' if self.symmetric else 'asymmetric'} {self.bits} bits in {share}"

    def to_json(self) -> dict[str, Any]:
        """The entry `weights` of a config group."""
        strategy = "group" if self.group_size else "channel"
        return {"num_bits": self.bits, "type": "int", "symmetric": self.symmetric, "strategy": strategy,
                "group_size": self.group_size}  # fmt: skip

    def inputs_json(self) -> None:
        """The entry `input_activations`: they are as they come."""

    @property
    def without_zero_points(self) -> Scheme:
        """Codes that are distances from the zero point, which take one more bit than codes."""
        return self if self.symmetric else Scheme(self.bits + 1, True, self.group_size)

    def groups(self, columns: int) -> int:
        """How many scales a row has."""
        return columns // self.group_size if self.group_size else 1


@dataclass(frozen=True)
class Steps:
    """A layer's codes, and a scale and a zero point of every row for so many columns.

    Attributes:
        codes: (O, I) uint8.
        scale: (O, G), as stored.
        zero: (O, G) uint8.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor

    @classmethod
    def of(cls, encoding: Encoding, groups: int) -> Steps:
        """Codes that count steps; a scale of more columns or rows is repeated. `groups`: G."""
        rows, lookup = len(encoding.codes), encoding.lookup()
        assert lookup.scale is not None
        parts = (lookup.scale.as_stored().expand(rows, -1), lookup.steps_from().expand(rows, -1))
        return cls(encoding.codes, *(part.repeat_interleave(groups // part.shape[1], dim=1) for part in parts))


def schemes(specs: Mapping[str, Spec], experts: Collection[str] = ()) -> dict[str, Scheme]:
    """How every matrix whose codes count steps is kept.

    Among layers of several settings, or beside floats, distances from the zero point are kept in the place of codes, in
    one more bit. So are those of experts always; all of them take as many bits and as narrow groups as any of them
    needs.

    Args:
        specs: of the matrices, by name.
        experts: names of those that are experts.
    """
    found = own_schemes(specs)
    layers = {name: scheme for name, scheme in found.items() if name not in experts}
    if len({*layers.values(), *float_schemes(specs).values()}) > 1:
        layers = {name: scheme.without_zero_points for name, scheme in layers.items()}
    packed = {name: scheme for name, scheme in found.items() if name in experts}
    if packed:
        shared = _shared(packed, specs)
        packed = dict.fromkeys(packed, shared)
    return {name: layers[name] if name in layers else packed[name] for name in found}


def _shared(found: Mapping[str, Scheme], specs: Mapping[str, Spec]) -> Scheme:
    """The scheme that holds the codes of all of them exactly."""
    every = [scheme.without_zero_points for scheme in found.values()]
    grouped = any(scheme.group_size for scheme in every)
    width = math.gcd(*(s.group_size or specs[n].shape[1] for n, s in zip(found, every, strict=True)))
    return Scheme(max(scheme.bits for scheme in every), True, width if grouped else None)


def own_schemes(specs: Mapping[str, Spec]) -> dict[str, Scheme]:
    """The scheme that a matrix whose codes count steps has by itself, of every such matrix."""
    return {name: _own(spec, spec.form) for name, spec in specs.items() if spec.form is not None and spec.form.steps}


def _own(spec: Spec, form: Form) -> Scheme:
    tables = form.tables(spec.shape)
    groups = tables["scale"][0][1]
    return Scheme(form.bits, "zero_point" not in tables, spec.shape[1] // groups if groups > 1 else None)


@dataclass(frozen=True)
class Packing:
    """The tensors of the file: codes where there are any, dense values elsewhere."""

    made: PackedFolder

    @cached_property
    def specs(self) -> dict[str, Spec]:
        """The spec of every packed matrix, by name."""
        return specs_in(self.made)

    @cached_property
    def experts(self) -> set[str]:
        """The names of the experts that have codes."""
        return {site.name for site in self.made.artifact.graph.sites if site.is_expert and site.name in self.specs}

    @cached_property
    def schemes(self) -> dict[str, Scheme | FloatScheme]:
        """The scheme of every matrix with codes, by name."""
        return {**schemes(self.specs, self.experts), **float_schemes(self.specs)}

    @cached_property
    def plain(self) -> Dense | OnHub:
        """Everything as it is without codes; of a mixture with packed experts under the names of the hub."""
        dense = Dense(self.made.artifact, None)
        return OnHub(dense) if self.experts else dense

    @cached_property
    def parts(self) -> dict[str, list[HubMatrix]]:
        """The layers of the file that each matrix with codes becomes: one, or of an expert what the hub has."""
        groups = list(self.plain.groups.values()) if isinstance(self.plain, OnHub) else []
        found = matrices_on_hub(self.made.artifact.graph, groups)
        for name, called in layers_on_hub(self.schemes.keys() - self.experts, groups).items():
            found[name] = [HubMatrix(called, slice(None), self.specs[name].shape[0])]
        return found

    @cached_property
    def dequantized(self) -> bool:
        """Whether layers are unpacked while they are loaded, in the type of their scales."""
        return any(isinstance(s, Scheme) and not s.symmetric for s in self.schemes.values())

    def layout(self) -> list[tuple[str, list[Entry]]]:
        """The entries of each layer, in the model's order."""
        artifact, dense = self.made.artifact, dict(Dense(self.made.artifact, None).layout())
        groups = self.plain.groups if isinstance(self.plain, OnHub) else {}
        found = []
        for owner, parts in self.plain.layout():
            names = groups[owner].names if owner in groups else (owner,)
            coded = [s.name for name in names for s in artifact.made_sites(name) if s.name in self.schemes]
            if coded:
                found += [(name, self._entries(name)) for name in coded]
            elif owner in groups and groups[owner].converter is not None:
                # Of what it puts together transformers reads nothing but codes; whole it reads all.
                found += [(name, dense[name]) for name in names]
            else:
                found.append((owner, parts))
        return found + [(name, self._cache_entries(name)) for name in artifact.caches]

    def _cache_entries(self, layer: str) -> list[Entry]:
        """The scales of a layer's keys and values."""
        groups = self.plain.groups if isinstance(self.plain, OnHub) else {}
        called, form = module_on_hub(layer, groups.values()), self.made.artifact.caches[layer].form
        return [(f"{called}.{leaf}", _cache_shape(form), dtype) for leaf, (_, dtype) in form.tensors().items()]

    def _scale_dtype(self, name: str) -> torch.dtype:
        """Experts, and all where there are zero points, are multiplied in the type of their scales."""
        _, stored = self.specs[name].tensors()["scale"]
        return torch.float32 if self.dequantized or name in self.experts else stored

    def _entries(self, name: str) -> list[Entry]:
        scheme, columns = self.schemes[name], self.specs[name].shape[1]
        if isinstance(scheme, FloatScheme):
            return scheme.entries(self.parts[name][0].name, self.specs[name])
        groups, found = scheme.groups(columns), []
        for part in self.parts[name]:
            found += [
                (f"{part.name}.weight_packed", (part.count, words(columns, scheme.bits)), torch.int32),
                (f"{part.name}.weight_scale", (part.count, groups), self._scale_dtype(name)),
                (f"{part.name}.weight_shape", (2,), torch.int64),
            ]
            if not scheme.symmetric:
                packed = words(part.count, scheme.bits), groups
                found.append((f"{part.name}.weight_zero_point", packed, torch.int32))
        return found

    def read(self, owner: str) -> dict[str, Tensor]:
        """The tensors of one entry of the layout."""
        if owner in self.made.artifact.caches:
            grid = self.made.artifact.caches[owner]
            stored = grid.tensors().values()
            named = zip(self._cache_entries(owner), stored, strict=True)
            return {name: value.view(shape) for (name, shape, _), value in named}
        if owner not in self.schemes:
            return self.plain.read(owner)
        weight, scheme = self.made.artifact.weight(self.made.artifact.sites[owner]), self.schemes[owner]
        encoding = weight.encoding
        assert encoding is not None
        if isinstance(scheme, FloatScheme):
            return scheme.tensors(self.parts[owner][0].name, weight)
        steps = Steps.of(encoding, scheme.groups(encoding.codes.shape[1]))
        codes, scale, zero = steps.codes, steps.scale.to(self._scale_dtype(owner)), steps.zero
        if scheme.bits > encoding.form.bits:
            codes = (encoding.lookup().units(codes) + 2 ** (scheme.bits - 1)).to(torch.uint8)
        found: dict[str, Tensor] = {}
        for part in self.parts[owner]:
            at = part.rows if isinstance(part.rows, slice) else list(part.rows)
            leaves = {
                "weight_packed": packed_words(codes[at], scheme.bits),
                "weight_scale": scale[at],
                "weight_shape": torch.tensor(codes[at].shape),
            }
            if not scheme.symmetric:
                leaves["weight_zero_point"] = packed_words(zero[at].T.contiguous(), scheme.bits).T
            found |= {f"{part.name}.{leaf}": value for leaf, value in leaves.items()}
        return found

    def config(self) -> dict[str, Any]:
        """`quantization_config`."""
        groups = self._targets()
        formats = dict.fromkeys(scheme.format for scheme in groups)
        found = {
            "quant_method": METHOD,
            "format": next(iter(formats)) if len(formats) == 1 else MIXED,
            "quantization_status": "compressed",
            "ignore": self._ignored(),
            "config_groups": {
                f"group_{i}": {
                    "targets": targets,
                    "weights": scheme.to_json(),
                    "input_activations": scheme.inputs_json(),
                    "output_activations": None,
                    "format": scheme.format,
                }
                for i, (scheme, targets) in enumerate(groups.items())
            },
        }
        forms = [grid.form for grid in self.made.artifact.caches.values()]
        if forms:
            found["kv_cache_scheme"] = cache_scheme(forms[0])
        return {**found, "dequantize": True} if self.dequantized else found

    def _targets(self) -> dict[Scheme | FloatScheme, list[str]]:
        """The layers of every scheme: each in full; experts by a pattern, or with all else by what they are.

        The group of the experts is the first, and the only one that speaks of experts: by that transformers knows it.
        """
        alike: dict[Scheme | FloatScheme, list[str]] = defaultdict(list)
        if self.experts and len(set(self.schemes.values())) == 1:
            return {next(iter(self.schemes.values())): ["Linear"]}
        everywhere = all(site.name in self.experts for site in self.made.artifact.graph.sites if site.is_expert)
        patterns = dict.fromkeys(_any(part.name, everywhere) for n in self.experts for part in self.parts[n])
        if self.experts:
            alike[self.schemes[min(self.experts)]] += sorted(patterns)  # all of them have one scheme
        for name, scheme in self.schemes.items():
            if name not in self.experts:
                names = dict.fromkeys((name, self.parts[name][0].name))
                alike[scheme] += [f"re:{re.escape(each)}$".replace("experts", "expert[s]") for each in names]
        return alike

    def _ignored(self) -> list[str]:
        """Layers without codes by all their names."""
        groups = self.plain.groups.values() if isinstance(self.plain, OnHub) else ()
        named = layers_on_hub(dense_layers(self.made.artifact.graph, self.schemes), groups)
        return list(dict.fromkeys(each for pair in named.items() for each in pair))


def _any(name: str, everywhere: bool) -> str:
    """A pattern for all experts beside one, whatever their matrices are called. `everywhere`: in any block."""
    *owners, _ = name.split(".")
    numbers = [i for i, part in enumerate(owners) if part.isdigit()]
    free = numbers if everywhere else numbers[-1:]
    return "re:" + r"\.".join(r"\d+" if i in free else re.escape(part) for i, part in enumerate(owners)) + r"\.\w+$"


def cache_scheme(form: CacheForm) -> dict[str, Any]:
    """The entry `kv_cache_scheme`."""
    strategy, kind = "tensor" if form.heads == 1 else "attn_head", "float" if form.grid == "fp8" else "int"
    return {"num_bits": form.bits, "type": kind, "symmetric": True, "strategy": strategy, "dynamic": False}


def _cache_shape(form: CacheForm) -> tuple[int, ...]:
    """The shape of the scales of keys, or of values: those of heads as (heads, tokens, numbers) takes them."""
    return (1,) if form.heads == 1 else (form.heads, 1, 1)


def words(count: int, bits: int) -> int:
    """How many 32-bit words so many codes take."""
    return -(-row_bytes(count, bits) // 4)


def packed_words(codes: Tensor, bits: int) -> Tensor:
    """(R, N) uint8 codes -> (R, W) int32, filled up with zeros."""
    packed = pack_bits(codes, bits)
    filled = packed.new_zeros(len(packed), 4 * words(codes.shape[1], bits))
    filled[:, : packed.shape[1]] = packed
    return filled.view(torch.int32)
