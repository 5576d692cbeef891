"""The reconstruction loop: what it feeds, what it measures, what it keeps."""

import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import pytest
import torch
from textbook import inputs, output_error, weight
from torch import Tensor

from compress.calibration import training
from compress.calibration.reconstruct import (
    BLOCK_ERROR,
    HELD_OUT,
    LOOKS,
    BlockData,
    HiddenSamples,
    Inputs,
    Recipe,
    Weights,
    by_block,
    by_layer,
)
from compress.calibration.shares import Shares
from compress.calibration.training import Label, Learner, Loop, Outcome, TrainingStore
from compress.errors import SolveError

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH, ROWS, TOKENS = 12, 5, 3


def over(items: Iterable[int], total: int, label: Label) -> Iterator[int]:
    return iter(items)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass
class Plain:
    """Learns the weight itself; what is stored are its values in steps of `grid`. Remembers what it was asked for."""

    weight: Tensor
    rate: float = 0.02
    grid: float = 0.05
    spoil_after: int = 10**9  # times `soft` answers before it answers NaN
    hards: list[Tensor] = field(default_factory=list)
    softs: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.weight = self.weight.clone().requires_grad_()

    def groups(self) -> list[tuple[list[Tensor], float]]:
        return [([self.weight], self.rate)]

    def soft(self, progress: float) -> Weights:
        self.softs.append(progress)
        return {"a": self.weight * (torch.nan if len(self.softs) > self.spoil_after else 1.0)}

    def hard(self) -> Weights:
        rounded = ((self.weight / self.grid).round() * self.grid).detach()
        self.hards.append(rounded)
        return {"a": rounded}

    def penalty(self, progress: float) -> Tensor | None:
        return None

    def after(self) -> None:
        pass


@dataclass
class Seen:
    """What the block was called with."""

    hidden: Tensor
    numbers: list[int]
    learning: bool  # or measuring


@dataclass
class Linear:
    """A block that is one matrix product, with the data to reconstruct it, and a record of its calls."""

    data: BlockData
    original: Tensor
    x: Tensor  # (N, T, I), the compressed chain's
    x_original: Tensor
    seen: list[Seen]

    @property
    def learning(self) -> list[Seen]:
        return [s for s in self.seen if s.learning]

    def held_out_error(self, hard: Tensor) -> float:
        """The plain way."""
        rows = slice(None, None, min(HELD_OUT, len(self.x)))
        wanted = self.x_original[rows] @ self.original.T
        return float((self.x[rows] @ hard.T - wanted).square().sum() / wanted.square().sum())


def block(samples: int = 20, batch: int = 6, seed: int = 0) -> Linear:
    original = weight(ROWS, WIDTH, seed)
    x_original = inputs(WIDTH, tokens=samples * TOKENS, seed=seed).view(samples, TOKENS, WIDTH)
    x = x_original + 0.1 * inputs(WIDTH, tokens=samples * TOKENS, seed=seed + 50).view_as(x_original)
    seen: list[Seen] = []

    def call(weights: Weights, hidden: Tensor, numbers: Tensor) -> Tensor:
        seen.append(Seen(hidden.clone(), numbers.tolist(), torch.is_grad_enabled()))
        return hidden @ weights["a"].T

    parts = [HiddenSamples(torch.split(v, batch)) for v in (x, x_original, x_original @ original.T)]
    return Linear(BlockData(call, *parts), original, x, x_original, seen)


def learn(
    made: Linear, learned: Plain, steps: int = 40, batch_size: int = 4, kind: Inputs = "compressed", seed: int = 0
) -> Outcome:
    return by_block(learned, made.data, Recipe(steps, batch_size, kind), seeded(seed), over)


def start(made: Linear, seed: int = 9) -> Tensor:
    """Weights somewhat beside the original ones."""
    return made.original + 0.3 * weight(ROWS, WIDTH, seed)


