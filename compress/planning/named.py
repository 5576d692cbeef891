"""What the patterns of a pass mean on a model where a layer has several names, or must be named to be worked on."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase
from glob import escape
from typing import TYPE_CHECKING

from compress.lazy import transformers
from compress.passes import Override
from compress.passes.quantize.embeddings import EmbeddingOptions
from compress.passes.targets import names

if TYPE_CHECKING:
    from collections.abc import Iterable

    from compress.models.graph import Graph
    from compress.models.site import Site
    from compress.passes import Pass


def on_model(graph: Graph, pass_: Pass) -> Pass:
    """A pass whose patterns say by the names of sites alone what they, and `embeddings`, say on a model.

    A head that is tied to an embedding is one site with it, as layers are that blocks share, and goes by all its names.
    """
    include, exclude, overrides = list(pass_.include), list(pass_.exclude), list(pass_.overrides)
    options = pass_.embeddings if isinstance(pass_, EmbeddingOptions) else None
    words = () if options is None else word_tables(graph)
    for site in graph.sites:
        if not site.looked_up and not site.shared:
            continue
        own = escape(site.name)
        if any(names(p, name) for p in pass_.include for name in site.shared):
            include.append(own)
        if excluded(pass_, site.shared):
            exclude.append(own)
        overrides = [o for each in overrides for o in _for_table(each, site)]
    if isinstance(pass_, EmbeddingOptions) and options is not None:
        include += [*([] if pass_.include else _inside(graph)), *(escape(site.name) for site in words)]
        overrides += [Override(escape(site.name), {**_weights_alone(pass_), **options}) for site in words]
        pass_ = replace(pass_, embeddings=None)
    made = replace(pass_, include=tuple(include), exclude=tuple(exclude), overrides=tuple(overrides))
    return pass_ if made == pass_ else made


def excluded(pass_: Pass, every: Iterable[str]) -> bool:
    """Whether any of some names is excluded."""
    return any(fnmatchcase(name, p) for name in every for p in pass_.exclude)


def word_tables(graph: Graph) -> tuple[Site, ...]:
    """The sites that turn words into numbers and back: embedding and head. Of other modules, every table."""
    model = graph.model
    if not isinstance(model, transformers.PreTrainedModel):
        return tuple(site for site in graph.sites if site.looked_up)
    found = []
    for get in (model.get_input_embeddings, model.get_output_embeddings):
        try:
            found.append(get())
        except (NotImplementedError, AttributeError):  # a model that takes no words
            continue
    ends = {name for name, module in model.named_modules() if any(module is each for each in found)}
    return tuple(site for site in graph.sites if not ends.isdisjoint(site.names) and site.block is None)


def _for_table(override: Override, site: Site) -> list[Override]:
    """An override, and what it says of a table that it knows by another name."""
    other = any(fnmatchcase(name, override.match) for name in site.shared)
    if not other or fnmatchcase(site.name, override.match):
        return [override]
    return [override, Override(escape(site.name), override.options)]


def _inside(graph: Graph) -> list[str]:
    """Patterns of every site inside the blocks."""
    if "" in graph.blocks:
        return [escape(site.name) for site in graph.sites if site.block is not None and not site.named_only]
    alone = {site.name for site in graph.sites if site.block is not None} & {*graph.blocks}
    return [escape(name) + ("" if name in alone else ".*") for name in graph.blocks]


def _weights_alone(pass_: EmbeddingOptions) -> dict[str, None]:
    """What is looked up has no inputs to round."""
    return {"activation_bits": None} if hasattr(pass_, "activation_bits") else {}


__all__ = ["on_model", "word_tables"]
