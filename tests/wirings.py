"""Small models whose blocks are wired in different ways."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 32


class Block(nn.Module):
    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.gate = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x + self.down(torch.tanh(self.gate(x)) * self.up(x))


class Model(nn.Module):
    """Blocks one after the other."""

    block: Callable[[], nn.Module] = Block

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([type(self).block() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x


class SkipOutside(Model):
    """What a block puts out is not what the next one gets."""

    def forward(self, x: Tensor) -> Tensor:
        x = first = self.embed(x)
        for block in self.blocks:
            x = block(x) + 0.5 * first
        return x


class SkipBlock(Block):
    def forward(self, x: Tensor, first: Tensor) -> Tensor:
        return super().forward(x + 0.5 * first)


class SkipInside(Model):
    """Every block is also given the embedding: the very tensor that the first block gets as its hidden states."""

    block = SkipBlock

    def forward(self, x: Tensor) -> Tensor:
        x = first = self.embed(x)
        for block in self.blocks:
            x = block(x, first)
        return x