# --- shared by several ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["compressed", "mix"])
def test_those_who_share_the_samples_learn_what_one_does_and_all_the_same(kind: Inputs) -> None:
    """Three threads stand for three processes; the second holds one sample, so that it has none in most steps."""
    whole, counts = block(), (11, 1, 8)
    alone = Plain(start(whole))
    wanted = learn(whole, alone, kind=kind)
    waiting, given = threading.Barrier(3), {}

    def shared(rank: int) -> tuple[Outcome, Tensor]:
        def add(tensors: Sequence[Tensor]) -> None:
            given[rank] = [t.clone() for t in tensors]
            waiting.wait(60)
            for i, tensor in enumerate(tensors):
                tensor.copy_(given[0][i] + given[1][i] + given[2][i])
            waiting.wait(60)

        first = sum(counts[:rank])
        rows = slice(first, first + counts[rank])
        held = [HiddenSamples([v[rows]]) for v in (whole.x, whole.x_original, whole.x_original @ whole.original.T)]
        data = BlockData(lambda w, hidden, _: hidden @ w["a"].T, *held, Shares(rank, 3, add, counts))
        learned = Plain(start(whole))
        return learn(replace(whole, data=data), learned, kind=kind), learned.weight.detach()

    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(shared, range(3)))
    for outcome, learned in found:
        assert outcome == found[0][0]
        assert torch.equal(learned, found[0][1])
        assert outcome.best == pytest.approx(wanted.best, rel=1e-3)
        assert torch.allclose(learned, alone.weight, atol=1e-3)


# --- samples ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[7], [3, 4], [1, 1, 1, 1, 1, 1, 1], [5, 2], [2, 5]], ids=str)
@pytest.mark.parametrize("numbers", [[0], [6, 0, 3], [2, 2, 5], list(range(7)), [6, 5, 4, 3, 2, 1, 0]], ids=str)
def test_samples_are_taken_across_batches_in_the_order_asked_for(sizes: list[int], numbers: list[int]) -> None:
    whole = torch.randn(7, 2, 3)
    samples = HiddenSamples(torch.split(whole, sizes))
    assert len(samples) == 7
    assert torch.equal(samples.take(torch.tensor(numbers)), whole[numbers])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64])
def test_samples_keep_their_type_and_are_copied(dtype: torch.dtype) -> None:
    whole = torch.arange(12).view(6, 2).to(dtype)
    taken = HiddenSamples(torch.split(whole, 4)).take(torch.tensor([4, 1]))
    assert taken.dtype == dtype
    taken.zero_()
    assert torch.equal(whole, torch.arange(12).view(6, 2).to(dtype))


# --- what is learned from ---------------------------------------------------------------------------------------------


def test_training_never_sees_the_held_out_samples_and_every_other_one_equally_often() -> None:
    made = block(samples=20)
    learn(made, Plain(start(made)), steps=10, batch_size=4)
    used = [n for s in made.learning for n in s.numbers]
    held = set(range(0, 20, HELD_OUT))
    measured = {n for s in made.seen if not s.learning for n in s.numbers}
    assert measured == held
    others = [n for n in range(20) if n not in held]
    assert len(others) == 17  # five batches, of 4, 4, 4, 4 and 1: ten steps go through all of them twice
    assert sorted(used[:17]) == sorted(used[17:]) == others
    assert used[:17] != used[17:], "each time in another order"


@pytest.mark.parametrize("kind", ["compressed", "original"])
def test_the_block_is_fed_what_the_recipe_says(kind: Inputs) -> None:
    made = block()
    learn(made, Plain(start(made)), kind=kind)
    source = {"compressed": made.x, "original": made.x_original}[kind]
    assert len(made.learning) == 40
    assert all(torch.equal(s.hidden, source[s.numbers]) for s in made.learning)


