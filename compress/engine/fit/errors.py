"""What each option of a quantizer does to what each layer puts out, and how many bytes it takes.

Shapes: O outputs (rows), I inputs (columns), T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from compress.calibration.grouped import GroupedStatistics
from compress.calibration.precision import products
from compress.checkpoint.artifact import Packed
from compress.encodings import Spec, Weight, spec_of
from compress.engine.by_group import solved_by_group
from compress.engine.few_tokens import usable
from compress.engine.ledger import Record
from compress.engine.stacking import split_rows, stacks
from compress.engine.stage import generator_for
from compress.engine.sweep import Wanted, gradients, sites_by_block, sweep
from compress.engine.validate import observed
from compress.io.keys import key_of
from compress.passes.targets import make_target

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from compress.calibration.statistics import Statistics
    from compress.engine.context import Context
    from compress.engine.sweep import Unit
    from compress.models.site import Site
    from compress.passes.base import LinearPass


@dataclass(frozen=True)
class OptionErrors:
    """What an option does to one layer.

    Attributes:
        spec: how the weight is stored.
        relative: the squared change of what the layer puts out over its square, summed over the calibration data.
        weighted: the mean over tokens of the squared change, each output's times half its Fisher information; None
            where that is not known.
    """

    spec: Spec
    relative: float
    weighted: float | None


@dataclass(frozen=True)
class SiteErrors:
    """What every option does to one layer.

    Attributes:
        fed: name of the first layer with the very same inputs.
        options: in the order they were given.
    """

    fed: str
    options: tuple[OptionErrors, ...]


@dataclass(frozen=True)
class Swept:
    """What one sweep over the layers found.

    Attributes:
        sites: by name.
        kept: the weights that one of the options makes, by name; empty where none was to be kept.
    """

    sites: dict[str, SiteErrors]
    kept: dict[str, Weight | Packed]


def sweep_options(
    context: Context,
    passes: Sequence[LinearPass],
    batches: Sequence[Tensor],
    importance: Mapping[str, Tensor],
    keep: int | None,
    key: str,
) -> Swept:
    """Quantize every layer of the original model with every option, and change nothing.

    Args:
        context: of the original model.
        passes: a quantizer with each of its options; all work on the same layers.
        batches: calibration data.
        importance: site -> (O,) Fisher information of its outputs.
        keep: number of the option whose weights are kept.
        key: of all that the result depends on.
    """
    sites = sites_by_block(context.graph, passes[:1])
    every = [s.name for each in sites.values() for s in each]
    wanted = Wanted("fit", sites, dict.fromkeys(every, "gram"), frozenset(), calibrated=True, learns=False)
    found, kept = dict[str, SiteErrors](), dict[str, Weight | Packed]()
    with gradients(wanted):
        for unit in sweep(context, wanted, batches):
            own = key_of(key, unit.name, [s.name for s in unit.sites], [p.options() for p in passes], keep)
            row = context.ledger.load_row(f"s00-{unit.name}", own)
            records = context.ledger.load(f"s00-{unit.name}-kept", own)
            if row is None or (keep is not None and records is None):
                row, made = _measured(context, unit, passes, importance, keep)
                records = context.ledger.commit(f"s00-{unit.name}-kept", own, made) if keep is not None else []
                context.ledger.commit_row(f"s00-{unit.name}", own, row)
            found |= {name: _read(each) for name, each in row.items()}
            kept |= {record.site: record.weight for record in records or ()}
    return Swept(found, kept)


def _measured(
    context: Context, unit: Unit, passes: Sequence[LinearPass], importance: Mapping[str, Tensor], keep: int | None
) -> tuple[dict[str, Any], list[Record]]:
    """What is found of a unit, JSON-able, and the weights that are kept."""
    statistics = unit.statistics() if unit.sites else {}
    row: dict[str, Any] = {}
    for site in unit.sites:
        alike = (s.name for s in unit.sites if statistics.get(s.name) is statistics.get(site.name) is not None)
        row[site.name] = {"fed": next(alike, site.name), "options": []}
    records: list[Record] = []
    for number, pass_ in enumerate(passes):
        for group in stacks(pass_, unit.sites, statistics, lambda _: False):
            for site, weight, old in _solved(context, pass_, group, statistics):
                note = _note(context, site, pass_, weight, old, statistics, importance.get(site.name))
                row[site.name]["options"].append(note)
                if number == keep:
                    records.append(Record(site.name, weight, {}))
    order = {site.name: i for i, site in enumerate(unit.sites)}
    return row, sorted(records, key=lambda record: order[record.site])


def _solved(
    context: Context, pass_: LinearPass, group: list[Site], statistics: Mapping[str, Statistics]
) -> list[tuple[Site, Weight, Tensor]]:
    """(site, what a pass makes of it, what it was) for a stack of sites with the same inputs."""
    target = make_target(
        context.graph,
        group,
        [context.weight(site) for site in group],
        statistics=usable(context, group[0], statistics) if pass_.needs != "none" else None,
        generator=generator_for(context.seed, 0, 0, group[0].name),
        original=context.original if pass_.compares else None,
    )
    with products(context.products):
        edit, _ = solved_by_group(pass_.at(group[0].name), target)
    rows = torch.split(target.weight, [site.shape[0] for site in group])
    return [
        (site, observed(site, pass_, Weight(old), old, each, context.artifact.store_dtype(site))[0], old)
        for site, old, each in zip(group, rows, split_rows(edit, group), strict=True)
    ]


def _note(
    context: Context,
    site: Site,
    pass_: LinearPass,
    weight: Weight,
    old: Tensor,
    statistics: Mapping[str, Statistics],
    importance: Tensor | None,
) -> dict[str, Any]:
    """What an option does to one layer, JSON-able."""
    seen = usable(context, site, statistics)
    changed, before = (_energies(each, seen) for each in (weight.dequantize() - old, old))
    half = None if importance is None else importance.to(changed.device) / 2
    return {
        "spec": replace(spec_of(weight), inputs=pass_.at(site.name).input_form()).to_json(),
        "relative": float(changed.sum() / before.sum()) if float(before.sum()) else 0.0,
        "weighted": None if half is None else float(half @ changed),
    }


def _energies(weight: Tensor, statistics: Statistics | None) -> Tensor:
    """(O, I) -> (O,) float64, the mean over tokens of the square of what each row makes of the inputs."""
    if isinstance(statistics, GroupedStatistics):
        parts = torch.chunk(weight, statistics.groups)
        return torch.cat([_energies(part, statistics.of_group(i)) for i, part in enumerate(parts)])
    if statistics is None or statistics.gram is None:
        return weight.square().sum(1, dtype=torch.float64)
    return ((weight @ statistics.gram) * weight).sum(1, dtype=torch.float64) / max(1, statistics.tokens)


def _read(row: Mapping[str, Any]) -> SiteErrors:
    """The inverse of what a ledger keeps."""
    options = (OptionErrors(Spec.from_json(o["spec"]), o["relative"], o["weighted"]) for o in row["options"])
    return SiteErrors(row["fed"], tuple(options))


__all__ = ["OptionErrors", "SiteErrors", "Swept", "sweep_options"]
