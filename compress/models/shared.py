"""Layers of several blocks that share one matrix, as the attention of Zamba does that many blocks use: one site.

It is learned from the inputs of all its uses, packed once, and shared again where it is loaded.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from compress.lazy import nn
from compress.models.symmetry import is_transposed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from compress.models.site import Site


def with_shared(model: nn.Module, sites: Sequence[Site], tied: Mapping[str, str]) -> tuple[Site, ...]:
    """The sites of a model, where plain layers of its blocks that are tied to one another are one site of the first.

    Args:
        model: parameters possibly on the meta device.
        sites: with their blocks, in order.
        tied: parameter -> the name its value is kept under.
    """
    if not tied:
        return tuple(sites)
    plain = {site.parameter: site for site in sites if site.block is not None and _is_plain(model, site)}
    users: dict[str, list[Site]] = {}
    for site in plain.values():
        kept = plain.get(tied.get(site.parameter, ""))
        if kept is not None and kept.shape == site.shape and kept.ref.transposed == site.ref.transposed:
            users.setdefault(kept.name, []).append(site)
    gone = {site.name for several in users.values() for site in several}
    return tuple(
        replace(site, shared=tuple(user.name for user in users.get(site.name, ())))
        for site in sites
        if site.name not in gone
    )


def _is_plain(model: nn.Module, site: Site) -> bool:
    """Whether a site is the weight of a `Linear` or a transformers `Conv1D`, which multiplies with it."""
    if site.is_expert or site.router or site.read_by is not None or site.parameter != f"{site.name}.weight":
        return False
    module = model.get_submodule(site.name)
    return type(module) is nn.Linear or is_transposed(module)


__all__ = ["with_shared"]
