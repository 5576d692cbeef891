"""OUT/compressed-tensors: uniform codes and floats as the library of that name keeps them, in a plain folder."""

from __future__ import annotations

from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any, ClassVar

from compress.checkpoint.sources import SINGLE
from compress.export.base import Exporter
from compress.export.float_schemes import float_schemes
from compress.export.hf import plain_config, running
from compress.export.on_hub import described_by, groups_on_hub, matrices_on_hub
from compress.export.pack_quantized import FORMAT, METHOD, Packing, schemes, words
from compress.export.refusals import (
    refuse_added,
    refuse_apart,
    refuse_corrected,
    refuse_missing,
    refuse_other_codes,
    refuse_other_layers,
    refuse_read,
    refuse_rounded,
    refuse_shared,
    refuse_tables,
    refuse_uncoded,
)
from compress.io.atomic import write_json, writing
from compress.io.safetensors_file import compare_tensors, write_tensors
from compress.lazy import nn, torch
from compress.models import loading
from compress.models.companions import copy_companions
from compress.models.turned_inputs import ENTRY, expression_of, pattern_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path

    from compress.encodings import Spec
    from compress.encodings.cache import CacheForm
    from compress.export.base import Logits, PackedFolder
    from compress.models.graph import Graph
    from compress.progress import Bars

MOST_BITS = 8


@dataclass(frozen=True, kw_only=True)
class CompressedTensors(Exporter):
    """Uniform codes and floats in the formats of the compressed-tensors library, with which transformers loads them."""

    key: ClassVar[str] = METHOD
    files: ClassVar[tuple[str, ...]] = (SINGLE, "config.json")
    used: ClassVar[tuple[str, str]] = (
        "console",
        "vllm serve FOLDER   # codes of 4 and 8 bits; transformers loads those of other widths too",
    )
    computes: ClassVar[str | None] = "float32"
    turns: ClassVar[bool] = True

    def refusals(self, graph: Graph, specs: Mapping[str, Spec], added: Collection[str]) -> Iterator[str]:
        yield from refuse_missing("compressed_tensors", METHOD)
        yield from refuse_added(graph, added)
        floats = float_schemes(specs)
        yield from refuse_rounded({n: s for n, s in specs.items() if n not in floats or floats[n].inputs is None})
        coded = {name: spec for name, spec in specs.items() if spec.form is not None}
        yield from refuse_uncoded(coded)
        experts = {site.name for site in graph.sites if site.is_expert}
        kept = schemes(specs, experts)
        yield from _refuse_others({name: spec for name, spec in coded.items() if name not in {*kept, *floats}})
        yield from _refuse_floats(floats, experts)
        yield from refuse_corrected(coded, FORMAT)
        yield from _refuse_experts(graph, coded)
        yield from refuse_apart(graph, {**kept, **floats})
        yield from refuse_read(graph, coded, FORMAT)
        yield from refuse_shared(graph, coded, "compressed-tensors")
        yield from refuse_tables(graph, coded, "transformers reads no packed embeddings of compressed-tensors")
        yield from refuse_other_layers(graph, {**coded, **graph.turned}, "the library")
        low = [
            name for name, scheme in kept.items()
            if not scheme.symmetric and scheme.group_size and words(specs[name].shape[0], scheme.bits) == 1
        ]  # fmt: skip
        if low:
            yield (
                f"the library cannot read the zero points of layers with as few rows as {low[0]} "
                f"({specs[low[0]].shape[0]}; {len(low)} in all); set symmetric: true, or `exclude` them there"
            )
        wide = [name for name, scheme in kept.items() if scheme.bits > MOST_BITS]
        if wide:
            alike = (
                "in layers, and only if all of those have the same bits, groups and symmetry; use one setting for all"
            )
            yield (
                f"asymmetric codes of {MOST_BITS} bits, such as those of {wide[0]}, can be read "
                f"{'in no experts; set' if wide[0] in experts else f'{alike}, or'} symmetric: true"
            )

    def refuse_cache(self, form: CacheForm, specs: Mapping[str, Spec]) -> str | None:
        if form.grid != "fp8":
            return f"engines read fp8 caches alone, and kv_cache makes {form}; set `grid: fp8`, or leave kv_cache out"
        asymmetric = [name for name, scheme in schemes(specs).items() if not scheme.symmetric]
        if asymmetric:
            return (
                "transformers leaves the cache as it is where codes have zero points, as those of "
                f"{asymmetric[0]} ({len(asymmetric)} in all); set `symmetric: true` in the quantizer, or leave "
                "kv_cache out"
            )
        return None

    def write(self, made: PackedFolder, folder: Path, final: Path, bars: Bars) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        packing = Packing(made)
        with writing(folder / SINGLE):
            write_tensors(packing.layout(), packing.read, folder / SINGLE, bars, self.key)
        config = plain_config(made.folder, made.dtype)
        config.pop(ENTRY, None)  # the other section says it in the words of the library
        section = packing.config() | _turns(made.artifact.graph)
        write_json({**config, "quantization_config": section}, folder / "config.json")
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


