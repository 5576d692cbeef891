"""BiP: the mask moves, its size does not; without gradients nothing does."""

import pytest
import textbook
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import compress
from compress.calibration.training import Make, ModelData, TrainingStore
from compress.errors import ConfigError
from compress.passes import Bip, GlobalMagnitude
from compress.passes.base import Edit, Target, Whole
from compress.passes.prune.bip import Refinement
from compress.passes.prune.mask_groups import fitting, group_sums, smallest_groups, spread

pytestmark = pytest.mark.usefixtures("one_thread")


def regression(seed: int = 0) -> Whole:
    """A matrix whose outputs are wanted from inputs of very different sizes: magnitudes are a bad guide."""
    w, x = textbook.weight(8, 24, seed), textbook.inputs(24, tokens=64, seed=seed)
    x = x * torch.logspace(-1, 1, 24)
    wanted = x @ w.T

    def loss(make: Make, numbers: Tensor) -> Tensor:
        return (x[numbers] @ make(["a"])["a"].T - wanted[numbers]).square().mean()

    target = Target(w, generator=torch.Generator().manual_seed(seed))
    return Whole(
        ("a",), {"a": target}.__getitem__, {}, ModelData(loss, 64, TrainingStore()), torch.Generator().manual_seed(seed)
    )


def refined(seed: int = 0, **options: object) -> Edit:
    return dict(Bip(**{"sparsity": 0.5, "steps": 60, "batch_size": 16, **options}).run(regression(seed)))["a"]  # type: ignore[arg-type]


def linear(slopes: Tensor, weight: Tensor) -> Whole:
    """A loss that is linear in the weights: the lower level's answer is known exactly."""

    def loss(make: Make, numbers: Tensor) -> Tensor:
        return (make(["a"])["a"] * slopes).sum()

    target = Target(weight, generator=torch.Generator().manual_seed(0))
    return Whole(("a",), {"a": target}.__getitem__, {}, ModelData(loss, 64, TrainingStore()))


def learner(model: Whole, **options: object) -> Refinement:
    assert model.data is not None
    return Refinement({"a": model.load("a")}, model.data, Bip(**options), 0)  # type: ignore[arg-type]


def test_the_share_of_zeros_is_exact_and_the_mask_is_another_one() -> None:
    start = dict(GlobalMagnitude(sparsity=0.5).run(regression()))["a"].mask
    mask = refined(mask_rate=0.05).mask
    assert int(mask.sum()) == 8 * 24 // 2
    assert not torch.equal(mask, start)


def test_a_refined_mask_loses_less_than_magnitudes_do() -> None:
    notes = refined(mask_rate=0.05, learning_rate=0.0).notes
    assert notes["loss"] < 0.7 * notes["loss_start"]


def test_without_mask_steps_only_the_kept_weights_are_trained() -> None:
    start = dict(GlobalMagnitude(sparsity=0.5).run(regression()))["a"]
    edit = refined(mask_rate=0.0, learning_rate=1e-2)
    assert torch.equal(edit.mask, start.mask)
    assert edit.notes["loss"] < edit.notes["loss_start"]


def test_weights_that_are_gone_have_gradients_for_their_scores() -> None:
    mask = textbook.mask(8, 24)
    state = learner(regression(), batch_size=16)
    state.masks = {"a": mask}
    found = state.slopes(1)[1]["a"]
    assert bool((found[~mask] != 0).all())


def test_masks_that_were_there_stay(tiny_llama: LlamaForCausalLM, tokens: Tensor) -> None:
    before = compress.apply(tiny_llama, [compress.Magnitude(sparsity=0.3)], tokens)
    after = compress.apply(tiny_llama, [compress.Magnitude(sparsity=0.3), Bip(sparsity=0.6, steps=3)], tokens)
    assert after.report.rows[-1].sparsity == pytest.approx(0.6, abs=1e-3)
    for name, weight in before.weights.items():
        assert not bool((after.weights[name].mask & ~weight.mask).any())


