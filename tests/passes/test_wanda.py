"""Wanda: the properties of its paper."""

from fractions import Fraction

import pytest
import torch
from textbook import inputs, mask, statistics, target, weight
from torch import Tensor

from compress.calibration.statistics import Statistics
from compress.errors import SolveError
from compress.passes import Magnitude, Wanda
from compress.passes.base import Edit, Target
from compress.passes.prune.wanda import TOLERANCE

ROWS, COLUMNS = 16, 96


def run(w: Tensor, x: Tensor, kept: Tensor | None = None, **options: object) -> Edit:
    return Wanda(**options).run(target(w, x, kept))


@pytest.mark.parametrize("sparsity", [0.5, 0.3, "2:4", "1:4"])
def test_constant_norms_are_row_wise_magnitude(sparsity: float | str) -> None:
    w = weight(ROWS, COLUMNS)
    signs = torch.randn(50, COLUMNS, generator=torch.Generator().manual_seed(1)).sign()
    edit = run(w, signs, sparsity=sparsity)
    assert torch.equal(edit.mask, Magnitude(sparsity=sparsity).run(target(w)).mask)


def test_the_score_is_weight_times_input_norm() -> None:
    w, x = weight(ROWS, COLUMNS), inputs(COLUMNS)
    scores = w.abs() * x.double().square().sum(0).sqrt().float()
    edit = run(w, x, sparsity=0.5)
    for row in range(ROWS):
        largest = torch.argsort(scores[row], descending=True)[: COLUMNS // 2]
        assert set(edit.mask[row].nonzero()[:, 0].tolist()) == set(largest.tolist())


@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"sparsity": "2:4"}, {"free_rows": True}], ids=str)
def test_a_reparametrisation_that_keeps_the_function_keeps_the_mask(options: dict[str, object]) -> None:
    w, x = weight(ROWS, COLUMNS), inputs(COLUMNS)
    scale = 2.0 ** torch.randint(-4, 5, (COLUMNS,), generator=torch.Generator().manual_seed(1))
    assert torch.equal(run(w / scale, x * scale, **options).mask, run(w, x, **options).mask)
    pattern = options.get("sparsity", 0.5)
    by_magnitude = [Magnitude(sparsity=pattern).run(target(v)).mask for v in (w, w / scale)]
    assert not torch.equal(*by_magnitude)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.66, 0.9])
def test_every_row_loses_exactly_its_share(sparsity: float) -> None:
    edit = run(weight(ROWS, COLUMNS), inputs(COLUMNS), sparsity=sparsity)
    assert bool(((~edit.mask).sum(1) == int(COLUMNS * Fraction(str(sparsity)))).all())


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "3:4"])
def test_every_run_of_columns_keeps_exactly_its_count(pattern: str) -> None:
    keep, of = map(int, pattern.split(":"))
    edit = run(weight(ROWS, COLUMNS), inputs(COLUMNS), sparsity=pattern)
    assert bool((edit.mask.view(-1, of).sum(1) == keep).all())


@pytest.mark.parametrize("options", [{}, {"sparsity": "2:4"}, {"free_rows": True}], ids=str)
def test_kept_weights_are_untouched(options: dict[str, object]) -> None:
    w = weight(ROWS, COLUMNS)
    edit = run(w, inputs(COLUMNS), **options)
    assert torch.equal(edit.weight[edit.mask], w[edit.mask])
    assert bool((edit.weight[~edit.mask] == 0).all())


@pytest.mark.parametrize("options", [{}, {"sparsity": "2:4"}, {"free_rows": True}], ids=str)
def test_the_order_of_the_samples_is_irrelevant(options: dict[str, object]) -> None:
    w, x = weight(ROWS, COLUMNS), inputs(COLUMNS)
    one = statistics(x)
    other = Statistics(COLUMNS, "norm")
    for part in torch.split(x.flip(0), 37):
        other.update(part, "a test")
    assert one.tokens == other.tokens == len(x)
    assert torch.equal(
        Wanda(**options).run(Target(w, None, one)).mask, Wanda(**options).run(Target(w, None, other)).mask
    )


@pytest.mark.parametrize("options", [{}, {"sparsity": "2:4"}, {"free_rows": True}], ids=str)
def test_scaling_all_inputs_changes_nothing(options: dict[str, object]) -> None:
    w, x = weight(ROWS, COLUMNS), inputs(COLUMNS)
    assert torch.equal(run(w, x * 256, **options).mask, run(w, x, **options).mask)


@pytest.mark.parametrize("sparsity", [0.05, 0.3, 0.5, 0.666, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_free_rows_meet_the_target_overall_and_differ_among_themselves(sparsity: float, seed: int) -> None:
    edit = run(weight(64, COLUMNS, seed), inputs(COLUMNS, seed=seed), sparsity=sparsity, free_rows=True)
    assert abs(float((~edit.mask).float().mean()) - sparsity) <= TOLERANCE
    assert len(set(edit.mask.sum(1).tolist())) > 1


def test_free_rows_lose_their_smallest_scores_up_to_one_share_of_their_sum() -> None:
    w, x = weight(ROWS, COLUMNS), inputs(COLUMNS)
    edit = run(w, x, free_rows=True)
    scores = (w.abs() * statistics(x).norm).double()
    total = scores.sum(1)
    gone = (scores * ~edit.mask).sum(1) / total
    next_ = (scores * ~edit.mask).sum(1) + scores.masked_fill(~edit.mask, torch.inf).amin(1)
    assert bool((scores.masked_fill(~edit.mask, torch.inf).amin(1) >= scores.masked_fill(edit.mask, 0).amax(1)).all())
    assert float(gone.max()) < float((next_ / total).min())  # one share separates what goes from what would go next


@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"sparsity": "2:4"}, {"free_rows": True}], ids=str)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_what_is_gone_stays_gone(options: dict[str, object], share: float) -> None:
    kept = mask(ROWS, COLUMNS, share=share)
    edit = run(weight(ROWS, COLUMNS), inputs(COLUMNS), kept, **options)
    assert not bool((edit.mask & ~kept).any())


def test_what_is_gone_counts_towards_the_share() -> None:
    kept = mask(ROWS, COLUMNS, share=0.3)
    edit = run(weight(ROWS, COLUMNS), inputs(COLUMNS), kept, sparsity=0.5)
    assert torch.equal((~edit.mask).sum(1), torch.maximum((~kept).sum(1), torch.tensor(COLUMNS // 2)))


def test_columns_of_dead_inputs_go_first() -> None:
    dead = (3, 40, 41)
    edit = run(weight(ROWS, COLUMNS), inputs(COLUMNS, dead=dead), sparsity=0.1)
    assert not bool(edit.mask[:, dead].any())


def test_no_statistics_are_a_solve_error_and_the_fallback_makes_the_same_pattern() -> None:
    with pytest.raises(SolveError, match="no input"):
        Wanda().run(target(weight(ROWS, COLUMNS)))
    assert Wanda(sparsity="2:4").fallback() == Magnitude(sparsity="2:4")


def test_free_rows_with_a_fixed_pattern_are_refused() -> None:
    assert [e.option for e in Wanda(sparsity="2:4", free_rows=True).check()] == ["free_rows"]
