"""FlexRound: the properties of its paper."""

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
from compress.lazy import function
from compress.passes import FlexRound, Override, Rtn
from compress.passes.base import Block, Edit, Target
from compress.passes.quantize.flexround import Divide, Division

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, COLUMNS = 8, 48

GRIDS = [
    {"granularity": "tensor", "scale_rate": 0.005},
    {"granularity": "channel", "bits": 3},
    {"group_size": 16, "bits": 3},
    {"granularity": "tensor", "symmetric": True},
    {"symmetric": True, "bits": 3},
    {"group_size": 16, "symmetric": True, "bits": 2},
]
# What shows an effect on a toy; the defaults are for models.
TOY_OPTIONS: dict[str, object] = {"scale_search": "minmax", "learning_rate": 0.005}
each_grid = pytest.mark.parametrize("options", only(GRIDS[::3], GRIDS), ids=str)


def begun(w: Tensor, kernel: int = 1, **options: object) -> Division:
    return FlexRound(**options).start(replace(target(w), kernel=kernel))


def nearest(w: Tensor, options: dict[str, object], kept: Tensor | None = None) -> Uniform:
    found = FlexRound(**options).stand_in().run(target(w, kept=kept)).encoding
    assert isinstance(found, Uniform)
    return found


def assert_same(a: Uniform, b: Uniform) -> None:
    assert torch.equal(a.codes, b.codes)
    assert a.scale.dtype == b.scale.dtype
    assert torch.equal(a.scale, b.scale)
    assert torch.equal(a.zero_point, b.zero_point)
    assert (a.bits, a.symmetric) == (b.bits, b.symmetric)


def by_layer(w: Tensor, x: Tensor, **options: object) -> Edit:
    """One matrix, learned from its own outputs with the whole data at every step."""
    pass_ = FlexRound(objective="layer", **{**TOY_OPTIONS, **options})
    return dict(pass_.run(textbook.block({"a": target(w, x)})))["a"]


def ratio(edit: Edit) -> float:
    """Output error relative to round-to-nearest."""
    return edit.notes["block_error"] / edit.notes["block_error_start"]


# --- the start --------------------------------------------------------------------------------------------------------


@each_grid
@pytest.mark.parametrize("search", ["minmax", "mse"])
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("kernel", [1, 4])
def test_learning_starts_exactly_at_round_to_nearest(
    options: dict[str, object], search: str, rank: int | None, kernel: int
) -> None:
    w = weight(ROWS, COLUMNS)
    w[0] = 0  # a row without a range
    w[1, :6] = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 3.0])  # ties of the grid with scale 1
    options = {**options, "scale_search": search}
    division = begun(w, kernel, rank=rank, **options)
    expected = nearest(w, options)
    assert_same(division.encoding(), expected)
    assert torch.equal(division.soft(0.0), expected.dequantize())


def test_ties_at_the_start_go_where_round_to_nearest_sends_them() -> None:
    scale = torch.tensor([[0.25]]).half()
    w = (torch.arange(-8, 7) + 0.5)[None] * 0.25
    zero = torch.tensor([[8]], dtype=torch.uint8)
    division = Division(w, scale, zero, FlexRound(bits=4, granularity="tensor"), None)
    assert torch.equal(division.encoding().codes.int() - 8, (torch.arange(-8, 7) + 0.5)[None].round().int())


# --- gradients --------------------------------------------------------------------------------------------------------


class Straight(torch.autograd.Function):
    """Round; gradients pass as if it were not there."""

    @staticmethod
    def forward(_: object, u: Tensor) -> Tensor:
        return u.round()

    @staticmethod
    def backward(_: object, gradient: Tensor) -> Tensor:
        return gradient


