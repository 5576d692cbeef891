"""The properties of an arc between two task vectors."""

import math

import pytest
import textbook
import torch
from textbook import fine_tunes
from torch import Tensor

from compress import Nuslerp, Slerp
from compress.config.options import errors_in


def arc(models: list[dict[str, Tensor]], **options: object) -> dict[str, Tensor]:
    return textbook.merged(Nuslerp(models=("a", "b"), **options), models, piece=7)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (0.2, 0.8)])
def test_the_point_is_that_of_the_arc_between_the_task_vectors(weights: tuple[float, float]) -> None:
    base, *tuned = fine_tunes(2)
    share = weights[1] / sum(weights)
    for name, value in arc([base, *tuned], weights=weights).items():
        one, other = ((t[name] - base[name]).double() for t in tuned)
        angle = torch.acos((one * other).sum() / one.norm() / other.norm())
        point = (torch.sin((1 - share) * angle) * one + torch.sin(share * angle) * other) / torch.sin(angle)
        torch.testing.assert_close(value.double(), base[name].double() + point, atol=1e-6, rtol=1e-5)


def test_task_vectors_of_equal_length_keep_it_where_their_mean_is_shorter() -> None:
    base, *tuned = fine_tunes(2)
    for one, other in [tuned]:
        for name, value in base.items():
            delta = other[name] - value
            other[name] = value + delta * (one[name] - value).norm() / delta.norm()
    for name, value in arc([base, *tuned]).items():
        length = float((tuned[0][name] - base[name]).norm())
        mean = float(((tuned[0][name] + tuned[1][name]) / 2 - base[name]).norm())
        assert float((value - base[name]).norm()) == pytest.approx(length, rel=1e-4)
        assert mean < 0.95 * length


def test_the_ends_and_task_vectors_without_an_angle() -> None:
    base, one, other = fine_tunes(2)
    for weights, end in (((1.0, 0.0), one), ((0.0, 1.0), other)):
        for name, value in arc([base, one, other], weights=weights).items():
            torch.testing.assert_close(value, end[name])
    for name, value in arc([base, one, one]).items():
        torch.testing.assert_close(value, one[name])
    middle = arc([base, one, other], weights=(1.0, -1.0))
    even = arc([base, one, other])
    assert all(torch.equal(value, even[name]) for name, value in middle.items()), "weights without a sum: the middle"
    assert [e.option for e in errors_in(Nuslerp(models=("one",)))] == ["models"]


def test_slerp_takes_the_arc_of_models_however_alike_where_asked() -> None:
    base, tuned = fine_tunes(1, size=1e-3)
    both = [textbook.merged(Slerp(models=("m",), straight=s), [base, tuned], piece=7) for s in (0.9995, 1.0)]
    for name, value in base.items():
        cosine = float(
            (value.double() * tuned[name].double()).sum() / value.double().norm() / tuned[name].double().norm()
        )
        assert cosine > 0.9995
        weight = math.sin(math.acos(cosine) / 2) / math.sin(math.acos(cosine))
        torch.testing.assert_close(both[1][name], weight * (value + tuned[name]), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(both[0][name], (value + tuned[name]) / 2, rtol=1e-6, atol=1e-7)
