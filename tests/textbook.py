"""The published algorithms written the slow and plain way, in float64 with an explicit inverse; and inputs for them."""

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from compress.calibration.ranges import Range
from compress.calibration.reconstruct import BlockData, HiddenSamples, Weights
from compress.calibration.statistics import Statistics
from compress.calibration.training import Make, ModelData, TrainingStore
from compress.encodings import Uniform, fit
from compress.passes.base import Block, Pass, Target, Whole
from compress.passes.depth import DepthPass
from compress.passes.experts import ExpertsPass
from compress.passes.interface import Depth, Distance, ExpertsSeen, UnitsSeen
from compress.passes.merge.base import MergePass, Piece
from compress.passes.merge.models import Models, Running, T, Tried
from compress.passes.transform.scaling import ChannelsSeen, ScalingPass
from compress.passes.width import WidthPass

Values = dict[str, Tensor]


def inputs(width: int, tokens: int = 256, seed: int = 0, dead: tuple[int, ...] = ()) -> Tensor:
    """(tokens, width) correlated inputs of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, device="cpu") / width**0.5 + torch.eye(width, device="cpu")
    x = torch.randn(tokens, width, generator=generator, device="cpu") @ mix
    x *= torch.rand(width, generator=generator, device="cpu") * 3 + 0.2
    x[:, list(dead)] = 0
    return x


def weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1000 + seed), device="cpu")


def mask(rows: int, columns: int, seed: int = 0, share: float = 0.5) -> Tensor:
    """True = kept."""
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(2000 + seed), device="cpu") >= share


def statistics(x: Tensor, need: str = "gram") -> Statistics:
    found = Statistics(x.shape[-1], need, x.device)  # type: ignore[arg-type]
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
    w = w if kept is None else w * kept
    return Target(w, kept, None if x is None else statistics(x), torch.Generator().manual_seed(0))


def device_of(targets: Mapping[str, Target]) -> torch.device:
    return next(iter(targets.values())).weight.device


def block(targets: Mapping[str, Target], samples: int = 6, seed: int = 0) -> Block:
    """A block whose matrices all read (the first columns of) one input; each sample is ten tokens."""
    width = max(t.weight.shape[1] for t in targets.values())
    x = inputs(width, tokens=10 * samples, seed=seed).view(samples, 10, width).to(device_of(targets))

    def call(weights: Weights, hidden: Tensor, _: Tensor) -> Tensor:
        return torch.cat([hidden[..., : w.shape[1]] @ w.T for w in weights.values()], dim=-1)

    outputs = call({name: t.weight for name, t in targets.items()}, x, torch.arange(samples))
    data = BlockData(call, *(HiddenSamples(torch.split(v, 4)) for v in (x, x + 0.01, outputs)))
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
        assert all(torch.equal(a, b) for a, b in zip(before, shown, strict=True)), "changes what it was given"
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


def merged(pass_: MergePass, models: Sequence[Mapping[str, Tensor]], piece: int = 1000, seed: int = 0) -> Values:
    """What a merge makes of models, the base first, whose tensors are cut into pieces of so many elements."""
    base, blocks = models[0], sorted({n.split(".")[1] for n in models[0] if n.startswith("blocks.")})

    def place(name: str) -> tuple[int | None, float, int, tuple[int, ...]]:
        """Every tensor is a layer of its own."""
        layer, shape = list(base).index(name), tuple(base[name].shape)
        if name.startswith("blocks."):
            block = blocks.index(name.split(".")[1])
            return block, block / max(1, len(blocks) - 1), layer, shape
        return None, 0.0, layer, shape

    def pieces(names: Sequence[str]) -> Iterator[Piece]:
        for name in names:
            seeds = (hash_of(seed, name, k) for k in range(len(models) - 1))
            generators = tuple(torch.Generator().manual_seed(number) for number in seeds)
            flat = [model[name].flatten() for model in models]
            shape = base[name].shape
            width = shape[1:].numel() if len(shape) > 1 else len(flat[0])
            step = max(1, piece // width) * width if pass_.whole_rows else piece
            for start in range(0, len(flat[0]), step):
                first, *others = (values[start : start + step].clone() for values in flat)
                yield Piece(name, first, tuple(others), generators, start, len(flat[0]), *place(name))

    found = pass_.learn(Wholes(models, piece, seed)) if pass_.learns else None
    if pass_.surveys:
        sizes = {name: value.numel() for name, value in base.items()}
        found = pass_.survey(lambda: pieces(list(base)), sizes)
    made = {}
    for name, value in base.items():
        own = pass_.at(name)
        facts = own.look(lambda name=name: pieces([name]), found) if own.looks else found
        made[name] = torch.cat([own.run(each, facts) for each in pieces([name])]).view(value.shape)
    return made


def block_of(name: str) -> int | None:
    """Of a tensor called blocks.3.mlp.weight 3; None where there is no number."""
    return int(name.split(".")[1]) if name.startswith("blocks.") else None


class Wholes(Models):
    """Models in memory as wholes. The nearer a merge is to a number, the better it is."""

    def __init__(self, models: Sequence[Mapping[str, Tensor]], piece: int = 1000, seed: int = 0, goal: float = 0.1):
        self.models, self.piece, self.seed, self.goal = models, piece, seed, goal
        self.names, self.notes = list(models[0]), {}
        self.tries: list[Pass] = []
        self.blocks = {name: block_of(name) for name in self.names}
        self.generator = torch.Generator().manual_seed(seed)

    def over(self, items: Iterable[T], total: int | None, label: object) -> Iterator[T]:
        return iter(items)

    def value(self, model: int, name: str) -> Tensor:
        return self.models[model][name]

    def tried(self, pass_: Pass, found: object = None) -> dict[str, Tried]:
        assert isinstance(pass_, MergePass)
        self.tries.append(pass_)
        return self.rated(merged(pass_, self.models, self.piece, self.seed))

    def tried_alone(self, model: int) -> dict[str, Tried]:
        return self.rated(self.models[model])

    def rated(self, values: Mapping[str, Tensor]) -> dict[str, Tried]:
        flips = sum(float((v - self.models[0][n]).abs().sum()) for n, v in values.items())
        return {"": Tried(sum(float((v - self.goal).square().sum()) for v in values.values()), None, flips)}

    @contextmanager
    def running(self) -> Iterator[Running]:
        """Two layers in a row: the first tensor that is a matrix, and the last."""
        names = [n for n in self.names if self.value(0, n).dim() == 2]
        first, last = names[0], names[-1]
        wide, narrow = self.value(0, first).shape[1], self.value(0, last).shape[1]
        x = torch.randn(32, wide, generator=torch.Generator().manual_seed(self.seed), device="cpu")
        x = x.to(self.value(0, first).device)

        def logits(make: Make, numbers: Tensor) -> Tensor:
            values = make([first, last])
            hidden = torch.tanh(x[numbers] @ values[first].T)[:, :narrow]
            return hidden @ values[last][:, : hidden.shape[1]].T

        yield Running(logits, len(x), TrainingStore(), (first, last), torch.arange(len(x)) % 2)


def hash_of(*parts: object) -> int:
    return zlib.crc32(repr(parts).encode())


def output_error(before: Tensor, after: Tensor, x: Tensor) -> float:
    """||(before - after) X||^2."""
    return float((x.double() @ (before - after).double().T).square().sum())


def inverse_factor(gram: Tensor, damping: float, order: Tensor | None = None) -> Tensor:
    """U, upper triangular, with H^-1 = U^T U for the damped H in a given order of columns."""
    h = gram.double().clone()
    dead = h.diagonal() == 0
    h += damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    h[dead, dead] = 1
    if order is not None:
        h = h[order][:, order]
    return torch.linalg.cholesky(torch.linalg.inv(h), upper=True)


def sweep_columns(w: Tensor, u: Tensor, choose: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Column by column: `choose` gives the values to keep of column j of the current weight; errors go right."""
    w = w.double().clone()
    out = torch.zeros_like(w)
    for j in range(w.shape[1]):
        out[:, j] = choose(j, w).double()
        error = (w[:, j] - out[:, j]) / u[j, j]
        w[:, j:] -= error[:, None] * u[j, j:]
    return out