def test_the_move_of_a_mask_is_the_gradient_through_the_lower_levels_answer() -> None:
    gamma, slopes = 0.5, textbook.weight(4, 6)

    def through_the_answer(mask: Tensor) -> Tensor:
        answer = -mask * slopes / gamma  # argmin of slopes . (mask * theta) + gamma / 2 |theta|^2
        return (slopes * mask * answer).sum()

    ones = torch.ones(4, 6, requires_grad=True)
    (expected,) = torch.autograd.grad(through_the_answer(ones), ones)
    state = learner(linear(slopes, -slopes / gamma), gamma=gamma, sparsity=0.0)
    move = state._move(state.weights["a"], state.slopes(1)[1]["a"])
    assert torch.allclose(move, expected, rtol=1e-5)
    without = learner(linear(slopes, -slopes / gamma), gamma=gamma, sparsity=0.0, correction=False)
    assert torch.allclose(without._move(without.weights["a"], slopes), expected / 2, rtol=1e-5)


def test_the_lower_level_pulls_towards_zero_by_gamma_whatever_adam_makes_of_gradients() -> None:
    weight = textbook.weight(4, 6)
    state = learner(linear(torch.zeros(4, 6), weight), gamma=0.5, learning_rate=0.1, steps=1)
    state.after(1)
    assert torch.allclose(state.weights["a"], weight * (1 - 0.1 * 0.5))


def test_the_correction_finds_a_better_mask_than_turns_without_it() -> None:
    def left(seed: int, correction: bool) -> float:
        notes = refined(seed, mask_rate=0.05, learning_rate=0.0, gamma=10.0, correction=correction).notes
        return notes["loss"]

    assert all(left(seed, True) < 0.8 * left(seed, False) for seed in range(4))


@pytest.mark.real
def test_the_correction_finds_a_better_mask_while_the_weights_are_trained_too() -> None:
    def left(seed: int, correction: bool) -> float:
        notes = refined(seed, mask_rate=0.05, learning_rate=3e-4, gamma=1.0, correction=correction).notes
        return notes["loss"]

    assert all(left(seed, True) < 0.9 * left(seed, False) for seed in range(4))


@pytest.mark.parametrize("granularity", ["filter", "channel"])
def test_whole_groups_go_and_no_more_than_the_share(granularity: str) -> None:
    edit = refined(granularity=granularity, correction=True, mask_rate=0.05)
    mask, rows = edit.mask, granularity == "filter"
    assert mask is not None
    assert bool((mask == (mask[:, :1] if rows else mask[:1])).all())
    gone = 1 - float(mask.float().mean())
    assert 0.5 - 1 / (8 if rows else 24) < gone <= 0.5
    assert edit.notes["loss"] < edit.notes["loss_start"]


def test_the_score_of_a_group_moves_by_what_its_weights_would_together() -> None:
    slopes, weight = textbook.weight(4, 6), textbook.weight(4, 6, 1)
    state = learner(
        linear(slopes, weight), granularity="filter", correction=True, sparsity=0.0, mask_rate=0.1, gamma=0.5, steps=1
    )
    before = state.scores["a"].clone()
    state.after(1)
    lower = state.weights["a"]
    expected = ((lower - slopes / 0.5) * slopes).sum(1)
    moved = before - state.scores["a"]
    free = state.scores["a"] > 0
    assert torch.allclose(moved[free] / moved[free][0], expected[free] / expected[free][0], rtol=1e-4)


def test_the_columns_of_one_input_channel_of_a_convolution_go_together() -> None:
    values = torch.arange(24.0).view(2, 12)
    assert group_sums(values, "channel", 3).tolist() == [42.0, 60.0, 78.0, 96.0]
    kept = torch.tensor([True, False, True, False])
    expected = [True] * 3 + [False] * 3 + [True] * 3 + [False] * 3
    assert spread(kept, (2, 12), "channel", 3).tolist() == [expected, expected]


