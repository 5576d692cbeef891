"""The properties of a soup."""

import pytest
import textbook
import torch
from textbook import fine_tunes
from torch import Tensor

from compress import Average


def average(models: list[dict[str, Tensor]], **options: object) -> dict[str, Tensor]:
    return textbook.merged(Average(models=("m",) * (len(models) - 1), **options), models)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_uniform_soup_is_the_mean(count: int) -> None:
    models = fine_tunes(count)
    for name, value in average(models).items():
        assert torch.allclose(value, torch.stack([m[name] for m in models]).mean(0), atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_duplicates_change_nothing(count: int) -> None:
    model = fine_tunes(1)[1]
    for name, value in average([model] * (count + 1)).items():
        assert torch.allclose(value, model[name], rtol=2e-7, atol=0)


def test_the_order_of_the_models_does_not_matter() -> None:
    models = fine_tunes(3)
    first, second = average(models), average(models[::-1])
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)


def test_weights_are_divided_by_their_sum_unless_told_otherwise() -> None:
    models = fine_tunes(1)
    for name, value in average(models, weights=(1.0, 3.0)).items():
        assert torch.allclose(value, (models[0][name] + 3 * models[1][name]) / 4, atol=1e-6)
    for name, value in average(models, weights=(1.0, 3.0), normalize=False).items():
        assert torch.allclose(value, models[0][name] + 3 * models[1][name], atol=1e-6)


def test_one_weight_stands_for_every_model() -> None:
    models = fine_tunes(2)
    plain = average(models)
    for weights in (2.5, (2.5,)):
        assert all(torch.allclose(v, plain[n], atol=1e-6) for n, v in average(models, weights=weights).items())
