"""OATS: a sparse and a thin part in the place of a matrix, each the best beside the other, as the paper has it."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import compress
from compress import ConfigError, Oats, Wanda
from compress.calibration.statistics import Statistics
from compress.passes.base import Edit, Target


def statistics(inputs: Tensor) -> Statistics:
    found = Statistics(inputs.shape[1], "norm")
    found.update(inputs, "inputs")
    return found


def solved(pass_: Oats | Wanda, weight: Tensor, inputs: Tensor | None) -> Edit:
    seen = None if inputs is None else statistics(inputs)
    return pass_.run(Target(weight, statistics=seen))


def value(edit: Edit) -> Tensor:
    assert edit.weight is not None
    return edit.weight if edit.low_rank is None else edit.weight + edit.low_rank.product()


def uneven(rows: int, columns: int) -> Tensor:
    """Inputs of which some columns are much larger than others."""
    return torch.randn(rows, columns) * torch.logspace(0, 2, columns)[torch.randperm(columns)]


def lost(weight: Tensor, made: Tensor, inputs: Tensor) -> float:
    """Squared error of the columns as they are weighed by norms of inputs."""
    return float(((weight - made) * inputs.norm(dim=0)).square().sum())


def test_a_sum_of_a_sparse_and_a_thin_matrix_is_found_again() -> None:
    torch.manual_seed(0)
    thin = torch.randn(64, 2) @ torch.randn(2, 64)
    sparse = torch.zeros(64, 64).scatter_(1, torch.rand(64, 64).argsort(1)[:, :4], 20.0)
    sparse *= torch.randint(2, sparse.shape) * 2 - 1
    pass_ = Oats(sparsity=1 - 4 / 64, ratio=4.5 / 64, iterations=40, scaling="none")
    assert pass_.rank((64, 64)) == 2
    edit = solved(pass_, thin + sparse, None)
    assert edit.mask is not None
    assert torch.equal(edit.mask, sparse != 0)
    assert (value(edit) - thin - sparse).norm() < 1e-3 * sparse.norm()


def test_each_part_is_the_best_beside_the_other() -> None:
    torch.manual_seed(1)
    weight, inputs = torch.randn(48, 64), uneven(200, 64)
    edit = solved(Oats(sparsity=0.75, ratio=0.2, iterations=60), weight, inputs)
    assert edit.low_rank is not None
    assert edit.mask is not None
    scale, left = inputs.norm(dim=0), weight - edit.low_rank.product()
    scores = (left * scale).abs()
    worst_kept = scores.masked_fill(~edit.mask, math.inf).amin(1)
    best_gone = scores.masked_fill(edit.mask, 0).amax(1)
    assert (worst_kept > 0.97 * best_gone).all()  # S has the largest entries of each row
    assert torch.allclose(edit.weight, left * edit.mask, atol=1e-6)  # type: ignore[arg-type]
    rest = torch.linalg.svdvals((weight - edit.weight) * scale)  # type: ignore[operator]
    rank = edit.low_rank.rank
    assert lost(weight, value(edit), inputs) == pytest.approx(float(rest[rank:].square().sum()), rel=0.02)


def test_iterating_loses_less_than_one_turn_and_less_than_zeros_alone() -> None:
    torch.manual_seed(2)
    weight = torch.randn(64, 64) + 3 * torch.randn(64, 3) @ torch.randn(3, 64)
    inputs = uneven(300, 64)
    often, once = (solved(Oats(iterations=n), weight, inputs) for n in (20, 1))
    alone = solved(Wanda(sparsity=0.5), weight, inputs)
    losses = [lost(weight, value(edit), inputs) for edit in (often, once, alone)]
    assert losses == sorted(losses)
    assert losses[0] < 0.9 * losses[1]
    assert often.notes["output_error"] == pytest.approx(
        math.sqrt(losses[0] / lost(weight, torch.zeros(64, 64), inputs)), rel=1e-3
    )


def test_scaling_by_inputs_loses_less_of_the_outputs() -> None:
    torch.manual_seed(3)
    weight, inputs = torch.randn(64, 64), uneven(300, 64)
    scaled, plain = (solved(Oats(iterations=20, scaling=s), weight, inputs) for s in ("inputs", "none"))  # type: ignore[arg-type]
    assert lost(weight, value(scaled), inputs) < 0.7 * lost(weight, value(plain), inputs)
    assert (weight - value(plain)).norm() < (weight - value(scaled)).norm()


def test_zeros_and_numbers_are_as_many_as_asked_for() -> None:
    torch.manual_seed(4)
    weight, inputs = torch.randn(32, 64), torch.randn(100, 64)
    edit = solved(Oats(sparsity=0.75, ratio=0.25, iterations=3), weight, inputs)
    assert edit.mask is not None
    assert edit.low_rank is not None
    assert (edit.mask.sum(1) == 16).all()
    assert edit.low_rank.rank == int(0.25 * 32 * 64 / 96)
    edit = solved(Oats(sparsity="2:4", iterations=3), weight, inputs)
    assert edit.mask is not None
    assert (edit.mask.view(32, 16, 4).sum(2) == 2).all()


def test_the_result_is_kept_as_a_mask_values_and_factors() -> None:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(64, 32))
    result = compress.apply(model, [Oats(iterations=3)], calibration=torch.randn(16, 64))
    found = result.weights["0"]
    assert found.kind == "sparse-compensated"
    assert found.mask is not None
    assert float(found.mask.float().mean()) == pytest.approx(20 / 64)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"ratio": 0.01}, "pays for no rank"), ({"sparsity": "2:5"}, "divides"), ({"sparsity": "4:2"}, "keep must be")],
    ids=str,
)
def test_sizes_that_cannot_be_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        compress.apply(nn.Sequential(nn.Linear(64, 32)), [replace(Oats(), **options)], calibration=torch.randn(4, 64))  # type: ignore[arg-type]


def test_a_matrix_that_was_pruned_before_is_refused() -> None:
    passes = [compress.Magnitude(sparsity=0.5), Oats()]
    with pytest.raises(ConfigError, match="zeros and a correction together"):
        compress.apply(nn.Sequential(nn.Linear(64, 32)), passes, calibration=torch.randn(4, 64))
