"""The properties of task vectors."""

import textbook
import torch
from textbook import fine_tunes
from torch import Tensor

from compress import TaskArithmetic


def added(models: list[dict[str, Tensor]], **options: object) -> dict[str, Tensor]:
    return textbook.merged(TaskArithmetic(models=("m",) * (len(models) - 1), **options), models)


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)


def test_scaled_by_nothing_it_is_the_base() -> None:
    models = fine_tunes(3)
    assert all(torch.equal(value, models[0][name]) for name, value in added(models, scale=0.0).items())


def test_one_task_in_full_is_its_fine_tune() -> None:
    models = fine_tunes(1)
    assert close(added(models, scale=1.0), models[1])


def test_a_task_and_its_negation_are_nothing() -> None:
    base, tuned = fine_tunes(1)
    assert close(added([base, tuned, tuned], weights=(1.0, -1.0), scale=1.0), base)
    negated = {name: 2 * base[name] - tuned[name] for name in base}
    assert close(added([base, tuned], scale=-1.0), negated)
    assert close(added([base, tuned], weights=-0.5, scale=2.0), negated)


def test_the_order_of_the_tasks_does_not_matter() -> None:
    base, *tuned = fine_tunes(3)
    weights = (0.5, 1.0, -2.0)
    assert close(added([base, *tuned], weights=weights), added([base, *tuned[::-1]], weights=weights[::-1]))


def test_the_scale_multiplies_the_sum_of_the_task_vectors() -> None:
    base, *tuned = fine_tunes(3)
    expected = {name: base[name] + 0.4 * sum(t[name] - base[name] for t in tuned) for name in base}
    assert close(added([base, *tuned]), expected)
    mean = {name: base[name] + 0.4 * sum(t[name] - base[name] for t in tuned) / 3 for name in base}
    assert close(added([base, *tuned], combine="mean"), mean)


def test_weights_give_the_analogy() -> None:
    base, a, b, c = fine_tunes(3)
    expected = {name: base[name] + (c[name] - base[name]) + (b[name] - a[name]) for name in base}
    assert close(added([base, a, b, c], weights=(-1.0, 1.0, 1.0), scale=1.0), expected)


def test_weights_that_cancel_out_are_not_divided_by() -> None:
    base, a, b = fine_tunes(2)
    expected = {name: base[name] + 0.4 * (a[name] - b[name]) for name in base}
    assert close(added([base, a, b], weights=(1.0, -1.0), combine="mean"), expected)
