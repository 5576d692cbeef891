"""Global magnitude pruning with a minimum threshold: the properties of its paper, with exact counts."""

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from compress.config.options import errors_in
from compress.passes import GlobalMagnitude
from compress.passes.base import Edit, Target, Whole
from compress.passes.prune.global_magnitude import count_below, layer_counts, max_sparsity

SHAPES = {"a": (16, 24), "b": (7, 11), "c": (30, 5), "d": (3, 3), "e": (13, 29)}
SIZES = {"a": 1.0, "b": 0.2, "c": 3.0, "d": 1.0, "e": 0.6}


def layers(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(*shape, generator=generator) * SIZES[n] for n, shape in SHAPES.items()}


def run(weights: dict[str, Tensor], masks: dict[str, Tensor] | None = None, **options: float) -> dict[str, Edit]:
    masks = masks or {}

    def load(name: str) -> Target:
        kept = masks.get(name)
        return Target(weights[name] if kept is None else weights[name] * kept, kept)

    found = list(GlobalMagnitude(**options).run(Whole(tuple(weights), load)))
    assert [name for name, _ in found] == list(weights)
    return dict(found)


def total(weights: dict[str, Tensor]) -> int:
    return sum(w.numel() for w in weights.values())


def gone(edits: dict[str, Edit]) -> int:
    return sum(int((~e.mask).sum()) for e in edits.values())


def exact(share: float, count: int) -> int:
    """floor(share * count) for the share as it is written."""
    return math.floor(Fraction(str(share)) * count)


def test_no_sparsity_changes_nothing() -> None:
    weights = layers()
    for name, edit in run(weights, sparsity=0.0).items():
        assert bool(edit.mask.all())
        assert torch.equal(edit.weight, weights[name])


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("sparsity", [0.05, 0.29, 0.57, 0.8])
@pytest.mark.parametrize("min_keep", [0.0005, 0.005])
def test_the_target_is_met_to_one_weight_a_layer(sparsity: float, min_keep: float, seed: int) -> None:
    weights = layers(seed)
    edits = run(weights, sparsity=sparsity, min_keep=min_keep)
    assert 0 <= exact(sparsity, total(weights)) - gone(edits) <= len(weights)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sparsity", [0.05, 0.29, 0.5, 0.8, 0.99])
def test_without_a_threshold_exactly_the_smallest_weights_of_all_go(sparsity: float, seed: int) -> None:
    weights = layers(seed)
    edits = run(weights, sparsity=sparsity, min_keep=0.0)
    every = torch.cat([w.abs().flatten() for w in weights.values()])
    count = exact(sparsity, len(every))
    assert gone(edits) == count
    threshold = torch.kthvalue(every, count).values
    for name, edit in edits.items():
        assert torch.equal(~edit.mask, weights[name].abs() <= threshold), name


@pytest.mark.parametrize("sparsity", [0.001, 0.25, 0.5, 0.75, 0.999])
def test_counts_below_the_threshold_are_exact(sparsity: float) -> None:
    weights = layers()
    every = torch.cat([w.abs().flatten() for w in weights.values()])
    count = exact(sparsity, len(every))
    expected = [0] * len(weights)
    if count:
        threshold = torch.kthvalue(every, count).values
        expected = [int((w.abs() <= threshold).sum()) for w in weights.values()]
    assert count_below(tuple(weights), lambda name: Target(weights[name]), sparsity) == expected


def test_counts_are_exact_when_magnitudes_tie_and_when_they_are_close() -> None:
    close = torch.tensor([1.0]).view(torch.int32) + torch.arange(64, dtype=torch.int32)
    close = close.view(torch.float32).view(8, 8)
    weights = {"tied": torch.ones(4, 8), "close": close, "more": torch.ones(4, 8)}
    for wanted in range(0, 128, 21):
        counts = count_below(tuple(weights), lambda name: Target(weights[name]), wanted / 128)
        assert sum(counts) == wanted
        ones = 65  # 64 of the tied layers, and the first of the close ones
        assert counts[1] == max(wanted - ones, -1) + 1 if wanted >= ones else counts[1] <= 1


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
@pytest.mark.parametrize("min_keep", [0.001, 0.015])
def test_every_layer_keeps_its_minimum(sparsity: float, min_keep: float, seed: int) -> None:
    weights = layers(seed)
    weights["b"] *= 1e-3  # a plain global cut would empty it
    floor = exact(min_keep, total(weights))
    for name, edit in run(weights, sparsity=sparsity, min_keep=min_keep).items():
        assert int(edit.mask.sum()) >= min(weights[name].numel(), floor), name


def test_layers_smaller_than_the_minimum_stay_dense() -> None:
    weights = layers()
    edits = run(weights, sparsity=0.8, min_keep=0.012)  # 11 or more weights a layer; "d" has 9
    assert bool(edits["d"].mask.all())


def test_layers_held_at_their_minimum_lose_exactly_down_to_it() -> None:
    weights = layers()
    weights["b"] *= 1e-3
    edits = run(weights, sparsity=0.8, min_keep=0.01)
    assert int(edits["b"].mask.sum()) == exact(0.01, total(weights))


@pytest.mark.parametrize("seed", range(4))
def test_within_a_layer_every_kept_weight_is_at_least_every_pruned_one(seed: int) -> None:
    weights = layers(seed)
    for name, edit in run(weights, sparsity=0.8, min_keep=0.01).items():
        size = weights[name].abs()
        if not bool(edit.mask.all()):
            assert float(size[edit.mask].min()) >= float(size[~edit.mask].max())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sparsity", [0.29, 0.5, 0.8])
