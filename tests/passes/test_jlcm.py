"""JLCM: tables and choices learned together, with the proximal mapping gradient."""

from typing import Any

import pytest
import textbook
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from compress.encodings import Codebooks
from compress.passes import Codebook, Jlcm
from compress.passes.base import Target
from compress.passes.quantize.jlcm import Choice, pulls

TABLE = torch.tensor([[-1.0, -0.3, -0.1, 0.2, 0.4, 1.1]])


def target(rows: int = 16, columns: int = 48, mask: Tensor | None = None) -> Target:
    w = textbook.weight(rows, columns) * torch.logspace(-1, 0.3, rows)[:, None]
    return Target(w if mask is None else w * mask, mask, None, torch.Generator().manual_seed(0))


def jlcm(**options: object) -> Jlcm:
    return Jlcm(**{"weighting": "none", **options})  # type: ignore[arg-type]


def learn(pass_: Jlcm, given: Target) -> tuple[Codebooks, dict[str, float]]:
    ((_, edit),) = pass_.run(textbook.block({"a": given}, samples=64))
    assert isinstance(edit.encoding, Codebooks)
    return edit.encoding, dict(edit.notes)


@pytest.mark.parametrize(
    "options", [{"bits": 3}, {"entries": 5, "tables": 3}, {"bits": 2, "scale": "row", "tables": 1}]
)
def test_learning_starts_exactly_at_k_means(options: dict[str, object]) -> None:
    given = target()
    start = jlcm(**options).start(given).encoding()
    expected = Codebook(weighting="none", **options).run(given).encoding  # type: ignore[arg-type]
    assert isinstance(expected, Codebooks)
    assert isinstance(start, Codebooks)
    assert torch.equal(start.table, expected.table)
    assert torch.equal(start.codes, expected.codes)


