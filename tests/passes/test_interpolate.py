"""The properties of the straight line between two models."""

import pytest
import textbook
import torch
from textbook import fine_tunes

from compress import Interpolate
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
