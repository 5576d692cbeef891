"""A soup of those models only that make it better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from compress.passes.merge.average import Average, weighted_mean
from compress.passes.merge.base import MergePass
from compress.passes.merge.grid_search import noted, score

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from compress.passes.merge.base import Piece
    from compress.passes.merge.models import Models


@dataclass(frozen=True, kw_only=True)
class GreedySoup(MergePass):
    """The mean of the best model and of those others that, one after the other, do not make it worse.

    Judged on the calibration data: accuracy of a classifier, else loss, mean over the sources. There the result is
    never worse than the best single model. Evaluation data is not looked at.

    Source: Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy without
    increasing inference time", 2022, arXiv 2203.05482, recipe 1.

    Args:
        base: whether the model that the pipeline is run on is one of the candidates, as a fine-tune like the others;
            without, it gives what is not merged and nothing else.

    Example:
        >>> import torch
        >>> from compress import GreedySoup
        >>> from compress.passes.merge.base import Piece
        >>> piece = Piece("weight", torch.tensor([1.0, 2.0]), (torch.tensor([3.0, 2.0]), torch.tensor([9.0, 9.0])))
        >>> GreedySoup(models=("first", "second")).run(piece, (0, 1))
        tensor([2., 2.])
    """

    base: bool = True

    key: ClassVar[str] = "greedy_soup"
    common: ClassVar[frozenset[str]] = MergePass.common | {"base"}

    @property
    def judged(self) -> bool:
        return True

    @property
    def learns(self) -> bool:
        return True

    def learn(self, models: Models) -> tuple[int, ...]:
        """The models of the soup: 0 is the base."""
        candidates = list(range(0 if self.base else 1, len(self.models) + 1))
        alone = {
            k: models.tried(self.soup([k])) for k in models.over(candidates, len(candidates), "greedy_soup: alone")
        }
        order = sorted(candidates, key=lambda k: -score(alone[k]))  # of equals the first
        members, best = order[:1], score(alone[order[0]])
        steps = [{"models": list(members), "found": noted(alone[order[0]])}]
        for k in models.over(order[1:], len(order) - 1, "greedy_soup: candidates"):
            found = models.tried(self.soup([*members, k]))
            steps.append({"models": [*members, k], "found": noted(found)})
            if score(found) >= best:
                members, best = [*members, k], score(found)
        models.notes |= {"alone": {str(k): noted(found) for k, found in alone.items()}, "steps": steps, "soup": members}
        return tuple(members)

    def soup(self, members: Sequence[int]) -> Average:
        """The uniform soup of some models."""
        weights = tuple(float(k in members) for k in range(len(self.models) + 1))
        plain = {"models": self.models, "vocabulary": self.vocabulary}
        return Average(**plain, weights=weights, include=self.include, exclude=self.exclude)  # type: ignore[arg-type]

    def run(self, piece: Piece, facts: tuple[int, ...]) -> Tensor:
        everything = (piece.base, *piece.others)
        return weighted_mean(everything, [float(k in facts) for k in range(len(everything))], normalize=True)
