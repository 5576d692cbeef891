"""Models in memory, and what a merge makes of them."""

from __future__ import annotations

import zlib
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch

from compress.calibration.training import TrainingStore
from compress.passes.merge.base import MergePass, Piece
from compress.passes.merge.models import Models, Running, Tried

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from compress.calibration.training import Make
    from compress.passes.base import Pass
    from compress.passes.merge.models import T


def models(pass_: MergePass, size: float = 0.1) -> list[dict[str, Tensor]]:
    """The base and as many others as a pass merges with it: two blocks, and a tensor before and behind them."""
    shapes = {"first.weight": (9, 4), "blocks.0.mlp.weight": (6, 8), "blocks.1.bias": (7,), "last.weight": (5, 5)}
    generator = torch.Generator().manual_seed(5)
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    others = range(len(pass_.models))
    return [base, *(_near(base, size, generator) for _ in others)]


def _near(base: Mapping[str, Tensor], size: float, generator: torch.Generator) -> dict[str, Tensor]:
    return {name: value + size * torch.randn(value.shape, generator=generator) for name, value in base.items()}


def merged(
    pass_: MergePass, models: Sequence[Mapping[str, Tensor]], piece: int = 1000, seed: int = 0
) -> dict[str, Tensor]:
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
        facts = own.look(partial(pieces, [name]), found) if own.looks else found
        made[name] = torch.cat([own.run(each, facts) for each in pieces([name])]).view(value.shape)
    return made


def block_of(name: str) -> int | None:
    """The number in a name such as blocks.3.mlp.weight; None where there is none."""
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
        """How far values are from the goal."""
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
    """A number for a seed."""
    return zlib.crc32(repr(parts).encode())
