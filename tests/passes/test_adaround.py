"""AdaRound: every weight goes down or up, and nowhere else."""

from dataclasses import replace

import pytest
import textbook
import torch
from selection import only
from textbook import mask, target, weight
from torch import Tensor

from compress.config.options import errors_in
from compress.encodings import Uniform
from compress.errors import SolveError
from compress.passes import AdaRound, Override, Rtn
from compress.passes.base import Edit, Target
from compress.passes.quantize.adaround import BETA, WARM, UpOrDown

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, COLUMNS = 8, 48

GRIDS = [
    {"granularity": "tensor"},
    {"granularity": "channel", "bits": 3},
    {"group_size": 16, "bits": 3},
    {"granularity": "tensor", "symmetric": True},
    {"symmetric": True, "bits": 8},
    {"group_size": 16, "symmetric": True, "bits": 2},
]
each_grid = pytest.mark.parametrize("options", only(GRIDS[::3], GRIDS), ids=str)


def begun(w: Tensor, **options: object) -> UpOrDown:
    return AdaRound(**options).start(target(w))


def nearest(w: Tensor, options: dict[str, object]) -> Uniform:
    found = AdaRound(**options).stand_in().run(target(w)).encoding
    assert isinstance(found, Uniform)
    return found


def assert_same(a: Uniform, b: Uniform) -> None:
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.scale, b.scale)
    assert torch.equal(a.zero_point, b.zero_point)
    assert (a.bits, a.symmetric) == (b.bits, b.symmetric)


def two(x: Tensor | None = None, kept: Tensor | None = None) -> dict[str, Target]:
    w = {"a": weight(ROWS, COLUMNS, 1), "b": weight(6, COLUMNS, 2)}
    return {n: target(v, x, None if kept is None else kept[: len(v)]) for n, v in w.items()}


def ratio(edit: Edit) -> float:
    """Error relative to round-to-nearest."""
    return edit.notes["block_error"] / edit.notes["block_error_start"]


# --- the start --------------------------------------------------------------------------------------------------------


@each_grid
@pytest.mark.parametrize("search", ["minmax", "mse"])
def test_learning_starts_exactly_at_round_to_nearest(options: dict[str, object], search: str) -> None:
    w = weight(ROWS, COLUMNS)
    w[0] = 0  # a row without a range
    options = {**options, "scale_search": search}
    assert_same(begun(w, **options).encoding(), nearest(w, options))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("whole", range(-3, 3))
def test_ties_and_weights_a_hair_beside_them_start_where_round_to_nearest_sends_them(sign: int, whole: int) -> None:
    around = [torch.tensor(0.5 + whole)]
    for end in (-torch.inf, torch.inf):
        value = around[0]
        for _ in range(200):
            value = torch.nextafter(value, torch.tensor(end))
            around.append(value)
    w = sign * torch.stack(around)[None]
    one, middle = torch.ones(1, 1).half(), torch.tensor([[8]], dtype=torch.uint8)
    begun_ = UpOrDown(w, one, middle, AdaRound(bits=4))
    assert torch.equal(begun_.encoding().codes.float() - 8, w.round())


@each_grid
def test_before_learning_the_soft_weights_are_the_original_ones_within_the_grid(options: dict[str, object]) -> None:
    w = weight(ROWS, COLUMNS)
    rounding = begun(w, **options)
    low = (-rounding.point * rounding.scale).expand(rounding.floor.shape).reshape(ROWS, -1)
    high = low + ((2**rounding.options.bits - 1) * rounding.scale).expand(rounding.floor.shape).reshape(ROWS, -1)
    assert torch.allclose(rounding.soft(0.0), w.clamp(low, high), atol=1e-3 * float(rounding.scale.max()))


# --- down or up -------------------------------------------------------------------------------------------------------


@each_grid
@pytest.mark.parametrize("size", [0.5, 3.0, 100.0])
def test_no_weight_leaves_its_two_neighbouring_grid_points_whatever_is_learned(
    options: dict[str, object], size: float
) -> None:
    w = weight(ROWS, COLUMNS)
    rounding = begun(w, **options)
    with torch.no_grad():
        rounding.v += size * torch.randn(rounding.v.shape)
    e, start = rounding.encoding(), nearest(w, options)
    assert not torch.equal(e.codes, start.codes)
    assert torch.equal(e.scale, start.scale)
    assert torch.equal(e.zero_point, start.zero_point)
    step = start.scale.float().repeat_interleave(start.group_size, 1).expand(w.shape)
    inside = (start.dequantize() - w).abs() <= step / 2 * 1.0001  # the others lie beyond the end of the grid
    assert float(inside.float().mean()) > 0.5
    assert bool(((e.dequantize() - w).abs() <= step * 1.0001)[inside].all())
    assert bool(((e.codes.int() - start.codes.int()).abs() <= 1).all())
    # The soft weights lie between the same two.
    assert bool(((rounding.soft(1.0) - w).abs() <= step * 1.0001)[inside].all())


