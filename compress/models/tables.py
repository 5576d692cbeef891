"""Tables of embeddings as sites: which can be, and which heads share theirs."""

from __future__ import annotations

import dis
from itertools import pairwise
from typing import TYPE_CHECKING

from compress.lazy import nn
from compress.models.site import Site, TensorRef

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

LOOKS_AT = ("dtype", "device")  # what a forward may ask of the table that it does not look up itself


def with_tables(model: nn.Module, sites: Sequence[Site], tied: Mapping[str, str]) -> tuple[Site, ...]:
    """The sites of a model and, behind them, those of its embeddings. A table is in no block: it must be named.

    What shares a table with an embedding is one site with it, where every module that shares it is an embedding or a
    Linear layer; where another kind of module does, the table is no site, and what is tied to it stays as it was.

    Args:
        model: parameters possibly on the meta device.
        sites: all others, in order.
        tied: parameter -> the name its value is kept under.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    users: dict[str, list[str]] = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        users.setdefault(tied.get(name, name), []).append(name)
    tables: dict[str, Site] = {}
    for kept, names in users.items():
        owners = [name.rpartition(".") for name in (kept, *(n for n in names if n != kept))]
        found = [modules[owner] for owner, _, _ in owners]
        if not any(isinstance(module, nn.Embedding) for module in found):
            continue
        if all(leaf == "weight" for _, _, leaf in owners) and all(map(_shares_table, found)):
            every = [owner for owner, _, _ in owners]
            first = next(name for name in every if isinstance(modules[name], nn.Embedding))
            shared = tuple(name for name in every if name != first)
            rows, columns = found[0].weight.shape
            tables[kept] = Site(first, (rows, columns), TensorRef(kept), looked_up=True, shared=shared)
    gone = {name for table in tables.values() for name in table.names}
    return (*(site for site in sites if site.name not in gone), *tables.values())


def _shares_table(module: nn.Module) -> bool:
    return type(module) is nn.Linear or looks_up(module)


def looks_up(module: nn.Module) -> bool:
    """Whether all that a module does with its table is to look up rows, as `nn.Embedding` does.

    A class with a forward of its own may change what goes in and what comes out (Gemma scales rows, OPT shifts
    positions) as long as it looks up by the forward of `nn.Embedding`, and asks its table for its type or device only.
    """
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:  # which rewrites rows that are looked up
        return False
    forwards = [vars(cls)["forward"] for cls in type(module).__mro__ if "forward" in vars(cls)]
    return all(map(_hands_on, forwards[: forwards.index(nn.Embedding.forward)]))


def _hands_on(forward: object) -> bool:
    code = getattr(forward, "__code__", None)
    if code is None:
        return False
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "EXTENDED_ARG")]
    looked = all(
        after.argval in LOOKS_AT
        for step, after in pairwise(steps)
        if step.opname.startswith("LOAD_ATTR") and step.argval == "weight"
    )
    return (
        looked and "__class__" in code.co_freevars and "forward" in code.co_names and "embedding" not in code.co_names
    )


def multiplies(model: nn.Module, site: Site) -> tuple[str, ...]:
    """The modules that multiply with a site, whose inputs count for it; none where its rows are only looked up."""
    if not site.looked_up:
        return site.names if site.read_by is None else (site.read_by,)
    return tuple(name for name in site.names if not isinstance(model.get_submodule(name), nn.Embedding))[:1]


__all__ = ["looks_up", "multiplies", "with_tables"]
