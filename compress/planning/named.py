"""What the patterns of a pass mean on a model where a layer has several names, or is only worked on when it is named."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase
from glob import escape
from typing import TYPE_CHECKING

from compress.lazy import transformers
from compress.passes import Override
from compress.passes.quantize.embeddings import EmbeddingOptions

if TYPE_CHECKING:
    from collections.abc import Iterable

    from compress.models.graph import Graph
    from compress.models.site import Site
    from compress.passes import Pass


def on_model(graph: Graph, pass_: Pass) -> Pass:
    """A pass whose patterns say by the names of sites alone what they, and `embeddings`, say on a model.

    A head that is tied to an embedding is one site with it, and goes by the names of both. A table is included only by
    a pattern that names the module, not by one such as "*" that matches whatever there is.
    """
    include, exclude, overrides = list(pass_.include), list(pass_.exclude), list(pass_.overrides)
    for site in graph.sites:
        if not site.looked_up:
            continue
        own, by_include = escape(site.name), any(fnmatchcase(site.name, p) for p in pass_.include)
        named = any(names(p, name) for p in pass_.include for name in site.names)
        if named and not by_include:
            include.append(own)
        if by_include and not named or excluded(pass_, site.shared) and not excluded(pass_, (site.name,)):
            exclude.append(own)
        overrides = [o for each in overrides for o in _for_table(each, site)]
    options = pass_.embeddings if isinstance(pass_, EmbeddingOptions) else None
    if options is not None:
        if not pass_.include:
            include += _inside(graph)
        found = [escape(site.name) for site in word_tables(graph)]
        include += found
        overrides += [Override(name, {**_weights_alone(pass_), **options}) for name in found]
    changed = {"include": tuple(include), "exclude": tuple(exclude), "overrides": tuple(overrides)}
    if all(getattr(pass_, name) == value for name, value in changed.items()):
        return pass_
    return replace(pass_, **changed, **({"embeddings": None} if isinstance(pass_, EmbeddingOptions) else {}))


def names(pattern: str, name: str) -> bool:
    """Whether a pattern matches a name, and by more than wildcards in its last part."""
    last = pattern.rpartition(".")[2]
    literal = last.strip("*?") != ""
    return literal and fnmatchcase(name, pattern) and fnmatchcase(name.rpartition(".")[2], last)


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
        return [escape(site.name) for site in graph.sites if site.block is not None]
    return [f"{escape(name)}.*" for name in graph.blocks]


def _weights_alone(pass_: EmbeddingOptions) -> dict[str, None]:
    """What is looked up has no inputs to round."""
    return {"activation_bits": None} if hasattr(pass_, "activation_bits") else {}


__all__ = ["names", "on_model", "word_tables"]
