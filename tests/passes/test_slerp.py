"""The properties of spherical interpolation."""

import math

import pytest
import textbook
import torch
from textbook import fine_tunes
from torch import Tensor

from compress import Slerp
from compress.passes.merge.slerp import slerp_weights


def slerp(a: dict[str, Tensor], b: dict[str, Tensor], **options: object) -> dict[str, Tensor]:
    return textbook.merged(Slerp(models=("m",), **options), [a, b], piece=7)


def two() -> list[dict[str, Tensor]]:
    return fine_tunes(1, size=1.0)


def test_the_ends_are_the_two_models() -> None:
    a, b = two()
    for t, end in ((0.0, a), (1.0, b)):
        assert all(torch.allclose(v, end[n], atol=1e-6) for n, v in slerp(a, b, t=t).items())


@pytest.mark.parametrize("t", [0.1, 0.5, 0.8])
def test_between_tensors_of_equal_length_every_point_has_that_length(t: float) -> None:
    a, b = two()
    b = {name: value * a[name].norm() / value.norm() for name, value in b.items()}
    for name, value in slerp(a, b, t=t).items():
        assert float(value.norm()) == pytest.approx(float(a[name].norm()), rel=1e-5)


def test_swapped_models_meet_at_the_other_side() -> None:
    a, b = two()
    first, second = slerp(a, b, t=0.3), slerp(b, a, t=0.7)
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)


def test_the_angle_is_between_unit_vectors_and_the_tensors_are_not_normalised() -> None:
    a, b = two()
    for name, value in slerp(a, b, t=0.25).items():
        x, y = a[name].double().flatten(), b[name].double().flatten()
        angle = torch.arccos(x @ y / (x.norm() * y.norm()))
        expected = (torch.sin(0.75 * angle) * x + torch.sin(0.25 * angle) * y) / torch.sin(angle)
        assert torch.allclose(value.flatten().double(), expected, atol=1e-6)


@pytest.mark.parametrize("factor", [2.0, -1.0, 1.0])
def test_parallel_and_antiparallel_tensors_go_in_a_straight_line(factor: float) -> None:
    a, _ = two()
    b = {name: factor * value for name, value in a.items()}
    for name, value in slerp(a, b, t=0.25).items():
        assert torch.allclose(value, 0.75 * a[name] + 0.25 * b[name], atol=1e-6)


def test_a_tensor_of_zeros_does_no_harm() -> None:
    a, b = two()
    zeros = {name: torch.zeros_like(value) for name, value in b.items()}
    for name, value in slerp(a, zeros, t=0.5).items():
        assert torch.allclose(value, math.sin(math.pi / 4) * a[name], atol=1e-6)


def test_half_way_between_right_angles_both_count_alike() -> None:
    assert slerp_weights(0.5, 0.0) == pytest.approx((math.sqrt(0.5), math.sqrt(0.5)))