def test_a_mix_takes_every_element_from_one_or_the_other_about_half_each() -> None:
    made = block()
    learn(made, Plain(start(made)), kind="mix")
    shares = []
    for s in made.learning:
        a, b = s.hidden == made.x[s.numbers], s.hidden == made.x_original[s.numbers]
        assert bool((a | b).all())
        shares.append(a.float().flatten(1))
    every = torch.cat(shares)
    assert every.shape[0] > 100
    assert abs(float(every.mean()) - 0.5) < 0.03  # 4 standard deviations of some 5000 tosses
    assert bool((every.mean(0) - 0.5).abs().max() < 0.25), "not the same elements every time"
    assert bool((every.mean(1) - 0.5).abs().max() < 0.4), "element by element, not sample by sample"


@pytest.mark.parametrize("kind", ["compressed", "original", "mix"])
def test_the_error_is_always_measured_on_the_inputs_of_the_compressed_model(kind: Inputs) -> None:
    made = block()
    outcome = learn(made, Plain(start(made)), kind=kind)
    measuring = [s for s in made.seen if not s.learning]
    assert all(torch.equal(s.hidden, made.x[s.numbers]) for s in measuring)
    assert outcome.start == pytest.approx(made.held_out_error((start(made) / 0.05).round() * 0.05), rel=1e-5)


def test_batches_of_the_calibration_data_do_not_matter() -> None:
    ended = []
    for batch in (1, 6, 20):
        made = block(batch=batch)
        learned = Plain(start(made))
        learn(made, learned)
        ended.append(learned.weight.detach())
    assert all(torch.equal(ended[0], other) for other in ended)


@pytest.mark.parametrize(("samples", "batch_size"), [(1, 1), (1, 8), (2, 8), (5, 100), (9, 3)])
def test_few_samples_are_enough(samples: int, batch_size: int) -> None:
    made = block(samples=samples)
    learned = Plain(start(made))
    outcome = learn(made, learned, steps=60, batch_size=batch_size)
    assert outcome.best < outcome.start
    assert made.held_out_error(learned.hards[outcome_index(outcome, 60)]) == pytest.approx(outcome.best, rel=1e-5)
    assert all(len(s.numbers) <= batch_size for s in made.seen)


def outcome_index(outcome: Outcome, steps: int) -> int:
    """Which of the looks was the best one; the start is the first."""
    return outcome.best_step // max(1, steps // LOOKS)


def test_outputs_that_are_all_zero_are_no_division_by_zero() -> None:
    made = block()
    zero = replace(made.data, outputs=HiddenSamples([torch.zeros(20, TOKENS, ROWS)]))
    learned = Plain(start(made))
    outcome = by_block(learned, zero, Recipe(40, 4), seeded(), over)
    assert 0 < outcome.best < outcome.start < math.inf


# --- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.005, 0.05, 0.3])
@pytest.mark.parametrize("kind", ["compressed", "mix"])
@pytest.mark.parametrize("seed", range(3))
def test_the_best_iterate_by_the_held_out_error_of_the_hard_weights_is_kept(
    rate: float, kind: Inputs, seed: int
) -> None:
    made = block(seed=seed)
    learned = Plain(start(made), rate)
    outcome = learn(made, learned, kind=kind)
    errors = [made.held_out_error(h) for h in learned.hards]
    assert len(errors) == 1 + LOOKS
    assert outcome.start == pytest.approx(errors[0], rel=1e-5)
    assert outcome.best == pytest.approx(min(errors), rel=1e-5)
    best = errors.index(min(errors))
    assert outcome.best_step == best * 40 // LOOKS
    assert torch.equal(learned.hard()["a"], learned.hards[best]), "the learned numbers are those of the best iterate"
    assert outcome.notes(BLOCK_ERROR) == {
        "block_error_start": outcome.start, "block_error": outcome.best, "best_step": outcome.best_step
    }  # fmt: skip


def test_the_best_iterate_is_kept_even_if_it_is_not_the_last() -> None:
    class LedAway(Plain):
        def penalty(self, progress: float) -> Tensor | None:
            return 10 * (self.weight - 3).square().mean() if progress > 0.55 else None

    made = block()
    learned = LedAway(start(made), rate=0.05)
    outcome = learn(made, learned)
    errors = [made.held_out_error(h) for h in learned.hards]
    assert 12 <= outcome.best_step <= 28
    assert outcome.best < 0.7 * outcome.start
    assert errors[-1] > 1.3 * outcome.best


