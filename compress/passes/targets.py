"""The one place where a `Target` is made: matrices of a model, as they stand, the way a pass is given them.

And the one where it is decided which of them a pass works on.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from compress.checkpoint.artifact import finite_weight
from compress.lazy import torch
from compress.passes.interface import Target

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from compress.calibration.statistics import Statistics
    from compress.encodings import Weight
    from compress.models.graph import Graph
    from compress.models.site import Site
    from compress.passes.base import Pass


def works_on(pass_: Pass, site: Site) -> bool:
    """Whether a pass works on a site.

    A router of a mixture, an embedding, and a filter of each channel over time, is only worked on where an `include`
    pattern names it: `*.gate` does, `*` and `*.mlp.*` do not.
    """
    if site.named_only and not any(names(p, site.name) for p in pass_.include):
        return False
    return pass_.selects(site.name, site.block is not None)


def names(pattern: str, name: str) -> bool:
    """Whether a pattern matches a name, and would not if the last part of the name were another."""
    owner = name.rpartition(".")[0]
    other = f"{owner}.\0" if owner else "\0"
    return fnmatchcase(name, pattern) and not fnmatchcase(other, pattern)


def make_target(
    graph: Graph,
    sites: Sequence[Site],
    weights: Sequence[Weight],
    *,
    statistics: Statistics | None = None,
    generator: torch.Generator | None = None,
    original: Callable[[Site], Tensor] | None = None,
) -> Target:
    """One matrix, or several with the same inputs stacked row upon row.

    Args:
        graph: of the model.
        sites: where the matrices lie.
        weights: what they are now, one for each site; all of them have a mask, or none.
        statistics: of the inputs.
        generator: randomness of the pass on these sites.
        original: site -> its weight before every pass, (out, in); only for a pass that compares with it.

    Raises:
        NonFiniteError: a weight of the source is NaN or infinite.
    """
    first, alone = sites[0], len(sites) == 1
    masks = [w.mask for w in weights if w.mask is not None]
    return Target(
        _stacked([finite_weight(s, w) for s, w in zip(sites, weights, strict=True)]),
        _stacked(masks) if masks else None,
        statistics,
        generator,
        first.kernel,
        graph.rows_of(first.name) if alone else None,
        graph.columns_of(first.name) if alone else None,
        original=_stacked([original(s).float() for s in sites]) if original else None,
        stored=weights[0] if alone else None,
    )


def _stacked(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
