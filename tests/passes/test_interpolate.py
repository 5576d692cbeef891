"""The properties of the straight line between two models."""

from contextlib import contextmanager

import pytest
import textbook
import torch
from textbook import fine_tunes

from compress import Interpolate
from compress.config.options import errors_in
from compress.passes.merge.base import Piece
from compress.passes.merge.fisher import informations
from compress.passes.merge.models import Running
from compress.passes.merge.schedules import Matched


def test_the_ends_are_exactly_the_two_models() -> None:
    models = fine_tunes(1, size=3.0)
    for alpha, end in ((0.0, models[0]), (1.0, models[1])):
        found = textbook.merged(Interpolate(models=("m",), alpha=alpha), models)
        assert all(torch.equal(value, end[name]) for name, value in found.items())


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_between_them_is_a_straight_line(alpha: float) -> None:
    a, b = fine_tunes(1)
    for name, value in textbook.merged(Interpolate(models=("m",), alpha=alpha), [a, b]).items():
        assert torch.allclose(value, (1 - alpha) * a[name] + alpha * b[name], atol=1e-6)


def test_the_share_may_differ_by_depth_and_by_name() -> None:
    a, b = fine_tunes(1)
    gradient = textbook.merged(Interpolate(models=("m",), alpha=(0.0, 1.0)), [a, b])
    for name, share in (("blocks.0.mlp.weight", 0.0), ("blocks.1.mlp.weight", 0.5), ("blocks.2.mlp.weight", 1.0)):
        assert torch.allclose(gradient[name], a[name].lerp(b[name], share), atol=1e-6)
    named = textbook.merged(Interpolate(models=("m",), alpha=(Matched("*.mlp.*", 1.0),)), [a, b])
    assert torch.equal(named["blocks.0.mlp.weight"], b["blocks.0.mlp.weight"])
    half = a["last.weight"].lerp(b["last.weight"], 0.5)
    assert torch.equal(named["last.weight"], half), "the default where no pattern matches"


def test_of_several_other_models_the_mean_is_the_other_end() -> None:
    old, *new = models = fine_tunes(3)
    for name, value in textbook.merged(Interpolate(models=("m",) * 3, alpha=0.25), models).items():
        mean = sum(each[name] for each in new) / 3
        assert torch.allclose(value, 0.75 * old[name] + 0.25 * mean, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2])
def test_by_fisher_information_numbers_are_weighed_and_the_ends_stay_the_ends(count: int) -> None:
    values = [each["first.weight"].flatten() for each in fine_tunes(count, size=3.0)]
    weights = [torch.rand_like(value) + 0.1 for value in values]

    def merged(alpha: float, known: list[torch.Tensor]) -> torch.Tensor:
        pass_ = Interpolate(models=("m",) * count, alpha=alpha, importance="fisher")
        parts = []
        for start in range(0, len(values[0]), 7):  # pieces, each with its part of the information
            part = slice(start, start + 7)
            piece = Piece("first.weight", values[0][part], tuple(v[part] for v in values[1:]), start=start)
            parts.append(pass_.run(piece, {"first.weight": known}))
        return torch.cat(parts)

    shares = [0.7, *(0.3 / count for _ in range(count))]
    total = sum(s * f for s, f in zip(shares, weights, strict=True))
    expected = sum(s * f * v for s, f, v in zip(shares, weights, values, strict=True)) / total
    assert torch.allclose(merged(0.3, weights), expected, atol=1e-5)
    assert torch.equal(merged(0.0, weights), values[0])
    alike = [torch.ones_like(value) for value in values]
    assert torch.allclose(merged(0.3, alike), sum(s * v for s, v in zip(shares, values, strict=True)), atol=1e-6)
    if count == 1:
        assert torch.equal(merged(1.0, weights), values[1])


def test_the_information_is_that_of_the_predictions_and_needs_no_labels() -> None:
    """Of logits W x it is known: the mean of p (1 - p) x^2."""
    x = torch.randn(600, 3, generator=torch.Generator().manual_seed(0))
    weights = [torch.randn(2, 3, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]

    class Linear(textbook.Wholes):
        @contextmanager
        def running(self):  # type: ignore[no-untyped-def]
            yield Running(
                lambda make, numbers: x[numbers] @ make(["w"])["w"].T,
                len(x),
                textbook.TrainingStore(),
                ("w",),
                torch.zeros(len(x)),
            )

    wholes = Linear([{"w": each} for each in weights])
    found = informations(wholes, 2)["w"]
    for weight, information in zip(weights, found, strict=True):
        chances = (x @ weight.T).softmax(-1)
        known = (chances * (1 - chances)).T @ x.square() / len(x)
        torch.testing.assert_close(information, known, rtol=0.25, atol=0.01)
    assert all(torch.equal(a, b) for a, b in zip(found, informations(wholes, 2)["w"], strict=True)), "again the same"


def test_where_only_one_model_depends_on_a_number_it_decides() -> None:
    old, new = torch.tensor([1.0, 1.0]), torch.tensor([2.0, 2.0])
    known = [torch.tensor([1.0, 1e-6]), torch.tensor([1e-6, 1.0])]
    found = Interpolate(models=("m",), importance="fisher").run(Piece("w", old, (new,)), {"w": known})
    assert torch.allclose(found, torch.tensor([1.0, 2.0]), atol=1e-5)


def test_models_of_other_vocabularies_are_refused_where_they_would_be_run() -> None:
    errors = errors_in(Interpolate(models=("m",), importance="fisher", vocabulary="common"))
    assert [error.option for error in errors] == ["vocabulary"]