def test_state_that_is_changed_in_place_goes_back_to_the_best_iterate_too() -> None:
    class Counting(Learner):
        weight, counted, fitted = torch.full((3,), 2.0), torch.zeros(2, dtype=torch.uint8), 0

        def groups(self) -> list[tuple[list[Tensor], float]]:
            return [([self.weight], 0.1)]

        def gradients(self, step: int) -> Tensor:
            self.weight.grad = torch.sign(self.weight)
            return self.weight.sum()

        def after(self, step: int) -> None:
            self.counted += 1

        def state(self) -> list[Tensor]:
            return [self.counted]

        def restored(self) -> None:
            self.fitted += 1

        def error(self) -> float:
            return float((self.weight - 1).abs().sum())

    learner = Counting()
    outcome = training.learn(learner, Loop(40, lambda step: 1.0, 10, "count"), TrainingStore(), over)
    assert 0 < outcome.best_step < 40
    assert learner.counted.tolist() == [outcome.best_step] * 2
    assert float(learner.weight[0]) == pytest.approx(2 - 0.1 * outcome.best_step, abs=1e-3)
    assert learner.fitted == 1


def test_an_absurd_learning_rate_leaves_the_start_untouched() -> None:
    made = block()
    learned = Plain(start(made), rate=1e4)
    outcome = learn(made, learned)
    assert outcome.best_step == 0
    assert outcome.best == outcome.start
    assert torch.equal(learned.weight, start(made))