def plain(w: Tensor, first: Tensor, log_s1: Tensor, log: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """What `Divide` computes, left to autograd."""
    s1 = first * log_s1.exp()
    q = Straight.apply(w / (s1 * log.exp()))
    return s1 * torch.clamp(q, low, high)


GEOMETRY = {"tensor": (1, 1), "channel": (6, 1), "group": (6, 4)}


@pytest.mark.parametrize("geometry", GEOMETRY.values(), ids=GEOMETRY)
@pytest.mark.parametrize("size", [0.4, 0.1])  # of a step: few and most weights outside the grid
def test_gradients_equal_plain_straight_through_autograd_where_weights_are_clipped_too(
    geometry: tuple[int, int], size: float
) -> None:
    groups = geometry[1]
    w = torch.randn(6, groups, 24 // groups, dtype=torch.float64)
    w[0, 0, :3] = 0
    first = size * (0.5 + torch.rand(*geometry, 1, dtype=torch.float64))
    low = -torch.randint(1, 5, (*geometry, 1)).double()
    high = low + 7
    log_s1 = (0.2 * torch.randn(*geometry, 1, dtype=torch.float64)).requires_grad_()
    log = (0.3 * torch.randn_like(w)).requires_grad_()
    upstream = torch.randn_like(w)

    values, gradients = [], []
    for compute in (function(Divide).apply, plain):
        made = compute(w, first, log_s1, log, low, high)
        values.append(made.detach())
        gradients.append(torch.autograd.grad((made * upstream).sum(), [log_s1, log]))
    q = values[1] / (first * log_s1.exp())
    clipped = (w / (first * (log_s1 + log).exp())).round() != q.round()
    assert 0.01 < float(clipped.double().mean()) < 0.9
    assert torch.allclose(values[0], values[1], rtol=1e-12)
    for ours, theirs in zip(*gradients, strict=True):
        assert ours.shape == theirs.shape
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)
    assert bool((gradients[0][1][clipped] == 0).all())
    assert bool((gradients[0][1][0, 0, :3] == 0).all())


def test_the_gradient_of_a_divisor_is_proportional_to_its_weight() -> None:
    w = torch.linspace(-1, 1, 21)[None, None]
    log = torch.zeros_like(w, requires_grad=True)
    first, log_s1, low, high = torch.full((1, 1, 1), 0.3), torch.zeros(1, 1, 1), torch.tensor(-8.0), torch.tensor(7.0)
    made = function(Divide).apply(w, first, log_s1, log, low, high)
    made.sum().backward()
    assert torch.allclose(log.grad, -w, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"rank": 3}, {"learn_scale": False}, {"row_factor": False}], ids=str)
def test_every_learned_number_gets_a_gradient_and_no_other(options: dict[str, object]) -> None:
    division = begun(weight(ROWS, COLUMNS), bits=3, group_size=16, **options)
    if "rank" in options:
        with torch.no_grad():
            division.left += 0.01  # at exactly zero the other factor sees nothing
    division.soft(0.0).square().sum().backward()
    learned = [t for tensors, _ in division.groups() for t in tensors]
    assert all(bool(t.grad.any()) for t in learned)
    named = {"log_s1", "log_s2", "log_s3", "log_s4", "left", "right", "column"}
    moving = {name for name in named if any(getattr(division, name) is t for t in learned)}
    absent = {"learn_scale": {"log_s1"}, "row_factor": {"log_s3"}}.get(next(iter(options), ""), set())
    form = {"left", "right", "column"} if "rank" in options else {"log_s2"}
    assert moving == ({"log_s1", "log_s3"} | form) - absent
    assert all(getattr(division, name).grad is None for name in named - moving)


@pytest.mark.parametrize("rank", [None, 2])
def test_the_columns_of_an_input_channel_share_a_learned_divisor_in_a_convolution(rank: int | None) -> None:
    w = weight(ROWS, COLUMNS)
    division = begun(w, 4, bits=8, group_size=16, rank=rank)
    assert any(t is division.log_s4 for tensors, _ in division.groups() for t in tensors)
    assert division.log_s4.numel() == COLUMNS // 4
    before = division.soft(0.0).detach()
    with torch.no_grad():
        division.log_s4[5] += 1.0
    after = division.soft(0.0).detach()
    changed = (before != after).any(0).nonzero().flatten().tolist()
    assert changed == [20, 21, 22, 23]
    assert torch.allclose(after[:, 20:24], before[:, 20:24] / torch.e, atol=float(division.first_scale.max()))
    division.soft(0.0).square().sum().backward()
    twin = begun(w, 1, bits=8, group_size=16)
    with torch.no_grad():
        twin.log_s2.copy_(division.logarithm())
    twin.soft(0.0).square().sum().backward()
    expected = twin.log_s2.grad.view(ROWS, COLUMNS).sum(0).view(-1, 4).sum(1)
    assert torch.allclose(division.log_s4.grad.flatten(), expected, rtol=1e-4, atol=1e-4)


# --- what cannot happen -----------------------------------------------------------------------------------------------


