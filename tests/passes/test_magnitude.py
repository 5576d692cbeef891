"""Magnitude pruning, and the selection rules all pruners share."""

from fractions import Fraction

import pytest
import torch
from textbook import mask, target, weight

from compress.config.options import errors_in
from compress.passes import Magnitude
from compress.passes.prune.selection import keep_rows, keep_share

PATTERNS = ["2:4", "1:4", "3:4", "4:8", "1:2"]


def zeros(edit_mask: torch.Tensor) -> torch.Tensor:
    return (~edit_mask).sum(1)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.25, 0.5, 0.77, 0.99])
def test_every_row_loses_exactly_its_share(sparsity: float) -> None:
    edit = Magnitude(sparsity=sparsity).run(target(weight(8, 64)))
    assert bool((zeros(edit.mask) == int(64 * Fraction(str(sparsity)))).all())


@pytest.mark.parametrize("columns", [100, 200, 300, 700])
def test_a_percentage_of_hundreds_of_columns_is_exact(columns: int) -> None:
    scores = torch.rand(2, columns)
    for percent in range(100):
        assert int(zeros(keep_rows(scores, percent / 100))[0]) == columns * percent // 100, percent
        assert int((~keep_share(scores, percent / 100)).sum()) == 2 * columns * percent // 100, percent


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_run_of_columns_keeps_exactly_its_count(pattern: str) -> None:
    keep, of = map(int, pattern.split(":"))
    edit = Magnitude(sparsity=pattern).run(target(weight(8, 64)))
    assert bool((edit.mask.view(-1, of).sum(1) == keep).all())


@pytest.mark.parametrize("sparsity", [0.5, "2:4", "1:4"])
def test_kept_weights_are_the_largest_and_untouched(sparsity: float | str) -> None:
    w = weight(8, 64)
    edit = Magnitude(sparsity=sparsity).run(target(w))
    assert torch.equal(edit.weight, w * edit.mask)
    groups = w.abs().view(-1, 4) if isinstance(sparsity, str) else w.abs()
    kept = edit.mask.view(groups.shape)
    smallest_kept = groups.masked_fill(~kept, torch.inf).amin(1)
    largest_gone = groups.masked_fill(kept, -torch.inf).amax(1)
    assert bool((smallest_kept >= largest_gone).all())


def test_ties_go_by_position() -> None:
    edit = Magnitude(sparsity=0.5).run(target(torch.ones(2, 6)))
    assert edit.mask.tolist() == [[False] * 3 + [True] * 3] * 2


def test_a_kept_weight_may_be_zero() -> None:
    w = torch.tensor([[0.0, 0.0, 0.0, 5.0]])
    assert Magnitude(sparsity=0.5).run(target(w)).mask.tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("sparsity", [0.25, 0.5, "2:4", "3:4"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_what_is_gone_stays_gone_and_counts(sparsity: float | str, share: float) -> None:
    kept = mask(8, 64, share=share)
    edit = Magnitude(sparsity=sparsity).run(target(weight(8, 64), kept=kept))
    assert not bool((edit.mask & ~kept).any())
    if sparsity == 0.5:
        assert torch.equal(zeros(edit.mask), torch.maximum(zeros(kept), torch.tensor(32)))
    if sparsity == "2:4":
        assert torch.equal(edit.mask.view(-1, 4).sum(1), kept.view(-1, 4).sum(1).clamp(max=2))


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, "4:2", "0:4", "4:4", "half", "2:4:8"])
def test_impossible_sparsities_are_named(sparsity: float | str) -> None:
    assert [e.option for e in errors_in(Magnitude(sparsity=sparsity))] == ["sparsity"]


def test_a_pattern_that_does_not_fit_the_columns_is_said() -> None:
    assert Magnitude(sparsity="2:4").check_shape((8, 64)) is None
    assert "it has 66" in Magnitude(sparsity="2:4").check_shape((8, 66))
