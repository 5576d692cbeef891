"""Passes, statistics and training loops on tensors of a device that is not the processor."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import textbook
import torch
from contract.test_passes import CONFIGURED, SHAPES, models
from elsewhere import elsewhere
from torch import Tensor

from compress.engine.devices import Devices
from compress.passes import BlockPass, DepthPass, LinearPass, MergePass, ModelPass, Pass
from compress.passes.base import Target

CPU = torch.device("cpu")
ALL = [*CONFIGURED]


def targets(pass_: Pass, device: torch.device, masked: float | None) -> dict[str, Target]:
    """One target a name, on a device, with the statistics the pass needs."""
    found = {}
    for seed, (name, (rows, columns)) in enumerate(SHAPES.items()):
        w = textbook.weight(rows, columns, seed).to(device)
        kept = None if masked is None else textbook.mask(rows, columns, seed, masked).to(device)
        x = textbook.inputs(columns, tokens=64, seed=seed).to(device)
        statistics = None if pass_.needs == "none" else textbook.statistics(x, pass_.needs)
        generator = torch.Generator().manual_seed(seed)
        original = w if pass_.compares else None
        found[name] = Target(w if kept is None else w * kept, kept, statistics, generator, original=original)
    return found


def results(pass_: Pass, device: torch.device) -> list[object]:
    """What a pass makes of tensors on a device."""
    if isinstance(pass_, MergePass):
        given = [{name: value.to(device) for name, value in model.items()} for model in models(pass_)]
        with Devices(device, CPU).scope():
            return list(textbook.merged(pass_, given).values())
    if isinstance(pass_, DepthPass):
        with Devices(device, CPU).scope():
            return [textbook.dropped(pass_, device=device)]
    given_targets = targets(pass_, device, None if "dense" in pass_.accepts else 0.5)
    if isinstance(pass_, ModelPass):
        whole = textbook.whole(given_targets)
        with Devices(device, CPU).scope():
            return [edit for _, edit in pass_.run(whole)]
    if isinstance(pass_, BlockPass):
        block = textbook.block(given_targets)
        with Devices(device, CPU).scope():
            return [edit for _, edit in pass_.run(block)]
    assert isinstance(pass_, LinearPass)
    with Devices(device, CPU).scope():
        return [pass_.run(target) for target in given_targets.values()]


def tensors(thing: object) -> Iterator[Tensor]:
    if isinstance(thing, Tensor):
        yield thing
    elif dataclasses.is_dataclass(thing):
        for f in dataclasses.fields(thing):
            yield from tensors(getattr(thing, f.name))


@pytest.mark.parametrize("pass_", ALL, ids=lambda p: f"{p.key}-{p.options()}")
def test_a_pass_computes_where_its_tensors_are(pass_: Pass) -> None:
    here = results(pass_, CPU)
    with elsewhere() as device:
        there = results(pass_, device)
        for a, b in zip(here, there, strict=True):
            pairs = list(zip(tensors(a), tensors(b), strict=True))
            for x, y in pairs:
                assert y.device == device
                assert torch.equal(x, y.cpu())
