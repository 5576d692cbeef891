"""What `compress plan` shows: what each pass will touch and cost, and where sparsity goes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from compress.passes import DepthPass, ExpertsPass, KvCache, MergePass, RecalibrateNorms, Rotate, ScalingPass, WidthPass
from compress.report.bars import zeros
from compress.report.report import size_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from rich.console import RenderableType

    from compress.planning.allocation_preview import Allocation
    from compress.planning.plan import Plan
    from compress.planning.state import PassPlan


@dataclass(frozen=True)
class Shown:
    """A plan, and what is known of passes that give layers different shares of zeros.

    Attributes:
        plan: of a pipeline on a model.
        allocations: path of a pass -> what decides its shares.
        shares: path of a pass -> layer -> share of zeros; of those passes whose shares were found.
        title: what was planned, and on which model.
    """

    plan: Plan
    allocations: Mapping[str, Allocation] = field(default_factory=dict)
    shares: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    title: str = ""

    def said(self, path: str) -> str:
        """What decides the shares of a pass, in words."""
        return self.allocations[path].said(shown=path in self.shares)


def rows(shown: Shown) -> list[dict[str, Any]]:
    """An entry for each pass, JSON-able."""
    found = []
    for part in (part for stage in shown.plan.stages for part in stage):
        row = {
            "pass": part.path,
            "layers": len(part.sites),
            "weights": _weights(part),
            "becomes": becomes(part),
            "bits_per_weight": _bits_per_weight(part),
        }
        if part.path in shown.allocations:
            row |= {"allocation": shown.said(part.path), "shares": shown.shares.get(part.path)}
        found.append(row)
    return found


def becomes(part: PassPlan) -> str:
    """What a pass makes of the layers, in words."""
    if isinstance(part.pass_, DepthPass):
        return f"{part.pass_.blocks} of {len({s.block for s in part.sites})} blocks gone"
    if isinstance(part.pass_, ExpertsPass):
        return f"{part.pass_.kept_in_words} of the experts of every layer left"
    if isinstance(part.pass_, WidthPass | RecalibrateNorms | Rotate | ScalingPass | KvCache):
        return part.left
    if isinstance(part.pass_, MergePass):
        return f"merged with {', '.join(part.pass_.models)}"
    kinds = {spec.kind + (f", inputs {spec.inputs}" if spec.inputs else "") for spec in part.specs.values()}
    return ", ".join(sorted(kinds))


def as_json(shown: Shown) -> str:
    """Everything, for machines."""
    plan = shown.plan
    totals = {
        "original_bytes": plan.original_bytes,
        "final_bytes": plan.final_bytes,
        "dense": dict(plan.dense.parts),
        "exports": {exporter.key: size for exporter, size in plan.exports},
        "peak_memory": plan.memory.total,
        "peak_memory_when": plan.memory.moment,
        "peak_memory_of": dict(plan.memory.parts),
        "device": plan.places.name,
        "device_memory": plan.device.total if plan.device else None,
        "device_memory_when": plan.device.moment if plan.device else None,
        "device_memory_of": dict(plan.device.parts) if plan.device else None,
        "disk": plan.disk.total,
        "disk_when": plan.disk.moment,
        "disk_of": dict(plan.disk.parts),
    }
    return json.dumps({"passes": rows(shown), **totals}, indent=1)


def table(shown: Shown) -> Table:
    """A line for each pass."""
    drawn = Table(title=Text(shown.title, "table.title"), title_justify="left")
    for i, heading in enumerate(("pass", "layers", "weights", "becomes", "bits/weight")):
        drawn.add_column(heading, justify="left" if i in (0, 3) else "right", overflow="fold")
    for row in rows(shown):
        bits = row["bits_per_weight"]
        drawn.add_row(
            Text(row["pass"]),
            str(row["layers"]),
            f"{row['weights']:,}",
            Text(row["becomes"]),
            "" if bits is None else f"{bits:.3f}",
        )
    return drawn


def lines(shown: Shown, width: int, ascii_only: bool) -> Iterator[RenderableType]:
    """What stands below the table: the totals, and where sparsity goes, with bars where that was found."""
    plan = shown.plan
    yield Text(
        f"weights {size_text(plan.original_bytes)} -> about {size_text(plan.final_bytes)}; peak memory about "
        f"{size_text(plan.memory.total)}; disk while running about {size_text(plan.disk.total)}"
    )
    if plan.exports:
        sizes = (f"{e.key} {'at most' if e.bounded else 'about'} {size_text(size)}" for e, size in plan.exports)
        yield Text(f"exports: {', '.join(sizes)}")
    if plan.dense.parts:
        parts = ", ".join(f"{what} {size_text(size)}" for what, size in plan.dense.parts.items())
        yield Text(f"left dense: {size_text(sum(plan.dense.parts.values()))} ({parts})")
    needs = {"memory": plan.memory, "disk": plan.disk}
    if plan.device is not None:
        waiting = "there" if plan.activations_on_device else "in the host's memory"
        size = size_text(plan.device.total)
        yield Text(f"computes on {plan.places.name}, in about {size} of its memory; activations wait {waiting}")
        needs["device memory"] = plan.device
    for name, need in needs.items():
        made_of = sorted(need.parts.items(), key=lambda part: -part[1])
        yield Text(f"{name}, most while {need.moment}: {', '.join(f'{k} {size_text(v)}' for k, v in made_of)}")
    for path, allocation in shown.allocations.items():
        yield Text(f"{path}: {shown.said(path)}")
        if path in shown.shares:
            shares = {s.name: (s.shape[0] * s.shape[1], shown.shares[path][s.name]) for s in allocation.sites}
            yield Text(zeros(shares, width, ascii_only))


def _weights(part: PassPlan) -> int:
    return sum(s.shape[0] * s.shape[1] for s in part.sites)


def _bits_per_weight(part: PassPlan) -> float | None:
    """Over the layers of a pass; None where it leaves open how they are stored."""
    if not part.specs:
        return None
    return round(sum(spec.num_bytes for spec in part.specs.values()) * 8 / _weights(part), 3)
