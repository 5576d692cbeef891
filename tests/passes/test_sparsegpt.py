"""SparseGPT against the textbook, and the properties of its paper."""

from fractions import Fraction

import pytest
import torch
from textbook import (
    inputs,
    lowest,
    mask,
    output_error,
    rows_that_differ,
    sparsegpt,
    statistics,
    target,
    weight,
)
from torch import Tensor

from compress.calibration.statistics import Statistics
from compress.config.options import errors_in
from compress.errors import SolveError
from compress.passes import Magnitude, SparseGpt
from compress.passes.base import Edit, Target
from compress.passes.prune.selection import pattern

ROWS, COLUMNS = 8, 48


def run(w: Tensor, x: Tensor, kept: Tensor | None = None, **options: object) -> Edit:
    return SparseGpt(**options).run(target(w, x, kept))


def with_gram(w: Tensor, gram: Tensor, **options: object) -> Edit:
    found = Statistics(w.shape[1], "gram")
    found._gram, found.tokens = gram, 1
    return SparseGpt(**options).run(Target(w, None, found))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, "2:4", "4:8"])
@pytest.mark.parametrize("tile", [8, 20, 128])
def test_sparsegpt_equals_the_textbook(sparsity: float | str, tile: int, masked: bool) -> None:
    w, x = weight(ROWS, COLUMNS), inputs(COLUMNS)
    kept = mask(ROWS, COLUMNS, share=0.2) if masked else None
    w = w if kept is None else w * kept
    edit = run(w, x, kept, sparsity=sparsity, tile=tile)
    n_of_m = pattern(sparsity)
    share = {"n_of_m": n_of_m} if n_of_m else {"sparsity": sparsity}
    expected, chosen = sparsegpt(w, statistics(x).gram, tile=tile, kept=kept, **share)
    assert rows_that_differ(edit.mask, chosen) <= (1 if n_of_m else 2)  # rows of a tile share a budget: a tie is two
    same = (edit.mask == chosen).all(1)
    assert torch.allclose(edit.weight[same].double(), expected[same], rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("tile", [16, 48])
@pytest.mark.parametrize("sparsity", [0.5, 0.25])
def test_sparsegpt_with_identity_hessian_is_magnitude_tile_by_tile_without_update(sparsity: float, tile: int) -> None:
    w = weight(ROWS, COLUMNS)
    edit = with_gram(w, 3.0 * torch.eye(COLUMNS), sparsity=sparsity, tile=tile)
    parts = [w[:, a : a + tile] for a in range(0, COLUMNS, tile)]
    expected = torch.cat([lowest(p.abs(), int(p.numel() * sparsity)) for p in parts], dim=1)
    assert torch.equal(edit.mask, expected)
    assert torch.equal(edit.weight, w * expected)


@pytest.mark.parametrize("n_of_m", ["2:4", "4:8", "1:4"])
def test_sparsegpt_with_identity_hessian_is_magnitude_for_a_pattern(n_of_m: str) -> None:
    w = weight(ROWS, COLUMNS)
    edit = with_gram(w, torch.eye(COLUMNS), sparsity=n_of_m)
    assert torch.equal(edit.mask, Magnitude(sparsity=n_of_m).run(target(w)).mask)
    assert torch.equal(edit.weight, w * edit.mask)


@pytest.mark.parametrize("n_of_m", ["2:4", "1:4", "3:4", "4:8", "1:2", "5:12"])
def test_every_run_of_columns_keeps_exactly_its_count(n_of_m: str) -> None:
    keep, of = map(int, n_of_m.split(":"))
    edit = run(weight(ROWS, COLUMNS), inputs(COLUMNS), sparsity=n_of_m, tile=10)
    assert bool((edit.mask.view(-1, of).sum(1) == keep).all())


@pytest.mark.parametrize("sparsity", [0.1, 0.7, 0.95])
@pytest.mark.parametrize("tile", [16, 20, 128])
def test_every_tile_loses_exactly_its_share(sparsity: float, tile: int) -> None:
    edit = run(weight(ROWS, COLUMNS), inputs(COLUMNS), sparsity=sparsity, tile=tile)
    for a in range(0, COLUMNS, tile):
        part = edit.mask[:, a : a + tile]
        assert int((~part).sum()) == int(part.numel() * Fraction(str(sparsity)))


@pytest.mark.parametrize("sparsity", [0.5, 0.8, "2:4"])
@pytest.mark.parametrize("seed", range(3))
def test_the_update_makes_up_for_some_of_the_loss(sparsity: float | str, seed: int) -> None:
    w, x = weight(ROWS, COLUMNS, seed), inputs(COLUMNS, seed=seed)
    edit = run(w, x, sparsity=sparsity)
    assert output_error(w, edit.weight, x) < output_error(w, w * edit.mask, x)
    magnitude = Magnitude(sparsity=sparsity).run(target(w))
    assert output_error(w, edit.weight, x) < output_error(w, magnitude.weight, x)


def test_the_best_update_for_the_mask_is_a_lower_bound() -> None:
    w, x = weight(ROWS, COLUMNS), inputs(COLUMNS)
    edit = run(w, x, sparsity=0.5, damping=1e-6)
    h = x.double().T @ x.double()
    best = torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
    for i, kept in enumerate(edit.mask):
        best[i, kept] = torch.linalg.solve(h[kept][:, kept], h[kept] @ w[i].double())
    bound = output_error(w, best, x)
    assert bound <= output_error(w, edit.weight, x) <= 3 * bound


@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
def test_scaling_the_inputs_changes_nothing(sparsity: float | str) -> None:
    w, x = weight(ROWS, COLUMNS), inputs(COLUMNS)
    one, other = run(w, x, sparsity=sparsity), run(w, x * 64, sparsity=sparsity)
    assert torch.equal(one.mask, other.mask)
    assert torch.equal(one.weight, other.weight)


@pytest.mark.parametrize("size", [2.0**-10, 2.0**10])
@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
def test_scaling_the_inputs_changes_nothing_when_some_are_dead(sparsity: float | str, size: float) -> None:
    w, x = weight(ROWS, COLUMNS), inputs(COLUMNS, dead=(2, 33, 34))
    assert torch.equal(run(w, x, sparsity=sparsity).mask, run(w, x * size, sparsity=sparsity).mask)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
def test_weights_of_dead_inputs_go_first(sparsity: float | str, size: float) -> None:
    dead = (2, 33, 34)
    edit = run(weight(ROWS, COLUMNS), inputs(COLUMNS, dead=dead) * size, sparsity=sparsity)
    assert edit.notes == {"dead_inputs": 3}
    assert bool(torch.isfinite(edit.weight).all())
    assert not bool(edit.mask[:, dead].any())


def test_the_tile_size_changes_nothing_for_a_pattern() -> None:
    w, x = weight(ROWS, COLUMNS), inputs(COLUMNS)
    whole = run(w, x, sparsity="2:4", tile=COLUMNS)
    for tile in (1, 4, 10, 20, 1000):
        edit = run(w, x, sparsity="2:4", tile=tile)
        assert rows_that_differ(edit.mask, whole.mask) <= 1


@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_what_is_gone_stays_gone(sparsity: float | str, share: float) -> None:
    kept = mask(ROWS, COLUMNS, share=share)
    edit = run(weight(ROWS, COLUMNS), inputs(COLUMNS), kept, sparsity=sparsity)
    assert not bool((edit.mask & ~kept).any())
    assert bool((edit.weight[~edit.mask] == 0).all())


def test_a_share_of_zero_changes_nothing() -> None:
    w = weight(ROWS, COLUMNS)
    edit = run(w, inputs(COLUMNS), sparsity=0.0)
    assert torch.equal(edit.weight, w)
    assert bool(edit.mask.all())


def test_a_hessian_that_is_not_positive_definite_is_a_solve_error() -> None:
    gram = torch.eye(COLUMNS)
    gram[0, 1] = gram[1, 0] = 2
    with pytest.raises(SolveError, match="positive definite"):
        with_gram(weight(ROWS, COLUMNS), gram)


def test_no_statistics_are_a_solve_error_and_the_fallback_makes_the_same_pattern() -> None:
    with pytest.raises(SolveError, match="no input"):
        SparseGpt().run(target(weight(ROWS, COLUMNS)))
    assert SparseGpt(sparsity="2:4").stand_in() == Magnitude(sparsity="2:4")


@pytest.mark.parametrize("option", ["damping", "tile"])
def test_impossible_options_are_named(option: str) -> None:
    assert [e.option for e in errors_in(SparseGpt(**{option: 0}))] == [option]