@each_grid
def test_every_weight_inside_the_grid_can_go_either_way(options: dict[str, object]) -> None:
    w = weight(ROWS, COLUMNS)
    rounding = begun(w, **options)
    ends = []
    for end in (-20.0, 20.0):
        with torch.no_grad():
            rounding.v.fill_(end)
        assert torch.allclose(rounding.encoding().dequantize(), rounding.soft(1.0).detach()), "decided: hard is soft"
        ends.append(rounding.encoding())
    up = ends[1].codes.int() - ends[0].codes.int()
    assert bool(((up == 0) | (up == 1)).all())
    down, top = ends[0].codes, ends[1].codes
    assert bool((up == 1)[(down > 0) & (top < 2 ** down.new_tensor(rounding.options.bits).int() - 1)].all())
    assert float((up == 1).float().mean()) > 0.5


# --- the pull to a decision -------------------------------------------------------------------------------------------


def test_the_penalty_starts_after_the_warm_up_and_sharpens_from_flat_to_square() -> None:
    rounding = begun(weight(ROWS, COLUMNS), regularization=0.25)
    h = rounding.share().detach()
    assert rounding.penalty(0.0) is None
    assert rounding.penalty(WARM - 1e-6) is None
    for progress, beta in ((WARM, BETA[0]), (1.0, BETA[1]), ((1 + WARM) / 2, sum(BETA) / 2)):
        expected = 0.25 * float((1 - (2 * h - 1).abs() ** beta).mean())
        assert float(rounding.penalty(progress).detach()) == pytest.approx(expected, rel=1e-5)
    assert BETA == (20.0, 2.0)


@pytest.mark.parametrize("progress", [WARM, 0.6, 0.99])
def test_the_penalty_pulls_towards_the_nearer_end_and_is_gone_once_all_is_decided(progress: float) -> None:
    rounding = begun(weight(ROWS, COLUMNS))
    h = rounding.share().detach()
    rounding.penalty(progress).backward()
    pull = -rounding.v.grad
    assert bool((pull[h > 0.5] >= 0).all())
    assert bool((pull[h < 0.5] <= 0).all())
    clear = ((h - 0.5).abs() > 0.3) & (h > 0.02) & (h < 0.98)
    assert bool((pull[clear] != 0).all())
    with torch.no_grad():
        rounding.v.copy_(torch.where(h >= 0.5, 20.0, -20.0))
    assert float(rounding.penalty(progress).detach()) == 0.0


class Watched(UpOrDown):
    """Keeps the share of undecided weights at every step."""

    undecided: list[float]

    def soft(self, progress: float) -> Tensor:
        h = self.share().detach()
        self.undecided.append(float(((h > 0.01) & (h < 0.99)).float().mean()))
        return super().soft(progress)


