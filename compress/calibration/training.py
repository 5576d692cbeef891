"""Training: the one loop of every pass that trains a whole model on its calibration data.

A method says which numbers are learned and what values they make; this loop draws batches, follows the learning rate's
schedule (linear warm-up, then linear decay to zero), and keeps the best iterate by the loss on samples that were not
trained on. The start counts as an iterate.

Shapes: N samples, B samples a step.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

from compress.calibration.draws import draw
from compress.errors import SolveError
from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch import Tensor

Loss = Literal["next_token", "distill"]
Label = str | Callable[[], str]  # of a progress bar; a function is asked again at every step
Values: TypeAlias = "Mapping[str, Tensor]"  # site or vector -> value
Make = Callable[[Collection[str]], Values]

LOOKS = 5  # times the held-out loss is measured while training
HELD_OUT = 16  # one in so many samples is not trained on
WARM_UP = 0.1  # share of the steps in which the learning rate rises


class Trained(Protocol):
    """What a method learns: numbers, and the values they stand for."""

    def groups(self) -> list[tuple[list[Tensor], float]]:
        """Learned tensors with their learning rates."""

    def make(self, names: Collection[str]) -> Values:
        """Differentiable values of some of the learned parameters."""

    def merged(self, names: Collection[str]) -> Values:
        """The values that would be stored now."""


class Kept:
    """Where the state of an unfinished training is kept, so that it can go on. This one keeps nothing."""

    def part(self, name: str) -> Kept:
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
    """

    loss: Callable[[Make, Tensor], Tensor]
    count: int
    kept: Kept

    def part(self, name: str) -> ModelData:
        """The same for one training of several."""
        return replace(self, kept=self.kept.part(name))


@dataclass(frozen=True)
class Schedule:
    """How to train.

    Attributes:
        steps: of Adam.
        batch_size: samples a step.
    """

    steps: int
    batch_size: int

    def rate(self, step: int) -> float:
        """The learning rate in step 1, 2, ... as a share of its largest."""
        warm = max(1, round(WARM_UP * self.steps))
        if step <= warm:
            return step / warm
        return (self.steps - step + 1) / (self.steps - warm + 1)


@dataclass(frozen=True)
class Trial:
    """What training reached.

    Attributes:
        start, best: mean loss on held-out samples.
        best_step: when; 0 means that nothing learned was better than the start.
    """

    start: float
    best: float
    best_step: int

    def notes(self) -> dict[str, float]:
        """For the report."""
        return {"loss_start": self.start, "loss": self.best, "best_step": self.best_step}


def train(
    trained: Trained,
    data: ModelData,
    schedule: Schedule,
    generator: torch.Generator,
    over: Callable[[Iterable[int], int, Label], Iterator[int]],
    judge: Callable[[Make], float] | None = None,
) -> Trial:
    """Train; afterwards `trained` holds the best iterate.

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
    groups = trained.groups()
    tensors = [t for ts, _ in groups for t in ts]
    seed = generator.initial_seed()
    held, learned = split(data.count)
    rates = [{"params": ts, "lr": lr, "most": lr} for ts, lr in groups]
    optimizer = torch.optim.AdamW(rates, weight_decay=0.0, fused=True)

    def error() -> float:
        return judge(trained.merged) if judge else held_out(trained.merged, data, held, schedule.batch_size)

    run = _Run(tensors, optimizer)
    state = data.kept.load()
    if state is None:
        run.start = run.best = error()
        if not math.isfinite(run.start):
            raise SolveError("the loss is not finite before anything is trained")
        run.kept = [t.detach().clone() for t in tensors]
    else:
        run.restore(state)
    done = run.step
    looks = max(1, schedule.steps // LOOKS)

    def label() -> str:
        return f"train: steps, loss {run.loss:.4f}" if run.loss == run.loss else "train: steps"

    for step in over(range(done + 1, schedule.steps + 1), schedule.steps - done, label):
        for group in optimizer.param_groups:
            group["lr"] = group["most"] * schedule.rate(step)
        with torch.enable_grad():
            value = data.loss(trained.make, batch(learned, step, schedule.batch_size, seed))
            torch.autograd.backward(value, inputs=tensors)
        run.loss = float(value.detach())
        if not math.isfinite(run.loss):
            break  # diverged: what was best stays
        optimizer.step()
        optimizer.zero_grad()
        run.step = step
        if step % looks == 0 or step == schedule.steps:
            now = error()
            if now < run.best:
                run.best, run.best_step = now, step
                run.kept = [t.detach().clone() for t in tensors]
            data.kept.save(run.state())
    with torch.no_grad():
        for tensor, kept in zip(tensors, run.kept, strict=True):
            tensor.copy_(kept)
    return Trial(run.start, run.best, run.best_step)


def forked(generator: torch.Generator, *parts: object) -> torch.Generator:
    """Randomness of one training of several: depends on the seed of all, and on what this one is called."""
    name = hashlib.sha256(repr((generator.initial_seed(), *parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(name[:7], "big"))


def split(count: int) -> tuple[Tensor, Tensor]:
    """Numbers of the samples that are held out, and of those that are trained on."""
    held = torch.arange(count)[:: min(HELD_OUT, count)]
    left = set(range(count)) - set(held.tolist())
    return held, torch.tensor(sorted(left) or held.tolist())


def held_out(make: Make, data: ModelData, held: Tensor, batch_size: int) -> float:
    """Mean loss on held-out samples."""
    total = 0.0
    with torch.no_grad():
        for part in torch.split(held, batch_size):
            total += float(data.loss(make, part)) * len(part)
    return total / len(held)


def batch(numbers: Tensor, step: int, size: int, seed: int) -> Tensor:
    """The samples of a step: every one comes once in each round, in an order that only depends on seed and round."""
    chosen = []
    for place in range((step - 1) * size, step * size):
        turn, within = divmod(place, len(numbers))
        generator = torch.Generator().manual_seed((seed + turn) % (1 << 63))
        order = draw(generator, (len(numbers),), "permutation", numbers)
        chosen.append(numbers[order[within]])
    return torch.stack(chosen)


class _Run:
    """Where a training stands."""

    def __init__(self, tensors: list[Tensor], optimizer: torch.optim.Optimizer):
        self.tensors, self.optimizer = tensors, optimizer
        self.step = self.best_step = 0
        self.start = self.best = self.loss = math.nan
        self.kept: list[Tensor] = []

    def state(self) -> dict[str, Tensor]:
        """Everything that the rest depends on."""
        numbers = [self.step, self.best_step, self.start, self.best]
        found = {"numbers": torch.tensor(numbers, dtype=torch.float64)}
        for i, (tensor, kept) in enumerate(zip(self.tensors, self.kept, strict=True)):
            found |= {f"{i}.now": tensor.detach(), f"{i}.kept": kept}
            found |= {f"{i}.{name}": value for name, value in self.optimizer.state[tensor].items()}
        return found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""
        step, best_step, self.start, self.best = state["numbers"].tolist()
        self.step, self.best_step = int(step), int(best_step)
        with torch.no_grad():
            for i, tensor in enumerate(self.tensors):
                own = {n: state[f"{i}.{n}"].to(tensor.device) for n in ("now", "kept", "step", "exp_avg", "exp_avg_sq")}
                tensor.copy_(own.pop("now"))
                self.kept.append(own.pop("kept"))
                self.optimizer.state[tensor] = own
