"""Task arithmetic with coefficients that are learned without labels, from how sure the merged model is.

Shapes: K task vectors, n elements of a piece, T tensors, C classes, or tokens of a vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt

from compress.calibration.samples import held_out_split
from compress.calibration.training import ModelData, Schedule, train
from compress.errors import OptionError
from compress.lazy import torch
from compress.passes.merge.base import MergePass
from compress.passes.merge.entropy import Coefficients, judged, loss, sureness
from compress.passes.merge.trimming import Surveyed, kept_of, limits

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from compress.passes.merge.base import Piece
    from compress.passes.merge.models import Models
    from compress.passes.merge.trimming import Limit

LEAST_SPREAD = 0.5  # of the entropy of the mean prediction at the start: below it, predictions have collapsed


@dataclass(frozen=True)
class LearnedCoefficients:
    """What was learned.

    Attributes:
        coefficients: tensor -> K of them, from 0 to 1.
        trimmed: tensor -> which entries of each task vector there are, with `trim`.
    """

    coefficients: Mapping[str, tuple[float, ...]]
    trimmed: Mapping[str, list[Limit]]


@dataclass(frozen=True, kw_only=True)
class AdaMerging(MergePass):
    """Add to the base what each fine-tune has learned, each by as much as makes the merged model sure of its answers.

    Coefficients are learned on the calibration data, without labels: give data of every task, several sources by name.
    The whole model is in memory while they are; of the others a tensor at a time. The derivative by a coefficient is
    the inner product of the merged tensor's gradient and the task vector: one backward pass serves all models.

    Source: Yang et al., "AdaMerging: Adaptive Model Merging for Multi-Task Learning", 2023, arXiv 2310.02575, sections
    3.2 and 3.3; `trim` is AdaMerging++. Differs from the paper in: one set of heads, which is merged too; a step draws
    its samples from the data of all tasks together; the learning rate warms up and decays; the best iterate on samples
    held out is kept; `diversity`, and an iterate that gives all of a source the same answer is never kept; of a
    language model, the entropy of every next token.

    Args:
        level: one coefficient for each `task`, or for each tensor (`layer`) of each task.
        initial: what every coefficient starts as; tensors that no gradient reaches, such as running means, keep it.
        trim: the share of entries that each task vector keeps, its largest, of which those with the elected sign are
            added; None adds all.
        steps: of Adam; 0 merges with the coefficients as they start.
        batch_size: calibration samples per step, of all tasks together.
        learning_rate: the largest.
        diversity: how much of the entropy of the mean prediction of each source is taken off the loss, so that
            different inputs keep different answers; 0 is the paper's.

    Example:
        >>> import torch
        >>> from compress import AdaMerging
        >>> from compress.passes.merge.adamerging import LearnedCoefficients
        >>> from compress.passes.merge.base import Piece
        >>> piece = Piece("weight", torch.tensor([1.0, 2.0]), (torch.tensor([2.0, 2.0]), torch.tensor([1.0, 0.0])))
        >>> AdaMerging(models=("maths", "code")).run(piece, LearnedCoefficients({"weight": (1.0, 0.5)}, {}))
        tensor([2., 1.])
    """

    level: Literal["task", "layer"] = "layer"
    initial: Annotated[float, Ge(0), Le(1)] = 0.3
    trim: Annotated[float, Ge(0), Le(1)] | None = None
    steps: Annotated[int, Ge(0)] = 500
    batch_size: Annotated[int, Ge(1)] = 32
    learning_rate: Annotated[float, Gt(0), Lt(1)] = 1e-3
    diversity: Annotated[float, Ge(0)] = 1.0

    key: ClassVar[str] = "adamerging"
    common: ClassVar[frozenset[str]] = MergePass.common | {
        "level", "initial", "trim", "steps", "batch_size", "learning_rate", "diversity",
    }  # fmt: skip

    @property
    def trains_whole(self) -> bool:
        return True

    @property
    def learns(self) -> bool:
        return True

    def check(self) -> Iterator[OptionError]:
        yield from super().check()
        if self.vocabulary == "common":
            yield OptionError("vocabulary", "the merged model is run as a whole; vocabularies must be of one size")

    def learn(self, models: Models) -> LearnedCoefficients:
        trimmed = self._trimmed(models) if self.trim is not None else {}
        found = {name: (self.initial,) * len(self.models) for name in models.names}
        with models.running() as running:
            start = {name: found[name] for name in running.names}
            coefficients = Coefficients(start, self.level, self.learning_rate, partial(self._parts, models, trimmed))
            held, _ = held_out_split(running.count)
            begin = sureness(running, coefficients.merged, held, self.batch_size)
            least = {source: LEAST_SPREAD * float(each.spread) for source, each in begin.items()}
            trial = train(
                coefficients,
                ModelData(partial(loss, running, self.diversity), running.count, running.kept),
                Schedule(self.steps, self.batch_size),
                models.generator,
                models.over,
                partial(judged, running, held, self.batch_size, self.diversity, least),
            )
            found |= coefficients.found()
        models.notes |= trial.notes() | {"coefficients": self._noted(found)}
        return LearnedCoefficients(found, trimmed)

    def run(self, piece: Piece, facts: LearnedCoefficients) -> Tensor:
        limits = facts.trimmed.get(piece.name)
        deltas = list(piece.deltas()) if limits is None else _trimmed_elected(piece.deltas(), limits, piece.start)
        total = piece.base.clone()
        for delta, coefficient in zip(deltas, facts.coefficients[piece.name], strict=True):
            total.add_(delta, alpha=coefficient)
        return total

    def _parts(self, models: Models, trimmed: Mapping[str, list[Limit]], name: str) -> tuple[Tensor, list[Tensor]]:
        """A tensor of the base, and what each task adds to it, read again."""
        base = models.value(0, name)
        deltas = (models.value(k, name) - base for k in range(1, len(self.models) + 1))
        if name not in trimmed:
            return base, list(deltas)
        kept = _trimmed_elected((d.flatten() for d in deltas), trimmed[name], 0)
        return base, [delta.view_as(base) for delta in kept]

    def _trimmed(self, models: Models) -> Mapping[str, list[Limit]]:
        """The largest entries of each whole task vector."""
        sizes = {name: models.value(0, name).numel() for name in models.names}

        def magnitudes() -> Iterator[list[Tensor]]:
            for name in models.over(models.names, len(sizes), "adamerging: trim"):
                yield [delta.flatten().abs_() for delta in self._parts(models, {}, name)[1]]

        assert self.trim is not None
        total = sum(sizes.values())
        whole = Surveyed(limits(magnitudes, total, [kept_of(self.trim, total)] * len(self.models)), sizes)
        return {name: whole.of(name) for name in sizes}

    def _noted(self, found: Mapping[str, tuple[float, ...]]) -> dict[str, list[float]]:
        """Coefficients for the report: per tensor, or once where all tensors share them."""
        rounded = {name: [round(c, 4) for c in each] for name, each in found.items()}
        return rounded if self.level == "layer" else {"": next(iter(rounded.values()))}


def _trimmed_elected(deltas: Iterable[Tensor], limits: Sequence[Limit], start: int) -> list[Tensor]:
    """Task vectors (n,) trimmed, and of them the entries that have the sign of their sum."""
    kept = [limit.trimmed(delta, start) for delta, limit in zip(deltas, limits, strict=True)]
    sign = torch.stack(kept).sum(0).sign()
    return [torch.where(delta.sign() == sign, delta, 0.0) for delta in kept]
