"""Which samples a training reads: those that are held out, and those of every step."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from compress.calibration.draws import draw
from compress.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

HELD_OUT = 16  # one in so many samples is not trained on


def forked(generator: torch.Generator, *parts: object) -> torch.Generator:
    """Randomness of one training of several: depends on the seed of all, and on what this one is called."""
    name = hashlib.sha256(repr((generator.initial_seed(), *parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(name[:7], "big"))


def held_out_split(count: int) -> tuple[Tensor, Tensor]:
    """Numbers of the samples that are held out, and of those that are trained on."""
    held = torch.arange(count)[:: min(HELD_OUT, count)]
    left = set(range(count)) - set(held.tolist())
    return held, torch.tensor(sorted(left) or held.tolist())


def batch(numbers: Tensor, step: int, size: int, seed: int) -> Tensor:
    """The samples of a step: every one comes once in each round, in an order that only depends on seed and round."""
    chosen = []
    for place in range((step - 1) * size, step * size):
        turn, within = divmod(place, len(numbers))
        generator = torch.Generator().manual_seed((seed + turn) % (1 << 63))
        order = draw(generator, (len(numbers),), "permutation", numbers)
        chosen.append(numbers[order[within]])
    return torch.stack(chosen)