@each_grid
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("size", [0.1, 0.5, 2.0])
def test_no_weight_crosses_zero_and_zero_stays_whatever_is_learned(
    options: dict[str, object], rank: int | None, size: float
) -> None:
    w = weight(ROWS, COLUMNS)
    w[:, ::7] = 0
    division = begun(w, rank=rank, **options)
    with torch.no_grad():
        for tensors, _ in division.groups():
            for t in tensors:
                t += size * torch.randn(t.shape)
    e = division.encoding()
    assert not torch.equal(e.codes, nearest(w, options).codes)
    for values in (e.dequantize(), division.soft(1.0).detach()):
        assert bool((values * w >= 0).all())
        assert bool((values[w == 0] == 0).all())
    assert int(e.codes.max()) < 2**e.bits
    assert e.defect() is None


@each_grid
def test_the_zero_points_are_never_learned(options: dict[str, object]) -> None:
    w = weight(ROWS, COLUMNS)
    made = by_layer(w, textbook.inputs(COLUMNS), steps=20, **options)
    assert made.notes["best_step"] > 0
    assert torch.equal(made.encoding.zero_point, nearest(w, {**TOY_OPTIONS, **options}).zero_point)


# --- what is stored ---------------------------------------------------------------------------------------------------


def two(kept: Tensor | None = None) -> dict[str, Target]:
    w = {"a": weight(ROWS, COLUMNS, 1), "b": weight(6, COLUMNS, 2)}
    return {n: target(v, kept=None if kept is None else kept[: len(v)]) for n, v in w.items()}


