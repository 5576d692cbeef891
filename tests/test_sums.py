"""Every call of a module counts, and what is fed by the same tensors is summed up once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compress
from compress.calibration import collect
from compress.calibration.statistics import Need, Statistics

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def a() -> nn.Linear:
    return nn.Linear(4, 4)


@pytest.fixture
def b() -> nn.Linear:
    return nn.Linear(4, 4)


def grams(modules: Mapping[str, Any], runs: list[Callable[[], Any]], need: Need = "gram") -> dict[str, Statistics]:
    with torch.no_grad():
        return collect.statistics(modules, dict.fromkeys(modules, need), runs)


def is_sum(found: Statistics, inputs: list[Tensor]) -> bool:
    x = torch.cat(inputs)
    return found.tokens == len(x) and torch.allclose(found.gram, x.T @ x, rtol=1e-5, atol=1e-4)


def different(count: int) -> list[Tensor]:
    return list(torch.randn(count, 10, 4, generator=torch.Generator().manual_seed(0)))


def test_a_module_that_is_called_again_in_a_pass_counts_each_call(a: nn.Linear, b: nn.Linear) -> None:
    x, y, z, w = different(4)
    found = grams({"a": a, "b": b}, [lambda: (a(x), b(x), b(y)), lambda: (a(z), b(z), b(w))])
    assert is_sum(found["a"], [x, z])
    assert is_sum(found["b"], [x, y, z, w])
    assert found["a"] is not found["b"]


def test_the_first_of_two_may_be_the_one_that_is_called_again(a: nn.Linear, b: nn.Linear) -> None:
    x, y, z = different(3)
    runs = [lambda x=x: (a(x), b(x), a(y)) for x in (x, z)]
    found = grams({"a": a, "b": b}, runs)
    assert is_sum(found["a"], [x, y, z, y])
    assert is_sum(found["b"], [x, z])


def test_one_that_was_called_before_with_something_else_is_not_shared(a: nn.Linear, b: nn.Linear) -> None:
    x, y = different(2)
    found = grams({"a": a, "b": b}, [lambda: (a(y), a(x), b(x))])
    assert is_sum(found["a"], [y, x])
    assert is_sum(found["b"], [x])


def test_modules_that_are_called_again_and_again_with_the_same_share_one_sum(a: nn.Linear, b: nn.Linear) -> None:
    x, y, z, w = different(4)
    runs = [lambda p=p, q=q: (a(p), b(p), a(q), b(q)) for p, q in ((x, y), (z, w))]
    found = grams({"a": a, "b": b}, runs)
    assert found["a"] is found["b"]
    assert is_sum(found["a"], [x, y, z, w])


def test_only_a_first_pass_whose_modules_go_apart_is_run_twice(a: nn.Linear, b: nn.Linear) -> None:
    x, y = different(2)
    ran: list[str] = []

    def apart() -> None:
        ran.append("apart")
        a(x), b(x), b(y)

    def alike() -> None:
        ran.append("alike")
        a(x), b(x), a(y), b(y)

    grams({"a": a, "b": b}, [apart] * 3)
    grams({"a": a, "b": b}, [alike] * 3)
    assert ran == ["apart"] * 4 + ["alike"] * 3


def test_several_modules_of_one_name_are_one_weight_fed_by_all_of_them(a: nn.Linear, b: nn.Linear) -> None:
    x, y = different(2)
    c = nn.Linear(4, 4)
    found = grams({"shared": [a, b], "c": c}, [lambda: (a(x), c(x), b(y))])
    assert is_sum(found["shared"], [x, y])
    assert is_sum(found["c"], [x])


def test_a_module_that_is_reached_later_has_no_share_in_earlier_sums(a: nn.Linear, b: nn.Linear) -> None:
    x, y = different(2)
    found = grams({"a": a, "b": b}, [lambda: a(x), lambda: (a(y), b(y))])
    assert is_sum(found["a"], [x, y])
    assert is_sum(found["b"], [y])


@pytest.mark.parametrize("calls", ["aba", "abb", "abaab"])
def test_calls_that_change_from_batch_to_batch_are_an_error_and_never_a_wrong_sum(
    a: nn.Linear, b: nn.Linear, calls: str
) -> None:
    x, y = different(2)

    def second() -> None:
        seen = {"a": [x, y, y], "b": [x, y, y]}
        for name in calls:
            (a if name == "a" else b)(seen[name].pop(0))

    with pytest.raises(compress.CompressError, match="were fed by one tensor at first"):
        grams({"a": a, "b": b}, [lambda: (a(x), b(x), a(y), b(y)), second])


def test_the_range_of_inputs_is_that_of_every_call(a: nn.Linear, b: nn.Linear) -> None:
    x, y = different(2)
    with torch.no_grad():
        found = collect.statistics(
            {"a": a, "b": b}, {"a": "norm", "b": "norm"}, [lambda: (a(x), b(x), b(5 * y))], ranged=("a", "b")
        )
    ranges = found["a"].range, found["b"].range
    assert ranges[0] is not None
    assert ranges[1] is not None
    assert ranges[0].high == pytest.approx(float(x.max()))
    assert ranges[1].high == pytest.approx(max(float(x.max()), 5 * float(y.max())))
