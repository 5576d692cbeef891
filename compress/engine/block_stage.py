"""Stages that go through the model block by block: passes over single matrices, and passes that learn a block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

from compress.engine.learning import learn_block
from compress.engine.ledger import KeptInLedger, Record
from compress.engine.placement import take_records
from compress.engine.stage import StageResult, StageRunner, calibration_batches, layers_changed
from compress.engine.survey import survey_stage
from compress.engine.sweep import Wanted, gradients, most_needed, sites_by_block, sweep
from compress.engine.unit import Turn, UnitState, solve_matrices
from compress.io.keys import key_of
from compress.passes.targets import works_on

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from compress.calibration.data import Dataset
    from compress.calibration.statistics import Need
    from compress.calibration.training import TrainingStore
    from compress.engine.context import Context
    from compress.engine.stage import Stage
    from compress.engine.sweep import Unit
    from compress.models.graph import Graph
    from compress.models.site import Site
    from compress.passes.base import BlockPass, LinearPass, Reach

# How a pass of each reach has its turn at a unit.
TURNS: Mapping[Reach, Callable[[Turn, Any], None]] = {"matrix": solve_matrices, "block": learn_block}


class BlockSequential(StageRunner):
    """Runs one or several fused passes over every block."""

    def run(self, context: Context, stage: Stage, data: Dataset | None, key: str) -> StageResult:
        passes = cast("list[LinearPass | BlockPass]", stage.passes)
        batches = context.executor.shard(calibration_batches(context, data))
        asking = [p for p in passes if p.surveys]
        if asking:
            found = survey_stage(context, stage.number, asking, batches, key)
            made = cast("list[LinearPass | BlockPass]", found)
            allocated = {id(p): now for p, now in zip(asking, made, strict=True)}
            passes = [allocated.get(id(p), p) for p in passes]
        key, records = run_passes(context, stage.number, passes, batches, key)
        return StageResult(key, context, layers_changed(context.artifact, records))


def run_passes(
    context: Context, stage: int, passes: Sequence[LinearPass | BlockPass], batches: Sequence[Tensor], key: str
) -> tuple[str, list[Record]]:
    """Run passes on one unit after the other, committing each.

    Returns:
        The last key, and what was done to each site and vector.
    """
    records: list[Record] = []
    options = [(p.key, p.options()) for p in passes]
    wanted = _wanted_by_passes(context.graph, passes)
    with gradients(wanted):
        for unit in sweep(context, wanted, batches):
            key = key_of(key, stage, unit.name, [s.name for s in unit.sites], options)
            file = f"s{stage:02d}-{unit.name}"
            done, made = context.ledger.load(file, key), list[Record]()
            if done is None:
                made = _worked_on(context, stage, passes, unit, KeptInLedger(context.ledger, f"{file}-training", key))
                done = context.commit(file, key, made)
                context.ledger.forget(file)  # states of learning, which are of no use any longer
            records += done
            take_records(context, done, made=made)
            del made  # of no use before the next unit
    return key, records


def _worked_on(
    context: Context, stage: int, passes: Sequence[LinearPass | BlockPass], unit: Unit, kept: TrainingStore
) -> list[Record]:
    """What passes make of a unit, one after the other."""
    state = UnitState(unit.statistics() if unit.sites else {})
    for position, pass_ in enumerate(passes):
        last = position + 1 == len(passes)
        turn = Turn(context, stage, position, last, unit, state, kept.part(str(position)))
        TURNS[pass_.reach](turn, pass_)
    return state.records(unit.sites)


def _wanted_by_passes(graph: Graph, passes: Sequence[LinearPass | BlockPass]) -> Wanted:
    sites = sites_by_block(graph, passes)
    every = [s for each in sites.values() for s in each]
    learning = cast("list[BlockPass]", [p for p in passes if p.reach == "block"])
    ranged = frozenset(s.name for s in every if _is_ranged(s, passes))
    needs: dict[str, Need] = {s.name: most_needed([p.needs for p in passes if works_on(p, s)]) for s in every}
    return Wanted(
        label="+".join(p.key for p in passes),
        sites=sites,
        needs={name: need for name, need in needs.items() if need != "none" or name in ranged},
        ranged=ranged,
        calibrated=any(p.calibrated for p in passes),
        learns=any(p.runs_block for p in learning),
        whole=bool(learning),
        drifting=frozenset(s.name for s in every if s.groups == 1 and any(_follows(p, s) for p in passes)),
    )


def _follows(pass_: LinearPass | BlockPass, site: Site) -> bool:
    """Whether a pass makes up for how far a site's inputs are from the original model's."""
    return works_on(pass_, site) and pass_.at(site.name).propagates


def _is_ranged(site: Site, passes: Sequence[LinearPass | BlockPass]) -> bool:
    """Whether a pass fixes the grid of a site's inputs."""
    forms = (p.at(site.name).input_form() for p in passes if works_on(p, site))
    return any(form is not None and form.static for form in forms)