def watched(block: Block, measured: list[dict[str, Tensor]]) -> Block:
    """The same block; keeps the weights that its error is measured with."""

    def call(weights: dict[str, Tensor], hidden: Tensor, numbers: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            measured.append({n: w.clone() for n, w in weights.items()})
        return block.data.call(weights, hidden, numbers)

    return replace(block, data=replace(block.data, call=call))


@each_grid
def test_the_stored_weights_are_bit_for_bit_those_whose_error_was_measured(options: dict[str, object]) -> None:
    measured: list[dict[str, Tensor]] = []
    block = watched(textbook.block(two(), samples=16), measured)
    edits = dict(FlexRound(steps=30, **TOY_OPTIONS, **options).run(block))  # looks every three steps
    assert len(measured) == 11
    notes = edits["a"].notes
    assert notes["best_step"] > 0
    for name, edit in edits.items():
        assert torch.equal(edit.encoding.dequantize(), measured[int(notes["best_step"]) // 3][name])
        assert edit.notes == notes
    held = torch.tensor([0, 8])
    wanted = block.data.outputs.take(held)
    stored = {n: e.encoding.dequantize() for n, e in edits.items()}
    made = block.data.call(stored, block.data.inputs.take(held), held)
    error = float((made - wanted).square().sum() / wanted.square().sum())
    assert notes["block_error"] == pytest.approx(error, rel=1e-5)


@each_grid
def test_while_learning_weights_differ_from_the_stored_ones_only_by_the_rounding_of_scales(
    options: dict[str, object],
) -> None:
    division = begun(weight(ROWS, COLUMNS), **options)
    with torch.no_grad():
        for tensors, _ in division.groups():
            for t in tensors:
                t += 0.1 * torch.randn(t.shape)
    soft, hard = division.soft(1.0).detach(), division.encoding().dequantize()
    assert bool(((soft - hard).abs() <= 2**-11 * soft.abs() * 1.001).all())
    assert division.encoding().scale.dtype == torch.float16


def test_the_divisors_are_not_multiplied_back() -> None:
    w = weight(ROWS, COLUMNS)
    division = begun(w, bits=4)
    with torch.no_grad():
        division.log_s2 += 5.0  # every weight over e^5 rounds to zero
    assert not division.encoding().dequantize().any()
    assert not division.soft(1.0).any()


@each_grid
def test_it_is_stored_like_round_to_nearest(options: dict[str, object]) -> None:
    edits = dict(FlexRound(steps=4, **options).run(textbook.block(two())))
    for name, edit in edits.items():
        w = two()[name].weight
        assert edit.encoding.form == nearest(w, options).form == FlexRound(**options).form(tuple(w.shape))
        assert edit.encoding.bits_per_weight == nearest(w, options).bits_per_weight


# --- what it is good for ----------------------------------------------------------------------------------------------


@each_grid
@pytest.mark.parametrize(
    "how", [{"inputs": "compressed"}, {"inputs": "original"}, {"inputs": "mix"}, {"objective": "layer"}], ids=str
)
def test_the_error_of_the_result_is_below_that_of_round_to_nearest(
    options: dict[str, object], how: dict[str, str]
) -> None:
    x = textbook.inputs(COLUMNS, tokens=160)
    targets = {n: Target(t.weight, None, textbook.statistics(x), t.generator) for n, t in two().items()}
    block = textbook.block(targets, samples=16)
    held = torch.arange(16)

    def error(weights: dict[str, Tensor]) -> float:
        made = block.data.call(weights, block.data.inputs.take(held), held)
        return float((made - block.data.outputs.take(held)).square().sum())

    options = {**TOY_OPTIONS, **options}
    edits = dict(FlexRound(steps=60, **how, **options).run(block))
    start = error({n: nearest(t.weight, options).dequantize() for n, t in targets.items()})
    assert error({n: e.encoding.dequantize() for n, e in edits.items()}) < 0.95 * start
    assert ratio(edits["a"]) < 1


@pytest.mark.parametrize("learning_rate", [0.05, 0.999])
def test_the_result_is_never_worse_than_round_to_nearest_however_large_the_learning_rate(learning_rate: float) -> None:
    edits = dict(FlexRound(bits=8, steps=30, learning_rate=learning_rate).run(textbook.block(two())))
    for name, edit in edits.items():
        assert edit.notes["best_step"] == 0
        assert_same(edit.encoding, nearest(two()[name].weight, {"bits": 8}))


TOY = [(weight(64, 96, seed), textbook.inputs(96, tokens=1024, seed=seed)) for seed in range(2)]


@pytest.mark.parametrize(("bits", "learning_rate"), only([(4, 0.005)], [(4, 0.005), (3, 0.001)]))
def test_the_row_factor_and_the_scale_are_worth_learning(bits: int, learning_rate: float) -> None:
    options = {"bits": bits, "learning_rate": learning_rate, "steps": 200}
    full, no_row, frozen = (
        sum(ratio(by_layer(w, x, **options, **changed)) for w, x in TOY) / len(TOY)
        for changed in ({}, {"row_factor": False}, {"learn_scale": False})
    )
    assert full < no_row < frozen <= 1
    assert full < 0.9


def test_a_scale_of_a_whole_matrix_learns_slower_than_the_divisors_and_is_then_worth_learning() -> None:
    options = {"bits": 3, "granularity": "tensor", "scale_search": "mse", "learning_rate": 0.01, "steps": 200}
    slow, fast, frozen, no_row = (
        sum(ratio(by_layer(w, x, **options, **changed)) for w, x in TOY) / len(TOY)
        for changed in ({}, {"scale_rate": 0.01}, {"learn_scale": False}, {"row_factor": False})
    )
    assert slow < min(fast, frozen, no_row)
    rates = {g: FlexRound(granularity=g).rate_of_scales() for g in ("channel", "tensor")}  # type: ignore[arg-type]
    assert rates == {"channel": 0.01, "tensor": pytest.approx(0.003)}


def test_large_weights_travel_further() -> None:
    moved_large = moved_small = 0.0
    for w, x in TOY:
        e = by_layer(w, x, bits=4, learning_rate=0.005, steps=200).encoding
        steps = (e.codes.int() - nearest(w, {"bits": 4, "scale_search": "minmax"}).codes.int()).abs()
        large = w.abs() >= w.abs().flatten().quantile(0.9)
        moved_large += float((steps[large] >= 2).float().mean())
        moved_small += float((steps[~large] >= 2).float().mean())
    assert moved_large > 0.01
    assert moved_large > 4 * moved_small


@pytest.mark.parametrize("rank", [1, 4])
def test_thin_divisors_are_fewer_numbers_and_still_better_than_round_to_nearest(rank: int) -> None:
    w, x = TOY[0]
    counts = [sum(t.numel() for tensors, _ in begun(w, bits=3, rank=r).groups() for t in tensors) for r in (rank, None)]
    assert counts == [rank * (64 + 96) + 96 + 2 * 64, 64 * 96 + 2 * 64]
    assert ratio(by_layer(w, x, bits=3, rank=rank, steps=100)) < 0.9


def test_thin_divisors_start_from_the_generator_of_their_site() -> None:
    w = weight(ROWS, COLUMNS)

    def right(seed: int) -> Tensor:
        return FlexRound(rank=2).start(Target(w, generator=torch.Generator().manual_seed(seed))).right.detach()

    torch.manual_seed(1)
    one = right(0)
    torch.manual_seed(2)
    assert torch.equal(one, right(0))
    assert not torch.equal(one, right(1))
    assert float(one.abs().max()) <= COLUMNS**-0.5


# --- masks, overrides, failures ---------------------------------------------------------------------------------------


@each_grid
@pytest.mark.parametrize("how", [{}, {"rank": 2}, {"objective": "layer"}], ids=str)
def test_masked_weights_stay_zero_and_the_kept_ones_still_learn(
    options: dict[str, object], how: dict[str, object]
) -> None:
    x = textbook.inputs(COLUMNS, tokens=160)
    kept = mask(ROWS, COLUMNS)
    targets = {n: Target(t.weight, t.mask, textbook.statistics(x), t.generator) for n, t in two(kept).items()}
    measured: list[dict[str, Tensor]] = []
    block = watched(textbook.block(targets, samples=16), measured)
    edits = dict(FlexRound(steps=60, **how, **TOY_OPTIONS, **options).run(block))
    for name, edit in edits.items():
        zero = ~targets[name].mask
        assert torch.equal(edit.mask, targets[name].mask)
        assert bool((edit.encoding.dequantize()[zero] == 0).all())
        assert torch.equal(edit.encoding.codes[zero], edit.encoding.idle().expand(edit.encoding.codes.shape)[zero])
        assert all(bool((weights[name][zero] == 0).all()) for weights in measured)
        assert ratio(edit) < 1


def test_overrides_give_each_matrix_of_a_block_its_own_grid() -> None:
    pass_ = FlexRound(bits=2, steps=20, overrides=(Override("b", {"bits": 5, "group_size": 16, "symmetric": True}),))
    edits = dict(pass_.run(textbook.block(two())))
    assert ratio(edits["a"]) < 1
    assert (edits["a"].encoding.bits, edits["a"].encoding.group_size, edits["a"].encoding.symmetric) == (2, 48, False)
    assert (edits["b"].encoding.bits, edits["b"].encoding.group_size, edits["b"].encoding.symmetric) == (5, 16, True)
    start = dict(replace(pass_, steps=1, learning_rate=1e-9).run(textbook.block(two())))
    assert_same(start["a"].encoding, nearest(two()["a"].weight, {"bits": 2}))
    assert_same(start["b"].encoding, nearest(two()["b"].weight, {"bits": 5, "group_size": 16, "symmetric": True}))


def test_overrides_give_each_matrix_of_a_block_its_own_learning_rate() -> None:
    pass_ = FlexRound(bits=2, steps=20, overrides=(Override("b", {"learning_rate": 1e-9}),))
    edits = dict(pass_.run(textbook.block(two())))
    assert edits["a"].notes["best_step"] > 0
    assert not torch.equal(edits["a"].encoding.codes, nearest(two()["a"].weight, {"bits": 2}).codes)
    assert_same(edits["b"].encoding, nearest(two()["b"].weight, {"bits": 2}))


def test_a_start_that_is_not_finite_is_a_solve_error_and_the_fallback_has_the_same_grid() -> None:
    options = {"bits": 3, "group_size": 16, "symmetric": True, "scale_search": "mse"}
    block = textbook.block(two())
    bad = replace(block, data=replace(block.data, call=lambda w, h, n: block.data.call(w, h, n) * torch.inf))
    pass_ = FlexRound(**options)
    with pytest.raises(SolveError, match="not finite"):
        dict(pass_.run(bad))
    assert pass_.stand_in() == Rtn(**options)


def test_no_statistics_are_a_solve_error_by_layer() -> None:
    with pytest.raises(SolveError, match="no input"):
        dict(FlexRound(objective="layer").run(textbook.block(two())))


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"bits": 1}, "bits"),
        ({"steps": 0}, "steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": 1.0}, "learning_rate"),
        ({"rank": 0}, "rank"),
        ({"scale_rate": 0.0}, "scale_rate"),
        ({"scale_rate": 0.01, "learn_scale": False}, "scale_rate"),
    ],
)
def test_impossible_options_are_named(options: dict[str, object], option: str) -> None:
    assert [e.option for e in errors_in(FlexRound(**options))] == [option]


def test_only_learning_by_layer_needs_statistics_and_both_need_data() -> None:
    by_block, by_layer_ = FlexRound(), FlexRound(objective="layer")
    assert (by_block.needs, by_layer_.needs) == ("none", "gram")
    assert by_block.calibrated
    assert by_layer_.calibrated
