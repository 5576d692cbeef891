"""Training: the one loop of every pass that learns by gradients, from a block's outputs or from the model's loss.

A method says which numbers are learned and what values they make; this loop follows the schedule of the learning rate,
keeps the best iterate by the error on samples that were not trained on, the start among them, and saves where it
stands, so that an interrupted training goes on to the same bits.

Shapes: N samples, B samples per step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, TypeAlias, runtime_checkable

from compress.calibration.in_one_order import InOneOrder
from compress.calibration.samples import batch, held_out_split
from compress.calibration.shares import ALONE
from compress.errors import SolveError
from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from compress.calibration.shares import Shares

Loss = Literal["next_token", "distill"]
Label = str | Callable[[], str]  # of a progress bar; a function is asked again at every step
Values: TypeAlias = "Mapping[str, Tensor]"  # site or vector -> value
Make = Callable[[Collection[str]], Values]

LOOKS = 5  # times the held-out loss is measured while training
WARM_UP = 0.1  # share of the steps in which the learning rate rises


class Trained(Protocol):
    """What a method learns: numbers, and the values they stand for."""

    def groups(self) -> list[tuple[list[Tensor], float]]:
        """Learned tensors with their learning rates."""

    def make(self, names: Collection[str]) -> Values:
        """Differentiable values of some of the learned parameters."""

    def merged(self, names: Collection[str]) -> Values:
        """The values that would be stored now."""


@runtime_checkable
class Following(Protocol):
    """What is learned where something follows each step."""

    def stepped(self, step: int) -> None:
        """Called when the optimizer has changed the learned tensors in step 1, 2, ..."""

    def state(self) -> list[Tensor]:
        """What else belongs to an iterate and is changed in place."""


class TrainingStore:
    """Where the state of an unfinished training is kept, so that it can go on. This one keeps nothing."""

    def part(self, name: str) -> TrainingStore:
        """The place of one training of several."""
        return self

    def load(self) -> dict[str, Tensor] | None:
        """The state kept last, or None."""
        return None

    def save(self, state: dict[str, Tensor]) -> None:
        """Keep a state in the place of the one before."""


@dataclass(frozen=True)
class ModelData:
    """A model to train.

    Attributes:
        loss: (values on demand, numbers of samples (B,)) -> the mean loss, differentiable in the values.
        count: N.
        kept: where the state of an unfinished training is kept.
        shares: how processes share the samples of a step. Of a loss that is no mean over samples they share none.
    """

    loss: Callable[[Make, Tensor], Tensor]
    count: int
    kept: TrainingStore
    shares: Shares = ALONE

    def part(self, name: str) -> ModelData:
        """The same model and data for one training of several, whose state is kept by itself."""
        return replace(self, kept=self.kept.part(name))

    def backward(self, make: Make, numbers: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """The mean loss on samples, detached; its gradients are set in what is learned."""
        own, _ = self.shares.own(numbers)
        if len(own):
            value = self.loss(make, own) * (len(own) / len(numbers))
        else:  # other processes have all of them
            value = torch.zeros((), device=tensors[0].device)
        return self.shares.backward(value, tensors)

    def mean_loss(self, make: Make, numbers: Tensor, batch_size: int) -> float:
        """The mean loss on samples, so many at a time."""
        total = 0.0
        with torch.no_grad():
            for part in torch.split(numbers, batch_size):
                own, _ = self.shares.own(part)
                if len(own):
                    total += float(self.loss(make, own)) * len(own)
        return self.shares.total(total) / len(numbers)


@dataclass(frozen=True)
class Schedule:
    """How to train.

    Attributes:
        steps: of Adam.
        batch_size: samples per step.
    """

    steps: int
    batch_size: int

    def loop(self) -> Loop:
        """The loop that trains so: linear warm-up, then linear decay to zero."""
        return Loop(self.steps, self.rate, LOOKS, "train")

    def rate(self, step: int) -> float:
        """The learning rate in step 1, 2, ... as a share of its largest."""
        warm = max(1, round(WARM_UP * self.steps))
        if step <= warm:
            return step / warm
        return (self.steps - step + 1) / (self.steps - warm + 1)


@dataclass(frozen=True)
class Outcome:
    """What training reached.

    Attributes:
        start, best: the error, as the learner measures it, before and at the best iterate.
        best_step: when; 0 means that nothing learned was better than the start.
    """

    start: float
    best: float
    best_step: int

    def notes(self, name: str = "loss") -> dict[str, float]:
        """The numbers for the report, under the name of what was measured."""
        return {f"{name}_start": self.start, name: self.best, "best_step": self.best_step}


class Learner:
    """What the loop learns: tensors, their gradients in a step, and how good the iterate is."""

    not_finite: ClassVar[str] = "the loss is not finite before anything is trained"

    def groups(self) -> list[tuple[list[Tensor], float]]:
        """Learned tensors with their largest learning rates."""
        raise NotImplementedError

    def gradients(self, step: int) -> Tensor:
        """Set the gradients of the learned tensors in step 1, 2, ...; returns the loss, detached."""
        raise NotImplementedError

    def error(self) -> float:
        """How far from good the values are that would be stored now."""
        raise NotImplementedError

    def after(self, step: int) -> None:
        """Called when the optimizer has changed the learned tensors."""

    def state(self) -> list[Tensor]:
        """What else belongs to an iterate and is changed in place."""
        return []

    def restored(self) -> None:
        """Called when learned tensors and `state` were put back to an earlier iterate."""

    def randomness(self) -> dict[str, Tensor]:
        """What the draws of the next steps depend on, beside the number of the step."""
        return {}

    def reseed(self, randomness: Mapping[str, Tensor]) -> None:
        """The inverse of `randomness`."""


@dataclass(frozen=True)
class Loop:
    """How to learn.

    Attributes:
        steps: of Adam.
        rate: step 1, 2, ... -> the learning rate as a share of its largest.
        looks: times the error is measured; the best iterate is kept.
        label: of the progress bar.
        fused: whether Adam runs as one kernel, which rounds differently from one operation after the other.
        spacing: least seconds between two saved states.
    """

    steps: int
    rate: Callable[[int], float]
    looks: int
    label: str
    fused: bool = True
    spacing: float = 0.0


def learn(
    learner: Learner, loop: Loop, kept: TrainingStore, over: Callable[[Iterable[int], int, Label], Iterator[int]]
) -> Outcome:
    """The one training loop. Afterwards the learner holds the best iterate; the start counts as one.

    Args:
        learner: what is learned.
        loop: how long, and at which rate.
        kept: where the state of an unfinished training is kept, and where it goes on from.
        over: draws progress.

    Raises:
        SolveError: the error is not finite at the start.
    """
    groups = [{"params": ts, "lr": lr, "most": lr} for ts, lr in learner.groups()]
    optimizer = torch.optim.Adam(groups, fused=loop.fused)
    run, ordered, learned = _Run(learner, optimizer), InOneOrder(), [t for ts, _ in learner.groups() for t in ts]
    state = kept.load()
    if state is None:
        run.begin()
    else:
        run.restore(state)
    look, saved = max(1, loop.steps // loop.looks), time.monotonic()
    for step in over(range(run.step + 1, loop.steps + 1), loop.steps - run.step, partial(run.label, loop.label)):
        for group in optimizer.param_groups:
            group["lr"] = group["most"] * loop.rate(step)
        looks = step % look == 0 or step == loop.steps
        with torch.enable_grad():
            run.took(ordered(partial(learner.gradients, step), learned))
        if (looks or run.at_hand) and not run.finite():
            break  # diverged: what was best stays
        optimizer.step()
        optimizer.zero_grad()
        learner.after(step)
        run.step = step
        if looks:
            run.look()
            if time.monotonic() - saved >= loop.spacing:
                kept.save(run.state())
                saved = time.monotonic()
    run.finish()
    return Outcome(run.start, run.best, run.best_step)


def train(
    trained: Trained,
    data: ModelData,
    schedule: Schedule,
    generator: torch.Generator,
    over: Callable[[Iterable[int], int, Label], Iterator[int]],
    judge: Callable[[Make], float] | None = None,
) -> Outcome:
    """Train a whole model; afterwards `trained` holds the best iterate.

    Args:
        trained: what is learned.
        data: the model to train.
        schedule: how long, and at which rate.
        generator: randomness of the order of samples.
        over: draws progress.
        judge: what makes an iterate better, less is better; the mean loss on samples held out by default.

    Raises:
        SolveError: the loss is not finite at the start.
    """
    return learn(_Model(trained, data, schedule, generator.initial_seed(), judge), schedule.loop(), data.kept, over)


class _Model(Learner):
    """Values of a model, learned through its loss."""

    def __init__(
        self, trained: Trained, data: ModelData, schedule: Schedule, seed: int, judge: Callable[[Make], float] | None
    ):
        self.trained, self.data, self.size, self.seed, self.judge = trained, data, schedule.batch_size, seed, judge
        self.held, self.learned = held_out_split(data.count)
        self.tensors = [t for ts, _ in trained.groups() for t in ts]

    def groups(self) -> list[tuple[list[Tensor], float]]:
        return self.trained.groups()

    def gradients(self, step: int) -> Tensor:
        numbers = batch(self.learned, step, self.size, self.seed)
        return self.data.backward(self.trained.make, numbers, self.tensors)

    def after(self, step: int) -> None:
        if isinstance(self.trained, Following):
            self.trained.stepped(step)

    def state(self) -> list[Tensor]:
        return self.trained.state() if isinstance(self.trained, Following) else []

    def error(self) -> float:
        if self.judge:
            return self.judge(self.trained.merged)
        return self.data.mean_loss(self.trained.merged, self.held, self.size)


class _Run:
    """Where a training stands."""

    def __init__(self, learner: Learner, optimizer: torch.optim.Optimizer):
        self.learner, self.optimizer = learner, optimizer
        self.iterate = [t for group in optimizer.param_groups for t in group["params"]] + learner.state()
        self.step = self.best_step = 0
        self.start = self.best = math.nan
        self.loss: float | None = None  # as it was last read
        self.losses: list[Tensor] = []  # not read yet
        self.at_hand = all(t.device.type == "cpu" for t in self.iterate)  # elsewhere, reading waits for the device
        self.kept: list[Tensor] = []

    def took(self, loss: Tensor) -> None:
        """Take note of the loss of a step."""
        self.losses.append(loss)

    def finite(self) -> bool:
        """Read the losses; whether all of them are finite."""
        losses, self.losses = torch.stack(self.losses).tolist(), []
        self.loss = losses[-1]
        return all(math.isfinite(loss) for loss in losses)

    def begin(self) -> None:
        """Measure the start, which is the best so far."""
        self.start = self.best = self.learner.error()
        if not math.isfinite(self.start):
            raise SolveError(self.learner.not_finite)
        self.kept = [t.detach().clone() for t in self.iterate]

    def look(self) -> None:
        """Measure the iterate, and keep it if it is the best."""
        now = self.learner.error()
        if now < self.best:
            self.best, self.best_step = now, self.step
            self.kept = [t.detach().clone() for t in self.iterate]

    def finish(self) -> None:
        """Go back to the best."""
        self._put(self.kept)

    def label(self, label: str) -> str:
        """What the progress bar says."""
        return f"{label}: steps" if self.loss is None else f"{label}: steps, loss {self.loss:.4f}"

    def state(self) -> dict[str, Tensor]:
        """Everything that the rest depends on."""
        numbers = [self.step, self.best_step, self.start, self.best]
        found = {"numbers": torch.tensor(numbers, dtype=torch.float64)}
        found |= {f"random.{name}": value for name, value in self.learner.randomness().items()}
        for i, (tensor, kept) in enumerate(zip(self.iterate, self.kept, strict=True)):
            found |= {f"{i}.now": tensor.detach().contiguous(), f"{i}.kept": kept.contiguous()}
            found |= {f"{i}.{name}": value for name, value in self.optimizer.state.get(tensor, {}).items()}
        return found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""
        step, best_step, self.start, self.best = state["numbers"].tolist()
        self.step, self.best_step = int(step), int(best_step)
        self.kept = [state[f"{i}.kept"].to(tensor.device) for i, tensor in enumerate(self.iterate)]
        for i, tensor in enumerate(self.iterate):
            own = {n: state[f"{i}.{n}"] for n in ("step", "exp_avg", "exp_avg_sq") if f"{i}.{n}" in state}
            moments = {name: value.to(tensor.device) for name, value in own.items()}
            if moments:
                self.optimizer.state[tensor] = moments
        self._put([state[f"{i}.now"] for i in range(len(self.iterate))])
        prefix = "random."
        self.learner.reseed({n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)})

    def _put(self, values: Iterable[Tensor]) -> None:
        with torch.no_grad():
            for tensor, value in zip(self.iterate, values, strict=True):
                tensor.copy_(value.to(tensor.device))
        self.learner.restored()
