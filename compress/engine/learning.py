"""A block that a pass learns as a whole, from what comes out of it."""

from __future__ import annotations

import time
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

from compress.calibration.precision import products
from compress.engine.placement import make_room
from compress.engine.unit import SolvedSite
from compress.errors import SolveError
from compress.passes.base import Block

if TYPE_CHECKING:
    from collections.abc import Mapping

    from compress.engine.unit import Turn
    from compress.passes.base import BlockPass, Edit, Target


def learn_block(turn: Turn, pass_: BlockPass) -> None:
    """Let a pass learn its sites of a unit, and the vectors that it trains there."""
    chosen = turn.chosen(pass_)
    if not chosen and (pass_.include or not _trained_vectors(turn, pass_)):
        return
    started = time.perf_counter()
    for site in chosen if pass_.adds_biases else ():
        make_room(turn.context, f"{site.name}.bias")
    before = {s.name: turn.weight(s) for s in chosen}
    targets = {s.name: turn.target(pass_, [s], [before[s.name]]) for s in chosen}
    try:
        edits, fallback = _block_edits(turn, pass_, targets), None
    except SolveError as error:
        edits = {name: pass_.at(name).stand_in().run(target) for name, target in targets.items()}
        fallback = f"{pass_.stand_in().key} instead of {pass_.key}: {error}"
    seconds = round((time.perf_counter() - started) / max(1, len(chosen)), 4)
    for name in [n for n in edits if n not in targets]:
        turn.take(pass_, turn.vector_made(pass_, name, edits[name]))
        turn.state.notes.setdefault(name, {})[pass_.key] = dict(edits[name].notes)
    for site in chosen:
        name = site.name
        made = SolvedSite(before[name], targets[name].weight, edits[name], fallback, seconds)
        turn.take(pass_, turn.record(pass_, site, made))


def _trained_vectors(turn: Turn, pass_: BlockPass) -> list[str]:
    view = turn.unit.view
    return [name for name in view.vectors() if pass_.trains(name)] if view else []


def _block_edits(turn: Turn, pass_: BlockPass, targets: Mapping[str, Target]) -> dict[str, Edit]:
    context, state, view = turn.context, turn.state, turn.unit.view
    others = {n: w.dequantize() for n, w in state.weights.items() if n not in targets}
    generator = turn.generator(turn.unit.name)
    with products(context.products), view.ready(targets.keys(), state.weights) if view else nullcontext():
        given = {name: turn.vector(name) for name in _trained_vectors(turn, pass_)}
        fixed = {**others, **{name: turn.vector(name) for name in state.vectors}}
        data = view.data(fixed) if view else None
        parts = partial(view.parts, fixed=fixed) if view else None
        block = Block(targets, data, generator, context.bars.over, given, turn.kept, parts)
        return dict(pass_.run(block))