def test_without_a_threshold_every_kept_weight_is_at_least_every_pruned_one_anywhere(
    sparsity: float, seed: int
) -> None:
    weights = layers(seed)
    edits = run(weights, sparsity=sparsity, min_keep=0.0)
    kept = torch.cat([weights[n].abs()[e.mask] for n, e in edits.items()])
    pruned = torch.cat([weights[n].abs()[~e.mask] for n, e in edits.items()])
    assert float(kept.min()) >= float(pruned.max())


@pytest.mark.parametrize("min_keep", [0.0, 0.01])
def test_scaling_all_layers_alike_leaves_the_masks(min_keep: float) -> None:
    weights = layers()
    one = run(weights, sparsity=0.7, min_keep=min_keep)
    other = run({n: w * 8 for n, w in weights.items()}, sparsity=0.7, min_keep=min_keep)
    assert all(torch.equal(one[n].mask, other[n].mask) for n in weights)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("factor", [1.5, 100.0])
def test_scaling_one_layer_up_never_lowers_its_density(name: str, factor: float) -> None:
    weights = layers()
    before = run(weights, sparsity=0.7, min_keep=0.001)[name].mask.sum()
    after = run({**weights, name: weights[name] * factor}, sparsity=0.7, min_keep=0.001)[name].mask.sum()
    assert int(after) >= int(before)


def test_kept_weights_are_untouched() -> None:
    weights = layers()
    for name, edit in run(weights, sparsity=0.5).items():
        assert torch.equal(edit.weight, weights[name] * edit.mask)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_what_is_gone_stays_gone_and_counts(share: float) -> None:
    weights = layers()
    generator = torch.Generator().manual_seed(5)
    masks = {n: torch.rand(w.shape, generator=generator) >= share for n, w in weights.items()}
    edits = run(weights, masks, sparsity=0.5, min_keep=0.0)
    assert all(not bool((edits[n].mask & ~masks[n]).any()) for n in weights)
    already = sum(int((~m).sum()) for m in masks.values())
    assert gone(edits) == max(already, exact(0.5, total(weights)))


def test_pruning_again_at_the_same_share_changes_nothing() -> None:
    weights = layers()
    once = run(weights, sparsity=0.5)
    twice = run({n: e.weight for n, e in once.items()}, {n: e.mask for n, e in once.items()}, sparsity=0.5)
    assert all(torch.equal(once[n].mask, twice[n].mask) for n in weights)


def test_a_target_out_of_reach_is_refused_with_the_reachable_maximum() -> None:
    sizes = [100, 100, 100]
    assert max_sparsity(sizes, 0.1) == pytest.approx(0.7)
    shapes = {"a": (10, 10), "b": (5, 20), "c": (100, 1)}
    assert GlobalMagnitude(sparsity=0.7, min_keep=0.1).check_shapes(shapes) is None
    error = GlobalMagnitude(sparsity=0.75, min_keep=0.1).check_shapes(shapes)
    assert error is not None
    assert error.option == "sparsity"
    assert "0.75 cannot be reached with min_keep 0.1: at most 0.7000" in error.message
    with pytest.raises(ValueError, match=r"at most 0\.7000"):
        layer_counts([75, 75, 75], sizes, 0.75, 0.1)


def test_a_target_exactly_at_the_reachable_maximum_is_met() -> None:
    assert layer_counts([90, 0, 120], [100, 100, 100], 0.7, 0.1) == [70, 70, 70]


@pytest.mark.parametrize("seed", range(20))
def test_water_filling_meets_the_budget_within_every_bound(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 2000, (8,), generator=generator).tolist()
    min_keep = float(torch.rand(1, generator=generator)) * 0.05
    reach = max_sparsity(sizes, min_keep)
    sparsity = reach * float(torch.rand(1, generator=generator))
    left, counts = int(sum(sizes) * sparsity), []
    for n in sizes:  # layers at the front lose all they can: the hardest case for the minimum
        counts.append(min(n, left))
        left -= counts[-1]
    removed = layer_counts(counts, sizes, sparsity, min_keep)
    floor = exact(min_keep, sum(sizes))
    assert sum(removed) == exact(sparsity, sum(sizes))
    assert all(0 <= r <= max(0, n - floor) for r, n in zip(removed, sizes, strict=True))


def test_water_filling_leaves_a_feasible_cut_alone() -> None:
    counts, sizes = [10, 40, 70], [100, 100, 100]
    assert layer_counts(counts, sizes, 0.4, 0.05) == [10, 40, 70]


def test_water_filling_shares_what_held_layers_could_not_give_in_proportion() -> None:
    # 100 can lose 80 at most (min_keep 0.05 of 400 is 20); the missing 20 go to the others as 1 to 3.
    assert layer_counts([100, 20, 60, 0], [100] * 4, 0.45, 0.05) == [80, 25, 75, 0]


@pytest.mark.parametrize(
    ("option", "value"), [("sparsity", 1.0), ("sparsity", -0.1), ("min_keep", 1.0), ("min_keep", -1)]
)
def test_impossible_options_are_named(option: str, value: float) -> None:
    assert [e.option for e in errors_in(GlobalMagnitude(**{option: value}))] == [option]