def test_every_matrix_keeps_a_group_and_zeros_that_were_there_count() -> None:
    gone = torch.ones(4, 6, dtype=torch.bool)
    gone[2:] = False
    targets = {"small": Target(torch.ones(4, 6), gone), "large": Target(torch.ones(4, 6))}
    scores = {"small": torch.tensor([0.1, 0.2, 0.0, 0.0]), "large": torch.tensor([5.0, 6.0, 7.0, 8.0])}
    kept = smallest_groups(scores, targets, "filter", 0.75)  # 36 of 48, 12 of which are gone already
    assert kept["small"].tolist() == [False, True, False, False]
    assert kept["large"].tolist() == [False, False, False, True]


def test_the_group_that_a_matrix_keeps_is_one_that_is_there() -> None:
    gone = torch.ones(4, 6, dtype=torch.bool)
    gone[0] = False
    scores = {"a": torch.tensor([9.0, 1.0, 2.0, 3.0])}  # the best was gone before
    kept = smallest_groups(scores, {"a": Target(torch.ones(4, 6), gone)}, "filter", 0.75)
    assert kept["a"].tolist() == [False, False, False, True]
    nothing = smallest_groups(scores, {"a": Target(torch.ones(4, 6), torch.zeros(4, 6, dtype=torch.bool))}, "filter", 1)
    assert not bool(nothing["a"].any())


def test_a_group_that_no_longer_fits_is_passed_over_for_those_that_do() -> None:
    targets = {"wide": Target(torch.ones(2, 30)), "thin": Target(torch.ones(10, 4))}
    scores = {"wide": torch.tensor([2.5, 9.0]), "thin": torch.arange(10.0)}
    kept = smallest_groups(scores, targets, "filter", 0.24)  # 24 of 100: three of 4, none of 30, three more of 4
    assert kept["wide"].tolist() == [True, True]
    assert kept["thin"].tolist() == [False] * 6 + [True] * 4


@pytest.mark.parametrize("seed", range(5))
def test_taking_what_fits_is_what_a_loop_takes(seed: int) -> None:
    sizes = torch.randint(1, 40, (60,), generator=torch.Generator().manual_seed(seed))
    for budget in (0, 1, 17, 300, 5000):
        taken, left = [], budget
        for place, size in enumerate(sizes.tolist()):
            if size <= left:
                taken.append(place)
                left -= size
        assert fitting(sizes, budget).tolist() == taken


@pytest.mark.parametrize("granularity", ["weight", "filter", "channel"])
def test_what_was_masked_before_has_no_score_and_the_share_stays_exact(granularity: str) -> None:
    mask = textbook.mask(8, 24, share=0.3)
    mask[2], mask[:, 5] = False, False
    model = regression()
    assert model.data is not None
    target = Target(model.load("a").weight * mask, mask, generator=torch.Generator().manual_seed(0))
    options = Bip(sparsity=0.6, steps=30, granularity=granularity, correction=True, mask_rate=0.1, learning_rate=1e-3)  # type: ignore[arg-type]
    state = Refinement({"a": target}, model.data, options, 0)
    for step in range(1, 31):
        state.gradients(step)
        state.after(step)
        gone = ~state.masks["a"]
        assert bool(gone[~mask].all())
        assert int(gone.sum()) <= int(0.6 * 8 * 24)
        scores = state.scores["a"]
        dead = {"weight": ~mask, "filter": ~mask.any(1), "channel": ~mask.any(0)}[granularity]
        assert bool((scores[dead] == 0).all())
    if granularity == "weight":
        assert int(gone.sum()) == int(0.6 * 8 * 24)


def test_a_share_that_whole_groups_cannot_reach_is_refused(tokens: Tensor, tiny_llama: LlamaForCausalLM) -> None:
    passes = [Bip(sparsity=0.999, granularity="filter", steps=1)]
    with pytest.raises(ConfigError, match="every matrix keeps a filter: at most"):
        compress.apply(tiny_llama, passes, tokens)


def test_a_pull_that_leaves_nothing_is_refused(tokens: Tensor, tiny_llama: LlamaForCausalLM) -> None:
    with pytest.raises(ConfigError, match=r"gamma.*leaves nothing of a weight"):
        compress.apply(tiny_llama, [Bip(gamma=1e4, learning_rate=1e-4)], tokens)
