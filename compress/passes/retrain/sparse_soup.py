"""Sparse model soups: train several copies of a pruned model a little, and average them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge, Lt

from compress.calibration.samples import forked, held_out_split
from compress.calibration.training import train
from compress.lazy import torch
from compress.passes.base import Edit, OptionError
from compress.passes.prune.global_magnitude import smallest_cut, unreachable
from compress.passes.retrain.options import EndToEnd, TrainingOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor

    from compress.calibration.training import ModelData
    from compress.passes.base import Target, Whole

RATIO = 2.0  # between the learning rates of two copies


@dataclass(frozen=True, kw_only=True)
class SparseSoup(EndToEnd, TrainingOptions):
    """Train several copies of a pruned model, each from the same zeros, and take their average.

    The average has the zeros that all copies have. The whole model, and one more set of its matrices per copy, is in
    memory. Normalisations keep their running statistics, which no copy changes.

    Source: Zimmer, Spiegel and Pokutta, "Sparse Model Soups", 2023, arXiv 2306.16788. Differs from the paper in: copies
    are trained as `perp` trains; members are compared by their loss on held-out calibration samples; learning rates of
    the copies are powers of two around `learning_rate`.

    Args:
        models: copies.
        vary: what differs between them: the `seed` (order of samples, start of adapters) or the `learning_rate` too.
        soup: `uniform` averages all; `greedy` starts from the best and adds those that do not make the average worse.
        phases: prune a part, train, average, and so on.
        sparsity: of global magnitude pruning, reached in equal factors over the phases; None leaves the zeros that are
            there, and there is one phase.
        min_keep: weights every layer keeps in every phase, as a share of all selected weights.

    Example:
        >>> import torch, compress
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 8))
        >>> passes = [compress.Magnitude(sparsity=0.5), compress.SparseSoup(models=2, steps=2)]
        >>> result = compress.apply(model, passes, calibration=torch.randn(16, 64))
        >>> round(float((result.model[0].weight == 0).float().mean()), 2)
        0.5
    """

    models: Annotated[int, Ge(1)] = 3
    vary: Literal["seed", "learning_rate"] = "seed"
    soup: Literal["uniform", "greedy"] = "uniform"
    phases: Annotated[int, Ge(1)] = 1
    sparsity: Annotated[float, Ge(0), Lt(1)] | None = None
    min_keep: Annotated[float, Ge(0), Lt(1)] = 0.0

    key: ClassVar[str] = "sparse_soup"

    def check(self) -> Iterator[OptionError]:
        yield from super().check()
        if self.sparsity is None and self.phases > 1:
            yield OptionError("phases", "each prunes a part: set sparsity too, or leave phases at 1")
        if self.sparsity is None and self.min_keep:
            yield OptionError("min_keep", "is a floor under pruning: set sparsity too, or leave it out")
        for name in ("head", "lora", "scale"):
            if name in self.train:
                yield OptionError("train", f"{name} cannot be averaged here; name sets such as mask_lora, full or norm")

    def check_shapes(self, shapes: Mapping[str, tuple[int, int]]) -> OptionError | None:
        return None if self.sparsity is None else unreachable(shapes, self.sparsity, self.min_keep)

    @property
    def trainings(self) -> int:
        return self.models * self.phases

    def refusal(self, kind: str) -> str | None:
        if kind == "dense" and self.sparsity is None:
            return None  # a soup of dense models is a soup
        return super().refusal(kind)

    def produces(self, kind: str) -> str:
        return kind if self.sparsity is None else "sparse"

    def run(self, model: Whole) -> Iterator[tuple[str, Edit]]:
        assert model.data is not None
        targets = {name: model.load(name) for name in model.names}
        vectors = dict(model.vectors)
        notes: dict[str, float] = {}
        for phase in range(1, self.phases + 1):
            if self.sparsity is not None:
                share = 1 - (1 - self.sparsity) ** (phase / self.phases)
                masks = dict(smallest_cut(model.names, targets.__getitem__, share, self.min_keep))
                targets = {
                    n: replace(t, weight=t.weight * masks[n], mask=masks[n], stored=None) for n, t in targets.items()
                }
            members = [self._member(k, phase, model, targets, vectors) for k in range(self.models)]
            made, notes = self._average(members, model.data)
            targets = {name: replace(t, weight=made[name], stored=None) for name, t in targets.items()}
            vectors = {name: made[name] for name in vectors}
        for name, target in targets.items():
            yield name, Edit(weight=target.weight, mask=target.mask, notes=notes)
        yield from ((name, Edit(weight=vector, notes=notes)) for name, vector in vectors.items())

    def _member(
        self, number: int, phase: int, model: Whole, targets: Mapping[str, Target], vectors: Mapping[str, Tensor]
    ) -> Member:
        assert model.data is not None
        rate = self.learning_rate * (RATIO ** (number - (self.models - 1) / 2) if self.vary == "learning_rate" else 1.0)
        own = {n: replace(t, generator=forked(model.generator, phase, number, n)) for n, t in targets.items()}
        trained = replace(self, learning_rate=rate).trainables(own, vectors)
        generator = forked(model.generator, phase, number)
        trial = train(trained, model.data.part(f"{phase}-{number}"), self.schedule, generator, model.over)
        return Member({n: v.detach().clone() for n, v in trained.merged(trained.names()).items()}, trial.best)

    def _average(self, members: list[Member], data: ModelData) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The soup, and for the report its loss beside its members'."""
        held, _ = held_out_split(data.count)

        def lost(values: Mapping[str, Tensor]) -> float:
            return data.mean_loss(lambda names: {n: values[n] for n in names if n in values}, held, self.batch_size)

        chosen = greedy(members, lost) if self.soup == "greedy" else members
        made = member_mean([m.values for m in chosen])
        best = min(m.loss for m in members)
        return made, {"loss": lost(made), "loss_best_member": best, "members": len(chosen)}


@dataclass(frozen=True)
class Member:
    """One trained copy.

    Attributes:
        values: of every site and vector.
        loss: on held-out samples.
    """

    values: Mapping[str, Tensor]
    loss: float


def member_mean(members: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The average of each value; that of equal ones is the same to the bit."""
    first, count = members[0], len(members)
    return {n: v + sum((m[n] - v for m in members[1:]), torch.zeros_like(v)) / count for n, v in first.items()}


def greedy(members: list[Member], lost: Callable[[Mapping[str, Tensor]], float]) -> list[Member]:
    """From the best on, every member that does not make the average worse."""
    ordered = sorted(members, key=lambda m: m.loss)
    chosen, best = ordered[:1], ordered[0].loss
    for member in ordered[1:]:
        now = lost(member_mean([m.values for m in (*chosen, member)]))
        if now <= best:
            chosen, best = [*chosen, member], now
    return chosen