def _turns(graph: Graph) -> dict[str, Any]:
    """What the section says of turned inputs; nothing where none are."""
    sizes = {pattern_of(name): size for name, size in graph.turned.items()}
    groups = {
        f"inputs_{size}": {
            "type": "hadamard",
            "head_dim": size,
            "apply": [
                {"targets": [f"re:{expression_of(p)}" for p, s in sizes.items() if s == size], "location": "input"}
            ],
        }
        for size in sorted(set(sizes.values()))
    }
    return {"transform_config": {"config_groups": groups}} if groups else {}


def _unpacked_model(made: PackedFolder, folder: Path, dtype: torch.dtype) -> Logits:
    """The folder in memory, unpacked, under progress bars of the library's own.

    The library makes bfloat16 of floats of 4 bits, which holds them exactly, and multiplies with nothing else.
    """
    with redirect_stderr(StringIO()):
        model = loading.load_model(folder, dtype)
        for name in {site.parameter for site in made.artifact.graph.sites if site.is_expert}:
            experts = model.get_parameter(name)  # in the type of their scales
            experts.data = experts.data.to(dtype)
        if hasattr(model, "ct_decompress_hook"):  # else they were unpacked while loading
            model.hf_quantizer.compressor.decompress_model(model)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.data = module.weight.data.to(dtype)
        turns = _turns(made.artifact.graph)
        if turns:  # which the library does, and transformers does not ask it to
            from compressed_tensors.transform import TransformConfig, apply_transform_config

            apply_transform_config(model, TransformConfig(**turns["transform_config"]))
    return running(made, model)


def _refuse_others(others: Mapping[str, Spec]) -> Iterator[str]:
    """Why codes that are neither even steps nor floats in blocks that the library knows do not fit."""
    forms = {name: spec.form for name, spec in others.items() if spec.form is not None}
    yield from refuse_other_codes({n: others[n] for n, form in forms.items() if not form.floats}, FORMAT)
    floats = [name for name, form in forms.items() if form.floats]
    if floats:
        yield (
            "the library knows fp8 with one scale for the tensor, for a row or for a block of 128 rows and columns, "
            f"nvfp4 in groups of 16 and mxfp4 in groups of 32; {len(floats)} layers are otherwise, such as "
            f"{floats[0]}; leave group_size and fallback out, `exclude` them in the quantizer, or export hf"
        )


def _refuse_floats(floats: Collection[str], experts: Collection[str]) -> Iterator[str]:
    """Why layers of floats do not fit where they are."""
    packed = [name for name in floats if name in experts]
    if packed:
        yield (
            f"transformers reads experts of even steps only, and {len(packed)} are floats, such as {packed[0]}; "
            "`exclude` them, set `grid: int` for them in `overrides`, or export hf"
        )


def _refuse_experts(graph: Graph, coded: Collection[str]) -> Iterator[str]:
    """Why the experts of a mixture would not be read back; nothing where they would."""
    packed = [site for site in graph.sites if site.is_expert and site.name in coded]
    if not packed:
        return
    there = matrices_on_hub(graph, groups_on_hub(graph, described_by(graph)))
    alone = [site.name for site in packed if site.name not in there]
    if alone:
        yield (
            f"{FORMAT} holds layers, and checkpoints of {type(graph.model).__name__} on the hub have none for each "
            f"expert, such as {alone[0]} ({len(alone)} in all); `exclude` them, or export hf"
        )
    shared = {site.parameter for site in packed}
    dense = [s.name for s in graph.sites if s.parameter in shared and s.name not in coded]
    if dense:
        yield (
            f"transformers reads no other experts beside packed ones, and {len(dense)} are not packed, such as "
            f"{dense[0]}; quantize all that the model keeps in one tensor or none of them, or export hf"
        )