@pytest.mark.parametrize("gradient", ["proximal", "distance", "equal"])
def test_a_side_pulls_as_strongly_as_the_strongest_of_its_entries(gradient: str) -> None:
    tables = torch.cat([TABLE, torch.linspace(-1, 1, 6)[None], torch.tensor([[-0.5, -0.5, 0.0, 0.0, 0.1, 2.0]])])
    up, down = (pull.view(tables.shape) for pull in pulls(tables, gradient))
    for g, table in enumerate(tables.double()):
        mean = table.diff().mean()

        def pull(i: int, k: int, table: Tensor = table, mean: Tensor = mean) -> float:
            d = (table[i] - table[k]).abs()
            return float({"proximal": mean / d.clamp(min=mean / 4), "distance": d / mean}.get(gradient, torch.ones(())))

        for i in range(len(table)):
            above, below = range(i + 1, len(table)), range(i)
            assert float(up[g, i]) == pytest.approx(max((pull(i, k) for k in above), default=0.0), rel=1e-4)
            assert float(down[g, i]) == pytest.approx(max((pull(i, k) for k in below), default=0.0), rel=1e-4)


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the numbers of the largest tensor that is made."""

    numbers = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = op(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.numbers = max(self.numbers, made.numel())
        return made


@pytest.mark.parametrize("gradient", ["proximal", "distance", "equal"])
def test_pulls_need_no_more_memory_than_tables_whatever_their_entries(gradient: str) -> None:
    tables = torch.rand(3, 256).sort(1).values
    with Largest() as largest:
        pulls(tables, gradient)
    assert largest.numbers == tables.numel()


def test_a_weight_at_the_last_entry_is_pulled_inwards_alone() -> None:
    for gradient in ("proximal", "distance", "equal"):
        up, down = pulls(TABLE, gradient)
        assert bool((up[:-1] > 0).all())
        assert float(up[-1]) == 0
        assert bool((down[1:] > 0).all())
        assert float(down[0]) == 0


def test_the_gradient_of_an_entry_is_the_sum_over_the_weights_that_chose_it() -> None:
    state = jlcm(bits=2, tables=1).start(target())
    assert isinstance(state, Choice)
    towards = torch.randn(16, 48)
    (state.soft(0.0) * towards).sum().backward()
    codes = state.encoding().codes
    expected = torch.stack([towards[codes == k].sum() for k in range(4)]) * state.largest[0]
    assert state.moved.grad is not None
    assert torch.allclose(state.moved.grad[0], expected, rtol=1e-4)


def test_the_gradient_at_a_weight_points_the_way_its_choice_moves() -> None:
    state = jlcm(bits=3, tables=1).start(target())
    assert isinstance(state, Choice)
    towards = torch.randn(16, 48)
    (state.soft(0.0) * towards).sum().backward()
    assert state.place.grad is not None
    assert bool((state.place.grad * towards > 0).all())


def stepped(gradient: str, towards: Tensor, steps: int = 1) -> tuple[Choice, Codebooks]:
    """After so many steps of the optimizer down a gradient that stays the same."""
    state = jlcm(bits=3, tables=1, mapping_gradient=gradient, mapping_rate=0.1).start(target())
    assert isinstance(state, Choice)
    first = state.encoding()
    optimizer = torch.optim.Adam([{"params": ts, "lr": r if state.place is ts[0] else 0.0} for ts, r in state.groups()])
    for _ in range(steps):
        (state.soft(0.0) * towards).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        state.after()
    return state, first


@pytest.mark.parametrize("gradient", ["proximal", "distance", "equal"])
def test_adam_leaves_the_pull_of_the_entries_in_the_length_of_a_step(gradient: str) -> None:
    towards = torch.randn(16, 48)
    state, first = stepped(gradient, towards)
    up, down = pulls(first.table.float(), gradient)
    codes = first.codes.long()
    expected = torch.where(towards < 0, up[codes], -down[codes]) * 0.1
    assert torch.allclose(state.place.detach(), expected, atol=1e-4)


def test_choices_pass_any_number_of_entries_and_zero() -> None:
    given = target()
    state, first = stepped("proximal", given.weight.sign(), steps=200)  # every weight is wanted on the other side
    last = state.encoding()
    gone = last.codes.int() - first.codes.int()
    assert int(gone.abs().max()) > 3
    assert bool((last.dequantize() * given.weight <= 0).all())


@pytest.mark.parametrize(("bits", "rate"), [(2, 0.01), (3, 0.004)])
def test_learning_both_beats_learning_tables_which_beats_k_means(bits: int, rate: float) -> None:
    given = target(48, 48)
    _, both = learn(jlcm(bits=bits, steps=100, mapping_rate=rate, learning_rate=0.004), given)
    _, tables = learn(jlcm(bits=bits, steps=100, learning_rate=0.004, learn_mapping=False), given)
    assert both["block_error"] < tables["block_error"] < tables["block_error_start"]


@pytest.mark.parametrize(("bits", "rate"), [(2, 0.005), (3, 0.01)])
def test_the_proximal_pull_learns_more_than_one_that_grows_with_the_distance(bits: int, rate: float) -> None:
    given = target(48, 48)
    found = {
        gradient: learn(
            jlcm(bits=bits, steps=60, mapping_rate=rate, learning_rate=0.004, mapping_gradient=gradient), given
        )[1]["block_error"]
        for gradient in ("proximal", "distance")
    }
    assert found["proximal"] < 0.95 * found["distance"]


def test_tables_alone_leave_the_choices_nearest_to_the_weights() -> None:
    given = target()
    made, _ = learn(jlcm(bits=2, tables=1, steps=20, learn_mapping=False), given)
    distance = (given.weight[..., None] - made.table[0].float()).abs()
    chosen = distance.gather(2, made.codes.long()[..., None])[..., 0]
    assert torch.allclose(chosen, distance.min(-1).values)


@pytest.mark.parametrize("options", [{"bits": 2}, {"entries": 3, "tables": 2}, {"bits": 3, "scale": "row"}])
def test_the_result_is_a_sound_encoding_that_says_what_was_trained(options: dict[str, object]) -> None:
    made, notes = learn(jlcm(steps=30, learning_rate=0.05, **options), target())
    assert made.defect() is None
    assert notes["block_error"] <= notes["block_error_start"]


def test_the_gram_matrix_is_asked_for_only_where_the_objective_needs_it() -> None:
    assert Jlcm(objective="layer").needs == "gram"
    assert jlcm().needs == "none"
    assert Jlcm().needs == "norm"


def test_scales_of_groups_are_learned_and_stored() -> None:
    given = target(columns=64)
    pass_ = jlcm(bits=2, scale="group", group_size=16, steps=30)
    start = pass_.start(given).encoding()
    expected = Codebook(bits=2, scale="group", group_size=16, weighting="none").run(given).encoding
    assert isinstance(start, Codebooks)
    assert isinstance(expected, Codebooks)
    assert torch.equal(start.dequantize(), expected.dequantize())
    made, notes = learn(pass_, given)
    assert made.defect() is None
    assert made.scale is not None
    assert made.scale.shape == (16, 4)
    assert not torch.equal(made.scale, start.scale)
    assert notes["block_error"] < notes["block_error_start"]
