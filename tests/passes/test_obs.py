"""The engine under GPTQ and SparseGPT gives the numbers of the published form, whatever its tiles."""

import pytest
import torch
from textbook import inputs, inverse_factor, sweep_columns, weight

from compress.errors import SolveError
from compress.passes.solvers.obs import Factor, compensate

COLUMNS = 72
TILES = [(1, 1), (5, 1), (72, 1), (12, 4), (72, 4), (1, 4), (72, 72), (128, 72), (7, 72), (36, 12), (13, 12), (64, 24)]


def engine(w: torch.Tensor, gram: torch.Tensor, *, tile: int, every: int, step: float) -> torch.Tensor:
    """Round every column to multiples of `step`."""
    factor = Factor(gram, 0.01)
    return w - compensate(
        w, factor, tile=tile, every=every, begin=lambda *_: None, project=lambda _, v: (v / step).round() * step
    )


@pytest.mark.parametrize(("tile", "every"), TILES)
def test_the_engine_equals_the_published_form_in_float64(tile: int, every: int) -> None:
    torch.set_default_dtype(torch.float64)
    w = weight(5, COLUMNS)
    x = inputs(COLUMNS)
    gram = x.T @ x
    u = inverse_factor(gram, 0.01)
    expected = sweep_columns(w, u, lambda j, now: (now[:, j] / 0.3).round() * 0.3)
    assert torch.allclose(engine(w, gram, tile=tile, every=every, step=0.3), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("tile", "every"), TILES)
def test_what_begins_sees_the_columns_as_they_stand_then(tile: int, every: int) -> None:
    torch.set_default_dtype(torch.float64)
    w = weight(5, COLUMNS)
    x = inputs(COLUMNS)
    gram = x.T @ x
    seen: dict[int, torch.Tensor] = {}
    compensate(
        w,
        Factor(gram, 0.01),
        tile=tile,
        every=every,
        begin=lambda start, now: seen.update({start: now.clone()}),
        project=lambda _, v: v.round(),
    )
    expected: dict[int, torch.Tensor] = {}

    def choose(j: int, now: torch.Tensor) -> torch.Tensor:
        if j % every == 0:
            expected[j] = now[:, j : j + every].clone()
        return now[:, j].round()

    sweep_columns(w, inverse_factor(gram, 0.01), choose)
    assert seen.keys() == expected.keys()
    for start in expected:
        assert torch.allclose(seen[start], expected[start], rtol=0, atol=1e-10)


def test_the_factor_is_the_damped_gram_matrix() -> None:
    torch.set_default_dtype(torch.float64)
    x = inputs(10)
    gram = x.T @ x
    order = torch.randperm(10)
    whole = Factor(gram, 0.1, order).block(slice(0, 10), slice(0, 10))
    damped = gram + 0.1 * gram.diagonal().mean() * torch.eye(10)
    assert torch.equal(whole, whole.triu())
    assert torch.allclose(whole @ whole.T, damped[order][:, order])


def test_the_factor_leaves_the_gram_matrix_alone() -> None:
    x = inputs(10, dead=(3,))
    gram = x.T @ x
    before = gram.clone()
    Factor(gram, 0.1)
    assert torch.equal(gram, before)


def test_inputs_that_are_always_zero_are_counted() -> None:
    x = inputs(10, dead=(3, 7))
    assert Factor(x.T @ x, 0.01).num_dead == 2


def test_a_matrix_that_is_not_positive_definite_is_refused() -> None:
    gram = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    with pytest.raises(SolveError, match="not positive definite"):
        Factor(gram, 0.01)
    with pytest.raises(SolveError, match="not positive definite"):
        Factor(gram * torch.nan, 0.01)


def test_nothing_to_repair_leaves_the_weight_exactly_as_it_was() -> None:
    w = weight(5, COLUMNS)
    x = inputs(COLUMNS)
    lost = compensate(w, Factor(x.T @ x, 0.01), tile=8, every=1, begin=lambda *_: None, project=lambda _, v: v)
    assert torch.equal(lost, torch.zeros_like(w))
