"""Which layers lose how much, before a run: in words, and in numbers where the weights alone decide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.passes import GlobalMagnitude
from compress.passes.prune.global_magnitude import count_below, layer_counts
from compress.passes.prune.magnitude import Pruner
from compress.passes.targets import make_target

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from compress.checkpoint.artifact import Artifact
    from compress.models.site import Site
    from compress.passes.base import Target
    from compress.planning.plan import Plan
    from compress.progress import Bars

MORE = {
    "global": "whose scores are small beside the others'",
    "owl": "with few outliers",
    "alphapruning": "whose spectra have light tails",
    "farms": "whose spectra have light tails, in windows of one size",
}


@dataclass(frozen=True)
class Allocation:
    """A pass that gives layers different shares of zeros.

    Attributes:
        pass_: with its options.
        sites: that it works on.
        changed: whether a pass before it changes their weights.
    """

    pass_: Pruner | GlobalMagnitude
    sites: tuple[Site, ...]
    changed: bool

    @property
    def known(self) -> bool:
        """Whether the weights as they are now decide."""
        return not self.changed and not self._from_data

    @property
    def _from_data(self) -> bool:
        return isinstance(self.pass_, Pruner) and self.pass_.survey_needs != "none"

    def said(self, shown: bool = False) -> str:
        """What decides, and when. `shown`: the shares themselves come with it."""
        p = self.pass_
        if isinstance(p, GlobalMagnitude):
            more = "layers whose weights are small beside the others'"
        else:
            more = f"{p.allocate_by.replace('site', 'layer')}s {MORE[p.allocate]}"
        if self._from_data:
            when = "decided from calibration data while running, and shown by `compress inspect` after it"
        elif self.changed:
            when = "decided while running: the weights that the passes before it leave are not known yet"
        else:
            when = "decided from the weights alone" + ("" if shown else "; --shares shows how")
        return f"{100 * float(p.sparsity):g}% zeros in all, more in {more}; {when}"

    def shares(self, artifact: Artifact, bars: Bars) -> dict[str, float]:
        """Layer -> share of zeros. Reads the weights, one at a time."""
        p, sites = self.pass_, {site.name: site for site in self.sites}

        def load(name: str) -> Target:
            return make_target(artifact.graph, [sites[name]], [artifact.weight(sites[name])])

        def over(names: Iterable[str]) -> Iterable[str]:
            return bars.over(names, len(sites), f"{p.key}: layers")

        if isinstance(p, GlobalMagnitude):
            sizes = [site.shape[0] * site.shape[1] for site in self.sites]
            removed = layer_counts(count_below(tuple(sites), load, p.sparsity), sizes, p.sparsity, p.min_keep)
            return {name: count / size for name, count, size in zip(sites, removed, sizes, strict=True)}
        decided = p.allocated({name: p.at(name).survey(load(name)) for name in over(sites)})
        return {name: float(decided.at(name).sparsity) for name in sites}


def allocations(plan: Plan) -> dict[str, Allocation]:
    """The allocations of a plan, by the path of their pass."""
    found, worked_on = {}, set[str]()
    for part in (part for stage in plan.stages for part in stage):
        names, p = {site.name for site in part.sites}, part.pass_
        if isinstance(p, GlobalMagnitude) or (isinstance(p, Pruner) and p.surveys):
            found[part.path] = Allocation(p, part.sites, not worked_on.isdisjoint(names))
        worked_on |= names
    return found


def known_shares(allocations: Mapping[str, Allocation], artifact: Artifact, bars: Bars) -> dict[str, dict[str, float]]:
    """Path of a pass -> layer -> share of zeros, where the weights alone decide. Reads the weights."""
    return {path: each.shares(artifact, bars) for path, each in allocations.items() if each.known}
