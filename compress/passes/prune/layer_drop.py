"""Depth pruning: whole blocks go, those that change their hidden states least.

Shapes: N samples, T positions, C channels of the hidden states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from compress.lazy import torch
from compress.passes.base import OptionError
from compress.passes.depth import DepthPass

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from compress.passes.interface import Depth


@dataclass(frozen=True, kw_only=True)
class LayerDrop(DepthPass):
    """Drop the blocks whose hidden states before and behind them are most similar.

    What is left is a smaller model of the same kind: fewer blocks, renumbered, nothing else changed.

    Source: `influence`: Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
    2024, arXiv 2403.03853, eq. 1; `angular`: Gromov et al., "The Unreasonable Ineffectiveness of the Deeper Layers",
    2024, arXiv 2403.17887, section 3. Differs from the papers in: `greedy` measures influence again after each block
    that went; healing is a pass of its own (put `perp` behind). In a model that does not read from left to right, the
    angle is the mean over all positions.

    Args:
        criterion: `influence` drops the blocks of least 1 - cos(input, output), the mean over all tokens, wherever they
            are. `angular` drops one run of neighbouring blocks: the one with the least angle between what it is given
            and its output, at the last token of each sample.
        greedy: one block at a time, with influence measured again in the model without it; False drops all at once.

    Example:
        >>> import compress
        >>> model, tokenizer = compress.demo.load()
        >>> tokens = compress.load_tokens("demo", tokenizer, samples=4, length=128)
        >>> result = compress.apply(model, [compress.LayerDrop(blocks=1)], calibration=tokens)
        >>> len(model.model.layers), len(result.model.model.layers), result.model.config.num_hidden_layers
        (6, 5, 5)
    """

    criterion: Literal["influence", "angular"] = "influence"
    greedy: bool = True

    key: ClassVar[str] = "layer_drop"

    @property
    def neighbours(self) -> bool:
        return self.criterion == "angular"

    def check(self) -> Iterator[OptionError]:
        if self.criterion == "angular" and not self.greedy:
            yield OptionError("greedy", "changes nothing with criterion angular, whose blocks go together")
        if self.overrides:
            yield OptionError("overrides", "a block goes or stays whole; use exclude for those that must stay")

    def run(self, model: Depth) -> Iterator[tuple[int, ...]]:
        if self.blocks and self.criterion == "angular":
            (first,) = least(model.distances(self.blocks, angular, True), 1)
            yield tuple(range(first, first + self.blocks))
            return
        at_once = 1 if self.greedy else self.blocks
        for _ in range(self.blocks // at_once if self.blocks else 0):
            yield tuple(sorted(least(model.distances(1, influence, False), at_once)))


def influence(before: Tensor, after: Tensor) -> Tensor:
    """1 - cos of two (N, T, C) hidden states, (N, T): the block influence."""
    return 1 - cosine(before, after)


def angular(before: Tensor, after: Tensor) -> Tensor:
    """arccos(cos) / pi of two (N, T, C) hidden states, (N, T): 0 for the same direction, 1 for the opposite one."""
    return torch.arccos(cosine(before, after).clamp(-1, 1)) / torch.pi


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """The cosine of the angle between vectors of C numbers. Two that are both zero count as equal."""
    sizes = (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    alike = (a == b).all(-1)
    return torch.where(alike, 1.0, (a * b).sum(-1) / sizes.clamp(min=torch.finfo(a.dtype).tiny))


def least(distances: Mapping[int, float], count: int) -> list[int]:
    """The `count` keys of the smallest values; of equal ones the first."""
    return sorted(distances, key=lambda place: (distances[place], place))[:count]
