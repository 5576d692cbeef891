"""Wanda: the properties of its paper."""

from fractions import Fraction

import pytest
import torch
from textbook import inputs, inverse_factor, mask, statistics, sweep_columns, target, weight
from torch import Tensor

from compress.calibration.statistics import Statistics
from compress.config.options import errors_in
from compress.errors import SolveError
from compress.passes import Magnitude, Override, Wanda
from compress.passes.base import Edit, Target
from compress.passes.prune import refit
from compress.passes.prune.selection import keep_pattern
from compress.passes.prune.wanda import TOLERANCE

ROWS, COLUMNS = 16, 96
DAMPING = 0.01  # the default

each_mask = pytest.mark.parametrize(
    "options", [{}, {"sparsity": 0.7}, {"sparsity": "2:4"}, {"free_rows": True}], ids=str
)
each_update = pytest.mark.parametrize("update", ["obs", "exact"])


def run(w: Tensor, x: Tensor, kept: Tensor | None = None, **options: object) -> Edit:
    return Wanda(**options).run(target(w, x, kept))


def with_gram(w: Tensor, gram: Tensor, **options: object) -> Edit:
    found = Statistics(w.shape[1], "gram")
    found._gram, found.tokens = gram, 1
    return Wanda(**options).run(Target(w, None, found))


def damped(x: Tensor, damping: float = DAMPING) -> Tensor:
    h = x.double().T @ x.double()
    return h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)


def closed_form(w: Tensor, h: Tensor, chosen: Tensor) -> Tensor:
    """w_K + H_KK^-1 H_KP w_P, row by row."""
    best = torch.zeros(w.shape, dtype=torch.float64)
    for i, k in enumerate(chosen):
        row = w[i].double()
        best[i, k] = row[k] + torch.linalg.solve(h[k][:, k], h[k][:, ~k] @ row[~k])
    return best


def error(before: Tensor, after: Tensor, h: Tensor) -> float:
    """tr(D H D^T)."""
    lost = before.double() - after.double()
    return float((lost @ h * lost).sum())


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
    assert Wanda(sparsity="2:4").stand_in() == Magnitude(sparsity="2:4")


def test_free_rows_with_a_fixed_pattern_are_refused() -> None:
    assert [e.option for e in errors_in(Wanda(sparsity="2:4", free_rows=True))] == ["free_rows"]


@each_update
@each_mask
def test_the_update_leaves_the_mask_unchanged(options: dict[str, object], update: str) -> None:
    w, x = weight(ROWS, COLUMNS), inputs(COLUMNS)
    plain, edit = run(w, x, **options), run(w, x, update=update, **options)
    assert torch.equal(edit.mask, plain.mask)
    assert bool((edit.weight[~edit.mask] == 0).all())
    assert not torch.equal(edit.weight, plain.weight)


@each_mask
@pytest.mark.parametrize("damping", [1e-3, DAMPING, 0.1])
@pytest.mark.parametrize("masked", [False, True])
def test_the_exact_update_equals_the_closed_form(options: dict[str, object], damping: float, masked: bool) -> None:
    w, x = weight(ROWS, COLUMNS), inputs(COLUMNS)
    kept = mask(ROWS, COLUMNS, share=0.2) if masked else None
    w = w if kept is None else w * kept
    edit = run(w, x, kept, update="exact", damping=damping, **options)
    best = closed_form(w, damped(x, damping), edit.mask)
    assert torch.allclose(edit.weight.double(), best, rtol=0, atol=1e-3 * float(best.abs().max()))


