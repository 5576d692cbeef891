"""A pass with what it is given, and what it makes of that."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.calibration.statistics import Statistics
from compress.engine.devices import Devices
from compress.passes import (
    BlockPass,
    DepthPass,
    ExpertsPass,
    KvCache,
    LinearPass,
    MergePass,
    ModelPass,
    RecalibrateNorms,
    Rotate,
    ScalingPass,
    WidthPass,
)
from compress.passes.interface import Target
from compress.testing import merging, seen

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from compress.passes import Pass
    from compress.passes.interface import Edit

CPU = torch.device("cpu")
SHAPES = {"a": (8, 48), "b": (6, 48), "c": (10, 32)}


def tensors(thing: object) -> Iterator[Tensor]:
    """Every tensor inside a target, an edit, or whatever else passes are given and return."""
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, Statistics):  # which makes its Gram matrix when it is first asked for
        yield from (t for t in (thing.gram, thing.square_sum, thing.mean) if t is not None)
    elif dataclasses.is_dataclass(thing):
        for f in dataclasses.fields(thing):
            yield from tensors(getattr(thing, f.name))
    elif isinstance(thing, list | tuple):
        for each in thing:
            yield from tensors(each)
    elif hasattr(thing, "__dict__") and not isinstance(thing, torch.Generator):
        for value in vars(thing).values():
            yield from tensors(value)


class Trial:
    """A pass on small random matrices; of a pass that works on something else, on small ones of these.

    Args:
        pass_: with its options.
        shapes: name of a matrix -> (out, in); those that the pass says it cannot work on are left out, unless all are.
    """

    def __init__(self, pass_: Pass, shapes: Mapping[str, tuple[int, int]] = SHAPES):
        self.pass_ = pass_
        fitting = {name: shape for name, shape in shapes.items() if pass_.check_shape(shape) is None}
        self.shapes = fitting or dict(shapes)
        self._once: dict[float | None, tuple[dict[str, Target], dict[str, Edit]]] = {}

    def accepts(self, masked: float | None) -> bool:
        """Whether the pass works on matrices that are dense, or have a share of zeros."""
        return ("dense" if masked is None else "sparse") in self.pass_.accepts

    @property
    def share(self) -> float | None:
        """How many zeros the pass is given: none, unless it takes no dense weights."""
        return None if "dense" in self.pass_.accepts else 0.5

    def given(self, masked: float | None = None, device: torch.device = CPU) -> dict[str, Target]:
        """A target for each name, with the statistics that the pass needs and, if asked, a mask."""
        found = {}
        for seed, (name, (rows, columns)) in enumerate(self.shapes.items()):
            w = seen.weight(rows, columns, seed).to(device)
            kept = None if masked is None else seen.mask(rows, columns, seed, masked).to(device)
            statistics = seen.seen_by(self.pass_, seen.inputs(columns, tokens=64, seed=seed).to(device))
            generator = torch.Generator().manual_seed(seed)
            original = w if self.pass_.compares else None
            found[name] = Target(w if kept is None else w * kept, kept, statistics, generator, original=original)
        return found

    def edits(self, given: Mapping[str, Target]) -> dict[str, Edit]:
        """What a pass that returns edits makes of targets."""
        if isinstance(self.pass_, ModelPass):
            return _in_pairs(self.pass_.run(seen.whole(given)))
        if isinstance(self.pass_, BlockPass):
            return _in_pairs(self.pass_.run(seen.block(given)))
        assert isinstance(self.pass_, LinearPass)
        return {name: self.pass_.run(target) for name, target in given.items()}

    def once(self, masked: float | None) -> tuple[dict[str, Target], dict[str, Edit]]:
        """What the pass was given and what it made of that, for whoever only looks at it."""
        if masked not in self._once:
            given = self.given(masked)
            self._once[masked] = given, self.edits(given)
        return self._once[masked]

    def on(self, device: torch.device) -> list[object]:
        """What the pass makes of tensors on a device."""
        pass_ = self.pass_
        if isinstance(pass_, LinearPass | BlockPass | ModelPass):
            targets = self.given(self.share, device)
            with Devices(device, CPU).scope():
                return list(self.edits(targets).values())
        if isinstance(pass_, MergePass):
            models = [{name: value.to(device) for name, value in model.items()} for model in merging.models(pass_)]
            with Devices(device, CPU).scope():
                return list(merging.merged(pass_, models).values())
        return self._others(device)

    def _others(self, device: torch.device) -> list[object]:
        """What a pass that returns no edits of matrices makes of tensors on a device."""
        pass_ = self.pass_
        experts = seen.experts_seen(pass_, device=device) if isinstance(pass_, ExpertsPass) else None
        units = seen.units_seen(pass_, 2, True, device) if isinstance(pass_, WidthPass) else None
        channels = seen.channels_seen(pass_, 2, device) if isinstance(pass_, ScalingPass) else None
        moments = [seen.inputs(5, tokens=3, seed=seed).square().to(device) for seed in (0, 1)]
        with Devices(device, CPU).scope():
            if isinstance(pass_, DepthPass):
                return [seen.dropped(pass_, device=device)]
            if isinstance(pass_, ExpertsPass) and experts is not None:
                return [experts, pass_.scores(experts), pass_.run(experts)]
            if isinstance(pass_, WidthPass) and units is not None:
                return [pass_.run(units)]
            if isinstance(pass_, ScalingPass) and channels is not None:
                return [pass_.run(channels)]
            if isinstance(pass_, Rotate):
                return [pass_.run(24, keeps_mean, torch.Generator().manual_seed(0)) for keeps_mean in (False, True)]
            if isinstance(pass_, KvCache):
                return [pass_.run(*(each.amax(0) for each in moments))]
            if isinstance(pass_, RecalibrateNorms):
                return [pass_.run(*moments)]
        return []


def _in_pairs(found: Iterable[tuple[str, Edit]]) -> dict[str, Edit]:
    return dict(found)


__all__ = ["CPU", "SHAPES", "Trial", "tensors"]
