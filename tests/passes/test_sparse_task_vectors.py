"""The properties of Model Breadcrumbs and DELLA: which entries of a task vector are left, and what they are worth."""

import pytest
import textbook
import torch
from textbook import fine_tunes
from torch import Tensor

from compress import Breadcrumbs, Della, TaskArithmetic, Ties
from compress.config.options import errors_in
from compress.passes import MergePass


def merged(pass_: MergePass, models: list[dict[str, Tensor]], seed: int = 0) -> dict[str, Tensor]:
    return textbook.merged(pass_, models, piece=1000, seed=seed)


def names(count: int) -> tuple[str, ...]:
    return ("m",) * count


def masked(delta: Tensor, density: float, gamma: float) -> Tensor:
    """Breadcrumbs as published, on one tensor: by ranks of magnitude."""
    flat = delta.flatten().clone()
    most = min(int(gamma * len(flat)), len(flat) - int(density * len(flat)))
    order = flat.abs().argsort(descending=True, stable=True)
    flat[order[:most]] = 0
    flat[order[most + int(density * len(flat)) :]] = 0
    return flat.view(delta.shape)


@pytest.mark.parametrize(("density", "gamma"), [(0.5, 0.2), (0.9, 0.2), (0.3, 0.0)])
def test_breadcrumbs_keep_what_is_neither_small_nor_among_the_largest(density: float, gamma: float) -> None:
    base, *tuned = fine_tunes(2)
    found = merged(Breadcrumbs(models=names(2), density=density, gamma=gamma, weights=(1.0, 0.5)), [base, *tuned])
    for name, value in found.items():
        crumbs = [masked(t[name] - base[name], density, gamma) for t in tuned]
        torch.testing.assert_close(value, base[name] + crumbs[0] + 0.5 * crumbs[1])


def test_breadcrumbs_of_a_vector_in_pieces_are_those_of_the_whole() -> None:
    base, tuned = fine_tunes(1)
    pass_ = Breadcrumbs(models=names(1), density=0.4, gamma=0.1)
    whole, pieces = (textbook.merged(pass_, [base, tuned], piece=size) for size in (1000, 7))
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)


def test_without_losing_the_largest_breadcrumbs_are_ties_or_task_arithmetic() -> None:
    models = fine_tunes(2)
    elected = Breadcrumbs(models=names(2), density=0.4, gamma=0.0, merge="ties", combine="mean")
    plain = Breadcrumbs(models=names(2), density=1.0, gamma=0.5)
    pairs = ((elected, Ties(models=names(2), density=0.4)), (plain, TaskArithmetic(models=names(2), scale=1.0)))
    for crumbs, other in pairs:
        found, expected = merged(crumbs, models), merged(other, models)
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name])


def test_della_keeps_large_entries_more_often_as_published() -> None:
    """From density - epsilon to density + epsilon, evenly by rank in a row; a vector is one row."""
    row = torch.tensor([[3.0, -1.0, 2.0, 0.0, -4.0]])
    kept = Della(models=names(1), density=0.5, epsilon=0.2).probabilities(torch.cat([row, row.flip(1)]), 0.5)
    expected = torch.tensor([0.6, 0.4, 0.5, 0.3, 0.7])
    torch.testing.assert_close(kept, torch.stack([expected, expected.flip(0)]))
    base, tuned = fine_tunes(1)
    runs = [merged(Della(models=names(1), density=0.5, epsilon=0.4), [base, tuned], seed) for seed in range(300)]
    for name in ("blocks.0.mlp.weight", "blocks.1.bias"):
        delta = tuned[name] - base[name]
        drawn = torch.stack([run[name] - base[name] for run in runs])
        # Unbiased: every entry is divided by its own probability.
        torch.testing.assert_close(drawn.mean(0), delta, atol=0.09, rtol=0.5)
        share = (drawn != 0).float().mean(0)
        rows = (delta[None] if delta.dim() == 1 else delta).abs()
        ranks = rows.argsort(1).argsort(1) / (rows.shape[1] - 1)
        torch.testing.assert_close(share.view(rows.shape), 0.1 + 0.8 * ranks, atol=0.12, rtol=0)


def test_della_with_epsilon_zero_drops_as_dare_does_and_keeps_sums_where_asked() -> None:
    base, *tuned = fine_tunes(2)
    for name, value in merged(Della(models=names(1), density=0.4, rescale="l1"), [base, tuned[0]]).items():
        before, after = ((v - base[name]).abs().sum() for v in (tuned[0][name], value))
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    flat = Della(models=names(1), density=0.4, epsilon=0.0).probabilities(torch.randn(3, 8), 0.4)
    assert torch.equal(flat, torch.full((3, 8), 0.4))
    whole = merged(Della(models=names(2), density=1.0, merge="linear"), [base, *tuned])
    plain = merged(TaskArithmetic(models=names(2), scale=1.0), [base, *tuned])
    assert all(torch.allclose(value, plain[name], atol=1e-6) for name, value in whole.items())
    nothing = merged(Della(models=names(1), density=0.0), [base, tuned[0]])
    assert all(torch.equal(value, base[name]) for name, value in nothing.items())


def test_options_that_mean_nothing_are_refused() -> None:
    wrong: list[MergePass] = [
        Breadcrumbs(models=names(1), gamma=1.5),
        Breadcrumbs(models=names(1), tie="positive"),
        Della(models=names(1), density=2.0),
        Della(models=names(1), epsilon=0.7),
        Della(models=names(1), density=0.9),
        Della(models=names(1), merge="linear", tie="positive"),
    ]
    assert [[e.option for e in errors_in(pass_)] for pass_ in wrong] == [
        ["gamma"], ["tie"], ["density"], ["epsilon"], ["epsilon"], ["tie"]
    ]  # fmt: skip