@each_mask
def test_the_obs_update_equals_the_textbook(options: dict[str, object]) -> None:
    w, x = weight(ROWS, COLUMNS), inputs(COLUMNS)
    edit = run(w, x, update="obs", **options)
    u = inverse_factor(statistics(x).gram, DAMPING)
    expected = sweep_columns(w, u, lambda j, current: current[:, j] * edit.mask[:, j])
    assert torch.allclose(edit.weight.double(), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@each_mask
@pytest.mark.parametrize("seed", range(3))
def test_the_exact_update_loses_least_and_none_loses_most(options: dict[str, object], seed: int) -> None:
    w, x = weight(ROWS, COLUMNS, seed), inputs(COLUMNS, seed=seed)
    h = damped(x)
    exact, obs, none = (error(w, run(w, x, update=u, **options).weight, h) for u in ("exact", "obs", "none"))
    assert exact < obs < none
    assert exact == pytest.approx(error(w, closed_form(w, h, run(w, x, **options).mask), h), rel=1e-5)


@each_update
@each_mask
def test_inputs_that_are_not_correlated_leave_nothing_to_make_up_for(options: dict[str, object], update: str) -> None:
    w, gram = weight(ROWS, COLUMNS), 3.0 * torch.eye(COLUMNS)
    plain, edit = with_gram(w, gram, **options), with_gram(w, gram, update=update, **options)
    assert torch.equal(edit.mask, plain.mask)
    assert torch.equal(edit.weight, plain.weight)


@each_update
@each_mask
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_update_brings_no_zero_back(options: dict[str, object], update: str, share: float) -> None:
    kept = mask(ROWS, COLUMNS, share=share)
    edit = run(weight(ROWS, COLUMNS), inputs(COLUMNS), kept, update=update, **options)
    assert bool((edit.weight[~kept] == 0).all())


@each_update
def test_a_row_does_not_depend_on_the_others_for_its_update(update: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w, x = weight(ROWS, COLUMNS), inputs(COLUMNS)
    w[3] *= 1e4
    together = run(w, x, update=update).weight
    monkeypatch.setattr(refit, "ROWS", 5)
    for found in (run(w, x, update=update).weight, torch.cat([run(row[None], x, update=update).weight for row in w])):
        assert bool(((found - together).abs().amax(1) <= 1e-3 * together.abs().amax(1)).all())


@each_update
def test_the_update_with_dead_inputs_is_finite_and_they_are_counted(update: str) -> None:
    dead = (3, 40, 41)
    w, x = weight(ROWS, COLUMNS), inputs(COLUMNS, dead=dead)
    w[:, 3] = 5.0
    edit = run(w, x, sparsity="2:4", update=update)
    assert edit.notes == {"dead_inputs": 3}
    assert bool(torch.isfinite(edit.weight).all())
    kept = edit.mask[:, 40]
    assert torch.equal(edit.weight[kept, 40], w[kept, 40])
    silent = run(w, torch.zeros(4, COLUMNS), update=update)
    assert torch.equal(silent.weight, w * silent.mask)


@each_update
def test_scaling_the_inputs_changes_no_update(update: str) -> None:
    w, x = weight(ROWS, COLUMNS), inputs(COLUMNS)
    for size in (2.0**-10, 2.0**10):
        assert torch.equal(run(w, x * size, update=update).weight, run(w, x, update=update).weight)


@each_update
def test_a_gram_matrix_that_is_not_positive_definite_is_a_solve_error(update: str) -> None:
    gram = torch.eye(COLUMNS)
    gram[0, 1] = gram[1, 0] = 2
    gram[0, 2] = gram[2, 0] = 0.5
    w = weight(ROWS, COLUMNS)
    w[:, :3] = torch.tensor([10.0, 10.0, 1e-3])  # the third goes, and the first and second are to make up for it
    with pytest.raises(SolveError, match="positive definite"):
        with_gram(w, gram, update=update, sparsity=0.1)


def test_the_gram_matrix_is_asked_for_only_by_an_update() -> None:
    assert Wanda().needs == "norm"
    assert Wanda(update="obs").needs == Wanda(update="exact").needs == "gram"
    assert Wanda(overrides=(Override("*.down_proj", {"update": "exact"}),)).needs == "gram"


@pytest.mark.parametrize(
    ("pass_", "option"),
    [
        (Wanda(damping=0.1), "damping"),
        (Wanda(update="obs", damping=0.0), "damping"),
        (Wanda(overrides=(Override("*", {"damping": 0.1}),)), "overrides[0].damping"),
        (Wanda(update="exact", overrides=(Override("*", {"damping": 0.1, "update": "none"}),)), "overrides[0].damping"),
    ],
)
def test_damping_is_refused_where_it_is_impossible_or_changes_nothing(pass_: Wanda, option: str) -> None:
    assert [e.option for e in errors_in(pass_)] == [option]


def test_some_layers_may_do_without_the_update_that_the_others_get() -> None:
    pass_ = Wanda(update="exact", damping=0.1, overrides=(Override("*.down_proj", {"update": "none"}),))
    assert errors_in(pass_) == []
    assert errors_in(Wanda(damping=0.1, overrides=(Override("*", {"update": "obs"}),))) == []


@pytest.mark.parametrize("of", [2, 4, 8, 16, 32])
def test_neighbours_that_are_compared_are_chosen_as_if_they_were_sorted(of: int) -> None:
    scores = torch.randn(7, 64, generator=torch.Generator().manual_seed(of)).round(decimals=1)  # many equal
    scores[scores < -1] = -torch.inf  # gone already
    for keep in range(1, of):
        order = torch.argsort(scores.view(-1, of), dim=1, stable=True)
        expected = torch.ones(7 * 64 // of, of, dtype=torch.bool).scatter_(1, order[:, : of - keep], False)
        assert torch.equal(keep_pattern(scores, keep, of), expected.view(7, 64))
