"""Why a container cannot hold a model: reasons that several of them have, each with what would fit."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from compress.lazy import nn
from compress.models.fused import fused_groups

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from compress.encodings import Spec
    from compress.models.graph import Graph


def refuse_added(graph: Graph, added: Collection[str]) -> Iterator[str]:
    """Why new biases do not fit a container that a plain model class reads; nothing where there are none."""
    if added:
        first = next(iter(added))
        yield (
            f"a plain {type(graph.model).__name__} has no place for the biases that {len(added)} layers are given, "
            f"such as {first}; leave new biases out, or this format out of `export:`"
        )


def refuse_tables(graph: Graph, specs: Mapping[str, Spec], why: str) -> Iterator[str]:
    """Why packed embeddings do not fit a container; nothing where there are none. `why`: what it lacks."""
    packed = [site.name for site in graph.sites if site.looked_up and site.name in specs]
    if packed:
        yield (
            f"{why}, and {len(packed)} are packed, such as {packed[0]}; leave embeddings out of the passes (`exclude`, "
            "or no `embeddings:`), or this format out of `export:`"
        )


def refuse_shared(graph: Graph, specs: Mapping[str, Spec], container: str) -> Iterator[str]:
    """Why packed layers that blocks share do not fit a container; nothing where there are none."""
    shared = [site for site in graph.sites if site.shared and not site.looked_up and site.name in specs]
    if shared:
        yield (
            f"{container} has each layer once for each module, and {len(shared)} are shared by blocks, such as "
            f"{shared[0].name}; export hf, or leave this format out of `export:`"
        )


def refuse_experts(graph: Graph, names: Collection[str], container: str) -> Iterator[str]:
    """Why matrices that are no layers, such as experts, do not fit a container of layers; nothing without any.

    Args:
        graph: of the model.
        names: of the sites that the container would have to hold as layers of their own.
        container: what it is called.
    """
    experts = [site.name for site in graph.sites if site.is_expert and site.name in names]
    if experts:
        yield (
            f"{container} holds layers, and {len(experts)} of the compressed matrices are experts that the model keeps "
            f"together in one tensor, such as {experts[0]}; `exclude` them, or export hf"
        )
    yield from refuse_read(graph, names, container)


def refuse_read(graph: Graph, names: Collection[str], container: str) -> Iterator[str]:
    """Why matrices that a module multiplies with itself do not fit a container of layers; nothing without any.

    Takes what `refuse_experts` does.
    """
    read = [site.name for site in graph.sites if site.read_by is not None and site.name in names]
    if read:
        yield (
            f"{container} holds layers, and {len(read)} of the compressed matrices are read by a module of torch "
            f"itself, such as {read[0]}; `exclude` them, or export hf"
        )


def refuse_rounded(specs: Mapping[str, Spec]) -> Iterator[str]:
    """Why rounded or skipped inputs do not fit a container of plain weights; nothing where there are none."""
    rounded = [name for name, spec in specs.items() if spec.inputs is not None]
    if rounded:
        yield (
            f"plain weights cannot round or skip what they are multiplied with, and {len(rounded)} layers do, such as "
            f"{rounded[0]}; leave activation_bits out of the quantizer and activation_sparsity out of the passes, or "
            "this format out of `export:`"
        )


def refuse_uncoded(coded: Collection[str]) -> Iterator[str]:
    """Why a container of codes does not fit a model without any."""
    if not coded:
        yield "no layer has codes, so there is nothing to pack; quantize with rtn or gptq, or export hf"


def refuse_other_codes(others: Mapping[str, Spec], container: str) -> Iterator[str]:
    """Why codes that do not count even steps do not fit a container of such; nothing where there are none."""
    forms = {name: spec.form for name, spec in others.items() if spec.form is not None}
    if forms:
        name, form = next(iter(forms.items()))
        yield (
            f"{container} holds uniform codes only, and {len(forms)} layers have others, such as {name} "
            f"({form.family}); use a uniform quantizer such as rtn or gptq with scheme: w4g64, or export hf"
        )


def refuse_corrected(coded: Mapping[str, Spec], container: str) -> Iterator[str]:
    """Why low-rank corrections do not fit a container of codes; nothing where there are none."""
    corrected = [name for name, spec in coded.items() if spec.low_rank is not None]
    if corrected:
        yield (
            f"{container} has no place for low-rank corrections, and {len(corrected)} layers have one, such as "
            f"{corrected[0]}; leave eora out, or export peft or hf"
        )


def refuse_other_layers(graph: Graph, coded: Collection[str], packer: str) -> Iterator[str]:
    """Why layers that are not linear do not fit a container; nothing where there are none. `packer`: what it is for."""
    modules = dict(graph.model.named_modules())
    tables = {site.name for site in graph.sites if site.looked_up}
    layers = [name for name in coded if name in modules and name not in tables]
    strange = [name for name in layers if type(modules[name]) is not nn.Linear]
    if strange:
        kind = type(modules[strange[0]]).__name__
        yield (
            f"{packer} packs Linear layers only, and {len(strange)} layers are not, such as {strange[0]} "
            f"({kind}); `exclude` them in the quantizer, or export hf"
        )


def refuse_missing(package: str, extra: str) -> Iterator[str]:
    """How to install the library that writes or reads a container, if it is missing; `extra` brings it."""
    if importlib.util.find_spec(package) is None:
        yield f"the Python package {package} is not installed; pip install 'compress-pipeline[{extra}]'"


def refuse_apart(graph: Graph, schemes: Mapping[str, object]) -> Iterator[str]:
    """Why engines would not load layers that they multiply as one matrix; nothing where those of each have one scheme.

    Args:
        graph: the model's structure.
        schemes: how every layer with codes is kept, by name; what is not among them is dense.
    """
    groups = fused_groups(graph.sites).values()
    apart = [names for names in groups if len({schemes.get(name) for name in names}) > 1]
    if apart:
        owner = apart[0][0].rpartition(".")[0]
        said = ", ".join(f"{name.rpartition('.')[2]} {schemes.get(name, 'dense')}" for name in apart[0])
        yield (
            f"engines multiply some layers of {owner} as one matrix, and they differ: {said} ({len(apart)} such groups "
            "in all); give all of a group the same options: let patterns of `overrides`, `include` and `exclude` match "
            "all of them or none, or choose bits with `compress fit --groups fused`"
        )