def gptq(
    w: Tensor,
    gram: Tensor,
    kept: Tensor | None = None,
    *,
    bits: int,
    group_size: int | None = None,
    damping: float = 0.01,
    act_order: bool = False,
    symmetric: bool = False,
    search: str = "minmax",
    per_tensor: bool = False,
) -> Uniform:
    rows, columns = w.shape
    width = group_size or columns
    order = torch.argsort(gram.diagonal(), descending=True, stable=True) if act_order else torch.arange(columns)
    u = inverse_factor(gram, damping, order)
    options = {"symmetric": symmetric, "search": search}
    if act_order or group_size is None:
        scale, zero = fit(w, bits, groups=columns // width, per_tensor=per_tensor, **options)
        scale = scale.float().expand(rows, -1).clone()
        zero = zero.expand(rows, -1).clone()
    else:
        scale, zero = torch.zeros(rows, columns // width), torch.zeros(rows, columns // width, dtype=torch.uint8)
    codes = torch.zeros(rows, columns, dtype=torch.uint8)

    def choose(j: int, current: Tensor) -> Tensor:
        place = int(order[j])
        group = place // width
        if not act_order and group_size is not None and j % width == 0:
            s, z = fit(current[:, j : j + width].float(), bits, **options)
            scale[:, group], zero[:, group] = s[:, 0].float(), z[:, 0]
        s, z = scale[:, group].double(), zero[:, group].double()
        code = ((current[:, j] / s).round() + z).clamp(0, 2**bits - 1)
        if kept is not None:
            code = torch.where(kept[:, place], code, z)
        codes[:, place] = code.to(torch.uint8)
        return (code - z) * s

    sweep_columns(w[:, order], u, choose)
    return Uniform(codes, scale, zero, bits, symmetric)


def lowest(scores: Tensor, count: int) -> Tensor:
    """Mask without the `count` lowest scores of the whole matrix."""
    chosen = torch.ones(scores.numel(), dtype=torch.bool)
    chosen[torch.argsort(scores.flatten(), stable=True)[:count]] = False
    return chosen.view(scores.shape)


def sparsegpt(
    w: Tensor,
    gram: Tensor,
    *,
    sparsity: float | None = None,
    n_of_m: tuple[int, int] | None = None,
    damping: float = 0.01,
    tile: int = 128,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    u = inverse_factor(gram, damping)
    every = n_of_m[1] if n_of_m else tile
    chosen = torch.ones(w.shape, dtype=torch.bool)

    def choose(j: int, current: Tensor) -> Tensor:
        if j % every == 0:
            stop = min(j + every, w.shape[1])
            scores = current[:, j:stop] ** 2 / u.diagonal()[j:stop] ** 2
            if kept is not None:
                scores = scores.masked_fill(~kept[:, j:stop], -1)
            if n_of_m:
                part = torch.stack([lowest(row, n_of_m[1] - n_of_m[0]) for row in scores])
            else:
                part = lowest(scores, int(scores.numel() * sparsity))
            chosen[:, j:stop] = part if kept is None else part & kept[:, j:stop]
        return current[:, j] * chosen[:, j]

    return sweep_columns(w, u, choose), chosen


def rows_that_differ(a: Tensor, b: Tensor) -> int:
    """Rows are solved independently; a tie broken by the last bit can change one row, a wrong formula changes all."""
    return int((a != b).any(dim=1).sum())


def fine_tunes(count: int, size: float = 0.1) -> list[Values]:
    """A model of three blocks, and `count` others that are a little different."""
    generator = torch.Generator().manual_seed(11)
    shapes = {"first.weight": (9, 4), "last.weight": (5, 5)}
    shapes |= {
        f"blocks.{k}.{name}": shape for k in range(3) for name, shape in (("mlp.weight", (6, 8)), ("bias", (7,)))
    }
    names = sorted(shapes, key=lambda n: (n.startswith("last"), not n.startswith("first"), n))
    base = {name: torch.randn(shapes[name], generator=generator) for name in names}
    return [
        base,
        *({n: v + size * torch.randn(v.shape, generator=generator) for n, v in base.items()} for _ in range(count)),
    ]
