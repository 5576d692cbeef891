"""What passes are given, made of random numbers: matrices with their statistics, blocks, experts, units, channels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from compress.calibration.ranges import Range
from compress.calibration.reconstruct import BlockData, HiddenSamples
from compress.calibration.statistics import Statistics
from compress.calibration.training import ModelData, TrainingStore
from compress.passes.interface import Block, Depth, ExpertsSeen, Target, UnitsSeen, Whole
from compress.passes.transform.scaling import ChannelsSeen
from compress.testing.broken import demand

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from compress.calibration.reconstruct import Weights
    from compress.calibration.statistics import Need
    from compress.calibration.training import Make
    from compress.passes.base import Pass
    from compress.passes.depth import DepthPass
    from compress.passes.experts import ExpertsPass
    from compress.passes.interface import Distance
    from compress.passes.transform.scaling import ScalingPass
    from compress.passes.width import WidthPass


def inputs(width: int, tokens: int = 256, seed: int = 0, dead: tuple[int, ...] = ()) -> Tensor:
    """(tokens, width) correlated inputs of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, device="cpu") / width**0.5 + torch.eye(width, device="cpu")
    x: Tensor = torch.randn(tokens, width, generator=generator, device="cpu") @ mix
    x *= torch.rand(width, generator=generator, device="cpu") * 3 + 0.2
    x[:, list(dead)] = 0
    return x


def weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    """(rows, columns) of a normal distribution."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1000 + seed), device="cpu")


def mask(rows: int, columns: int, seed: int = 0, share: float = 0.5) -> Tensor:
    """(rows, columns), True = kept, with this share of zeros."""
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(2000 + seed), device="cpu") >= share


def statistics(x: Tensor, need: Need = "gram") -> Statistics:
    """What a pass with a need is told of inputs."""
    found = Statistics(x.shape[-1], need, x.device)
    found.update(x, "a test")
    return found


def seen_by(pass_: Pass, x: Tensor) -> Statistics | None:
    """What a pass is given of inputs."""
    if pass_.needs == "none" and not pass_.ranged:
        return None
    found = statistics(x, pass_.needs)
    if pass_.ranged:
        found.range = Range()
        found.range.update(x)
    return found


def target(w: Tensor, x: Tensor | None = None, kept: Tensor | None = None) -> Target:
    """A matrix, and what is known of its inputs."""
    w = w if kept is None else w * kept
    return Target(w, kept, None if x is None else statistics(x), torch.Generator().manual_seed(0))


def device_of(targets: Mapping[str, Target]) -> torch.device:
    """Where they lie."""
    return next(iter(targets.values())).weight.device


def block(targets: Mapping[str, Target], samples: int = 6, seed: int = 0) -> Block:
    """A block whose matrices all read (the first columns of) one input; each sample is ten tokens."""
    width = max(t.weight.shape[1] for t in targets.values())
    x = inputs(width, tokens=10 * samples, seed=seed).view(samples, 10, width).to(device_of(targets))

    def call(weights: Weights, hidden: Tensor, _: Tensor) -> Tensor:
        return torch.cat([hidden[..., : w.shape[1]] @ w.T for w in weights.values()], dim=-1)

    outputs = call({name: t.weight for name, t in targets.items()}, x, torch.arange(samples))
    original, now, wanted = (HiddenSamples(torch.split(v, 4)) for v in (x, x + 0.01, outputs))
    data = BlockData(call, original, now, wanted)
    return Block(targets, data, torch.Generator().manual_seed(seed), lambda items, _, __: iter(items))


def whole(targets: Mapping[str, Target], samples: int = 6, seed: int = 0) -> Whole:
    """A model whose matrices all read (the first columns of) one input, and should put out something else."""
    width = max(t.weight.shape[1] for t in targets.values())
    x = inputs(width, tokens=samples, seed=seed).to(device_of(targets))
    wanted = {n: torch.tanh(x[:, : t.weight.shape[1]] @ t.weight.T) for n, t in targets.items()}

    def loss(make: Make, numbers: Tensor) -> Tensor:
        values = {name: t.weight for name, t in targets.items()} | dict(make(list(targets)))
        lost = [(x[numbers, : w.shape[1]] @ w.T - wanted[n][numbers]).square().mean() for n, w in values.items()]
        return torch.stack(lost).sum()

    data = ModelData(loss, samples, TrainingStore())
    return Whole(tuple(targets), targets.__getitem__, {}, data, torch.Generator().manual_seed(seed))


def dropped(pass_: DepthPass, seed: int = 0, device: str | torch.device = "cpu") -> tuple[list[int], int]:
    """What a pass takes out of six residual blocks, by their first numbers, and how many blocks are left."""
    blocks = [weight(8, 8, seed + i).to(device) / 10 for i in range(6)]
    left, gone = list(range(6)), []

    def distances(count: int, distance: Distance, last: bool) -> dict[int, float]:
        states = [inputs(8, tokens=15, seed=seed).view(3, 5, 8).double().to(device)]
        for i in left:
            states.append(states[-1] + torch.tanh(states[-1] @ blocks[i].double()))
        shown = [s[:, -1:] if last else s for s in states]
        before = [s.clone() for s in shown]
        found = {i: float(distance(shown[i], shown[i + count]).mean()) for i in range(len(left) + 1 - count)}
        same = all(torch.equal(a, b) for a, b in zip(before, shown, strict=True))
        demand(same, "its distance changes the states that it is given")
        return found

    for chosen in pass_.run(Depth(distances)):
        gone += [left[i] for i in chosen]
        left = [block for i, block in enumerate(left) if i not in chosen]
    return gone, len(left)


def experts_seen(pass_: ExpertsPass, groups: int = 1, seed: int = 0, device: str | torch.device = "cpu") -> ExpertsSeen:
    """What calibration data showed of twelve experts, of which the second may not go."""
    made = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 50, (12,), generator=made)
    weights = tokens.double() * torch.rand(12, generator=made, dtype=torch.float64)
    weighted = weights * torch.rand(12, generator=made, dtype=torch.float64)
    means = torch.randn(12, 4, generator=made, dtype=torch.float64)
    distances = (means[:, None] - means[None]).norm(dim=-1).to(device) if pass_.sees_distances else None
    # Beside one that may not become one with others there is one that is made of those.
    keep = groups * max(1 + pass_.merges, round(pass_.kept_of(12, groups) / groups))
    may = frozenset(range(12)) - {1}
    return ExpertsSeen(tokens.to(device), weighted.to(device), weights.to(device), keep, groups, may, distances)


def units_seen(pass_: WidthPass, width: int = 1, biased: bool = False, device: str | torch.device = "cpu") -> UnitsSeen:
    """Twelve units that a layer reads, of which five stay, with all that a pass asks for."""
    w, made = weight(6, 12 * width).to(device), torch.Generator().manual_seed(0)
    columns = torch.arange(12 * width, device=device).view(12, width)
    x = inputs(12 * width, tokens=100).to(device) + 0.5
    return UnitsSeen(
        w,
        columns,
        5,
        None if pass_.needs == "none" else statistics(x, pass_.needs),
        torch.rand(3, 12, generator=made, dtype=torch.float64).to(device) if pass_.sees_makers else None,
        torch.rand(12, generator=made, dtype=torch.float64).to(device) if pass_.sees_slopes else None,
        biased,
    )


def channels_seen(pass_: ScalingPass, width: int = 1, device: str | torch.device = "cpu") -> ChannelsSeen:
    """Twelve channels that two layers read, of inputs of very different size."""
    weights = tuple(weight(rows, 12 * width, rows).to(device) for rows in (6, 10))
    columns = torch.arange(12 * width, device=device).view(width, 12).T
    x = inputs(12 * width, tokens=100).to(device) * torch.logspace(-1, 1, 12 * width, device=device)
    return ChannelsSeen(weights, columns, statistics(x, pass_.needs))