@pytest.mark.parametrize("after", [0, 1, 17])
def test_a_loss_that_becomes_nan_ends_learning_and_keeps_the_best_so_far(after: int) -> None:
    made, untroubled = block(), block()
    learned = Plain(start(made), spoil_after=after)
    outcome = learn(made, learned)
    assert len(learned.softs) == after + 1, "nothing more is tried"
    other = Plain(start(untroubled))
    learn(untroubled, other)
    looks = [made.held_out_error(h) for h in other.hards[: 1 + after // 4]]  # a look every four steps
    assert outcome.best == pytest.approx(min(looks), rel=1e-5)
    assert outcome.best_step == 4 * looks.index(min(looks))
    assert bool(torch.isfinite(learned.weight).all())
    assert (outcome.best_step > 0) == (after == 17)


def test_a_gradient_that_is_not_finite_never_reaches_the_result() -> None:
    class Rooted(Plain):
        def soft(self, progress: float) -> Weights:
            found = dict(super().soft(progress))
            spoiled = (self.weight * 0).abs().sqrt() if len(self.softs) == 11 else 0.0  # 0, its gradient infinite
            return {"a": found["a"] + spoiled}

    made = block()
    learned = Rooted(start(made))
    outcome = learn(made, learned)
    assert outcome.best_step == 8
    assert bool(torch.isfinite(learned.weight).all())


def test_a_start_that_is_not_finite_is_a_solve_error() -> None:
    made = block()
    spoiled = start(made)
    spoiled[1, 2] = torch.inf
    with pytest.raises(SolveError, match="not finite"):
        learn(made, Plain(spoiled))


def test_one_step_is_looked_at() -> None:
    made = block()
    learned = Plain(start(made))
    assert learn(made, learned, steps=1).best_step == 1
    assert len(learned.hards) == 2


def test_learning_leaves_no_gradient_mode_behind_and_works_under_no_grad() -> None:
    made = block()
    with torch.no_grad():
        outcome = learn(made, Plain(start(made)))
        assert not torch.is_grad_enabled()
    assert outcome.best < outcome.start


# --- how it is learned ------------------------------------------------------------------------------------------------


def test_one_seed_gives_one_result_and_another_seed_another(monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(seed: int, kind: Inputs, noise: int) -> Tensor:
        torch.manual_seed(noise)  # the global generator must not matter
        made = block()
        learned = Plain(start(made))
        learn(made, learned, kind=kind, seed=seed)
        return learned.weight.detach()

    for kind in ("compressed", "mix"):
        assert torch.equal(ended(0, kind, 1), ended(0, kind, 2))
        assert not torch.equal(ended(0, kind, 1), ended(1, kind, 1))
    assert not torch.equal(ended(0, "compressed", 1), ended(0, "mix", 1))


def test_progress_goes_from_nought_up_to_one_and_is_shown() -> None:
    labels: list[tuple[int, str]] = []

    def shown(items: Iterable[int], total: int, label: Label) -> Iterator[int]:
        assert callable(label)
        for item in items:
            labels.append((total, label().partition(", loss ")[0]))
            yield item

    made = block()
    learned = Plain(start(made))
    by_block(learned, made.data, Recipe(8, 4), seeded(), shown)
    assert learned.softs == [n / 8 for n in range(8)]
    assert labels == [(8, "learn: steps")] * 8


@dataclass
class Steady(Plain):
    """Beside the weight, two numbers that only the penalty knows; its gradient is one everywhere."""

    rates: tuple[float, float] = (0.1, 0.02)
    extra: tuple[Tensor, Tensor] = field(default_factory=lambda: (torch.zeros(1), torch.zeros(1)))
    share: float = 1.0
    trace: list[tuple[float, float]] = field(default_factory=list)
    asked: list[float] = field(default_factory=list)

    def groups(self) -> list[tuple[list[Tensor], float]]:
        for extra in self.extra:
            extra.requires_grad_()
        return [*super().groups(), *(([e], rate) for e, rate in zip(self.extra, self.rates, strict=True))]

    def penalty(self, progress: float) -> Tensor | None:
        self.asked.append(progress)
        self.trace.append((self.extra[0].item(), self.extra[1].item()))
        return self.share * (self.extra[0] + self.extra[1]).sum() if self.share else None


def test_each_learning_rate_falls_to_zero_along_a_cosine() -> None:
    made = block()
    learned = Steady(start(made))
    learn(made, learned, steps=20)
    for rate, trace in zip(learned.rates, zip(*learned.trace, strict=True), strict=True):
        # Adam moves by the learning rate where the gradient never changes.
        moved = [trace[n] - trace[n + 1] for n in range(19)]
        assert moved == pytest.approx([rate * (1 + math.cos(math.pi * n / 20)) / 2 for n in range(19)], rel=1e-3)


def test_the_penalty_enters_the_loss_at_every_step() -> None:
    ended = {}
    for share in (0.0, 1.0):
        made = block()
        learned = Steady(start(made), share=share)
        learn(made, learned, steps=20)
        assert learned.asked == learned.softs
        ended[share] = learned.trace[-1]
    assert ended[0.0] == (0.0, 0.0)
    assert ended[1.0] < (-0.5, -0.1)


def test_a_penalty_is_relative_to_the_mean_square_of_the_outputs() -> None:
    class Pulled(Plain):
        def penalty(self, progress: float) -> Tensor | None:
            return (self.weight - 3).square().mean()

    def ended(size: float) -> Tensor:
        made = block()
        data = replace(made.data, outputs=HiddenSamples([made.x_original @ made.original.T * size]))
        call = made.data.call
        learned = Pulled(start(made), rate=0.05)
        last: list[Tensor] = []

        def scaled(weights: Weights, hidden: Tensor, numbers: Tensor) -> Tensor:
            last.append(learned.weight.detach().clone())
            return call(weights, hidden, numbers) * size

        by_block(learned, replace(data, call=scaled), Recipe(20, 4), seeded(), over)
        return last[-1]

    assert torch.allclose(ended(1.0), ended(64.0), atol=1e-4)


def test_numbers_that_nothing_depends_on_stay_as_they_are() -> None:
    class Spare(Plain):
        spare: Tensor

        def groups(self) -> list[tuple[list[Tensor], float]]:
            self.spare = torch.ones(3, requires_grad=True)
            return [*super().groups(), ([self.spare], 0.1)]

    made = block()
    learned = Spare(start(made))
    outcome = learn(made, learned)
    assert outcome.best_step > 0
    assert torch.equal(learned.spare, torch.ones(3))


# --- layer by layer ---------------------------------------------------------------------------------------------------


@dataclass
class Two:
    """Two matrices of different inputs, learned as they are."""

    a: Tensor
    b: Tensor

    def groups(self) -> list[tuple[list[Tensor], float]]:
        return [([self.a.requires_grad_(), self.b.requires_grad_()], 0.01)]

    def soft(self, progress: float) -> Weights:
        return {"a": self.a, "b": self.b}

    def hard(self) -> Weights:
        return {"a": self.a.detach(), "b": self.b.detach()}

    def penalty(self, progress: float) -> Tensor | None:
        return None

    def after(self) -> None:
        pass


def two(size: float = 1.0) -> tuple[Two, dict[str, Tensor], dict[str, Tensor]]:
    """What is learned, the original weights, and the inputs of both."""
    original = {"a": weight(4, 10, 1), "b": size * weight(6, 8, 2)}
    x = {"a": inputs(10, seed=1), "b": inputs(8, seed=2)}
    return Two(original["a"] + 0.1 * weight(4, 10, 3), original["b"] + 0.3 * size * weight(6, 8, 4)), original, x


def run_layers(learned: Two, original: dict[str, Tensor], x: dict[str, Tensor], steps: int = 30) -> Outcome:
    return by_layer(learned, original, {n: v.T @ v for n, v in x.items()}, Recipe(steps, 1), over)


def test_the_layer_objective_is_the_trace_with_the_gram_matrix_and_the_output_error_on_the_data() -> None:
    learned, original, x = two()
    lost = {"a": learned.a.detach() - original["a"], "b": learned.b.detach() - original["b"]}
    traces, errors = [], []
    for n, w in original.items():
        h = (x[n].T @ x[n]).double()
        traces.append(
            float(torch.trace(lost[n].double() @ h @ lost[n].double().T))
            / float(torch.trace(w.double() @ h @ w.double().T))
        )
        errors.append(output_error(w, w + lost[n], x[n]) / output_error(w, torch.zeros_like(w), x[n]))
    outcome = run_layers(learned, original, x, steps=1)
    assert outcome.start == pytest.approx(sum(traces) / 2, rel=1e-4)
    assert outcome.start == pytest.approx(sum(errors) / 2, rel=1e-4)


def test_learning_by_layer_lowers_every_layers_output_error() -> None:
    learned, original, x = two()
    before = [output_error(original[n], w, x[n]) for n, w in learned.hard().items()]
    outcome = run_layers(learned, original, x)
    after = [output_error(original[n], w, x[n]) for n, w in learned.hard().items()]
    assert all(a < b for a, b in zip(after, before, strict=True))
    assert outcome.best < outcome.start
    assert outcome.best_step == 30


def test_a_large_matrix_does_not_outweigh_a_small_one_by_layer() -> None:
    starts = [run_layers(*two(size), steps=1).start for size in (1.0, 1000.0)]
    assert starts[0] == pytest.approx(starts[1], rel=1e-3)


def test_by_layer_never_ends_above_the_start() -> None:
    learned, original, x = two()
    before = learned.a.clone()
    learned.groups = lambda: [([learned.a.requires_grad_(), learned.b.requires_grad_()], 1e4)]  # type: ignore[method-assign]
    outcome = run_layers(learned, original, x)
    assert outcome.best == outcome.start
    assert torch.equal(learned.a, before)


def test_a_layer_whose_inputs_are_all_zero_is_no_division_by_zero() -> None:
    learned, original, x = two()
    x["b"] = torch.zeros_like(x["b"])
    outcome = run_layers(learned, original, x)
    assert 0 < outcome.best < outcome.start < 1


def test_a_gram_matrix_that_is_not_finite_is_a_solve_error() -> None:
    learned, original, x = two()
    x["a"][0, 0] = torch.inf
    with pytest.raises(SolveError, match="not finite"):
        run_layers(learned, original, x)