def undecided(regularization: float, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr("compress.passes.quantize.adaround.UpOrDown", Watched)
    monkeypatch.setattr(Watched, "undecided", found, raising=False)
    x = textbook.inputs(COLUMNS)
    pass_ = AdaRound(bits=3, steps=100, learning_rate=0.2, regularization=regularization, objective="layer")
    dict(pass_.run(textbook.block({"a": target(weight(ROWS, COLUMNS), x)})))
    assert len(found) == 100
    return found


def test_the_penalty_decides_weights_and_without_it_most_stay_undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    pulled, free = undecided(100.0, monkeypatch), undecided(0.0, monkeypatch)
    assert pulled[0] == free[0] > 0.9
    assert pulled[-1] < 0.25
    assert free[-1] > 0.5
    assert pulled[80] < pulled[50] < pulled[20] + 0.01


# --- what it is good for ----------------------------------------------------------------------------------------------

QUICK = {"steps": 60, "learning_rate": 0.1, "regularization": 1.0}


@each_grid
@pytest.mark.parametrize(
    "how", [{"inputs": "compressed"}, {"inputs": "original"}, {"inputs": "mix"}, {"objective": "layer"}], ids=str
)
def test_the_error_of_the_result_is_below_that_of_round_to_nearest(
    options: dict[str, object], how: dict[str, str]
) -> None:
    x = textbook.inputs(COLUMNS, tokens=160)
    block = textbook.block(two(x), samples=16)
    held = torch.tensor([0, 8])

    def error(weights: dict[str, Tensor]) -> float:
        """Relative, the plain way: of the held-out samples, or the mean over the layers."""
        if "objective" in how:
            original = {n: t.weight for n, t in block.targets.items()}
            lost = [(x @ (weights[n] - w).T).square().sum() / (x @ w.T).square().sum() for n, w in original.items()]
            return float(sum(lost)) / 2
        wanted = block.data.outputs.take(held)
        made = block.data.call(weights, block.data.inputs.take(held), held)
        return float((made - wanted).square().sum() / wanted.square().sum())

    edits = dict(AdaRound(**QUICK, **how, **options).run(block))
    start = error({n: nearest(t.weight, options).dequantize() for n, t in block.targets.items()})
    end = error({n: e.encoding.dequantize() for n, e in edits.items()})
    for edit in edits.values():
        assert edit.notes["block_error_start"] == pytest.approx(start, rel=1e-3)
        assert edit.notes["block_error"] == pytest.approx(end, rel=1e-3)
    assert end < start


def test_the_defaults_find_something_better_than_round_to_nearest() -> None:
    x = textbook.inputs(COLUMNS, tokens=160)
    edits = dict(AdaRound(bits=3).run(textbook.block(two(x), samples=16)))
    assert ratio(edits["a"]) < 1


@pytest.mark.parametrize("objective", ["block", "layer"])
def test_the_result_is_never_worse_than_round_to_nearest(objective: str) -> None:
    targets = two(textbook.inputs(COLUMNS, tokens=60))
    for regularization in (0.0, 1e6):
        pass_ = AdaRound(
            bits=8, steps=20, learning_rate=0.999, regularization=regularization, objective=objective
        )  # fmt: skip
        for edit in dict(pass_.run(textbook.block(targets))).values():
            assert ratio(edit) <= 1


# --- masks, overrides, failures ---------------------------------------------------------------------------------------


@each_grid
@pytest.mark.parametrize("objective", ["block", "layer"])
def test_masked_weights_stay_zero_and_the_kept_ones_still_learn(options: dict[str, object], objective: str) -> None:
    targets = two(textbook.inputs(COLUMNS, tokens=160), mask(ROWS, COLUMNS))
    edits = dict(AdaRound(**QUICK, objective=objective, **options).run(textbook.block(targets, samples=16)))
    for name, edit in edits.items():
        zero = ~targets[name].mask
        assert torch.equal(edit.mask, targets[name].mask)
        assert bool((edit.encoding.dequantize()[zero] == 0).all())
        assert torch.equal(edit.encoding.codes[zero], edit.encoding.idle().expand(edit.encoding.codes.shape)[zero])
    assert ratio(edits["a"]) < 1


def test_overrides_give_each_matrix_of_a_block_its_own_grid() -> None:
    other = {"bits": 5, "group_size": 16, "symmetric": True}
    pass_ = AdaRound(bits=2, **QUICK, overrides=(Override("b", other),))
    edits = dict(pass_.run(textbook.block(two())))
    for name, options in (("a", {"bits": 2}), ("b", other)):
        start = nearest(two()[name].weight, options)
        assert edits[name].encoding.form == start.form
        assert torch.equal(edits[name].encoding.scale, start.scale)


def test_a_start_that_is_not_finite_is_a_solve_error_and_the_fallback_has_the_same_grid() -> None:
    options = {"bits": 3, "group_size": 16, "symmetric": True, "scale_search": "mse"}
    block = textbook.block(two())
    bad = replace(block, data=replace(block.data, call=lambda w, h, n: block.data.call(w, h, n) * torch.inf))
    with pytest.raises(SolveError, match="not finite"):
        dict(AdaRound(**options).run(bad))
    assert AdaRound(**options).stand_in() == Rtn(**options)


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"bits": 1}, "bits"),
        ({"steps": 0}, "steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"regularization": -0.1}, "regularization"),
    ],
)
def test_impossible_options_are_named(options: dict[str, object], option: str) -> None:
    assert [e.option for e in errors_in(AdaRound(**options))] == [option]
