"""The properties of BitDelta: a sign for every change, one scale per matrix and round."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import textbook
import torch
from textbook import fine_tunes
from torch import Tensor

from compress import BitDelta
from compress.calibration.training import Make, TrainingStore
from compress.config.options import errors_in
from compress.passes.merge.base import Piece
from compress.passes.merge.models import Models, Running
from compress.passes.merge.sign_scales import Distilled, distance, fit_sign_scales, signs_of

MATRICES = [f"blocks.{k}.mlp.weight" for k in range(3)]


def bitdelta(base: dict[str, Tensor], tuned: dict[str, Tensor], **options: object) -> dict[str, Tensor]:
    return textbook.merged(BitDelta(models=("m",), **{"steps": 0, **options}), [base, tuned], piece=11)


def from_zero(**options: object) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A delta, and what is kept of it: from a base of zeros, so that nothing is lost in adding it."""
    base, tuned = fine_tunes(1)
    zeros = {name: torch.zeros_like(value) for name, value in base.items()}
    delta = {name: tuned[name] - base[name] for name in base}
    return delta, bitdelta(zeros, delta, **options)


def test_a_matrix_in_a_block_becomes_signs_and_all_else_is_the_fine_tunes() -> None:
    base, tuned = fine_tunes(1)
    for name, value in bitdelta(base, tuned).items():
        if name not in MATRICES:
            assert torch.equal(value, tuned[name])
            continue
        delta = tuned[name] - base[name]
        scale = delta.double().abs().mean().float()
        assert torch.equal(value, base[name] + scale * torch.where(delta >= 0, 1.0, -1.0))


def test_the_scale_has_the_least_error_which_is_what_the_signs_do_not_explain() -> None:
    delta, found = from_zero()
    for name in MATRICES:
        d, kept = delta[name].double(), found[name].double()
        scale, error = kept.abs().mean(), (d - kept).square().sum()
        for other in (0.99, 1.01):
            assert (d - other * kept).square().sum() > error
        assert float(error) == pytest.approx(float(d.square().sum() - d.numel() * scale**2), rel=1e-5)


def test_one_more_round_never_increases_the_error() -> None:
    errors = []
    for bits in range(1, 9):
        delta, found = from_zero(bits=bits)
        errors.append([float((delta[n] - found[n]).double().square().sum()) for n in MATRICES])
    assert all(after < before for pair in itertools.pairwise(errors) for before, after in zip(*pair, strict=True))
    assert all(last < first / 20 for first, last in zip(errors[0], errors[-1], strict=True))


def test_no_change_at_all_gives_the_base() -> None:
    base, _ = fine_tunes(1)
    for bits in (1, 3):
        assert all(torch.equal(value, base[name]) for name, value in bitdelta(base, base, bits=bits).items())


def test_a_change_of_nothing_counts_as_positive() -> None:
    base = {"blocks.0.mlp.weight": torch.zeros(2, 2)}
    tuned = {"blocks.0.mlp.weight": torch.tensor([[0.0, -0.0], [2.0, -2.0]])}
    assert bitdelta(base, tuned)["blocks.0.mlp.weight"].tolist() == [[1, 1], [1, -1]]


def test_what_is_impossible_is_said() -> None:
    assert [e.option for e in errors_in(BitDelta(models=("a", "b"), bits=9))] == ["bits", "models"]
    wrong = BitDelta(models=("a",), batch_size=0, learning_rate=2.0, vocabulary="common")
    assert [e.option for e in errors_in(wrong)] == ["batch_size", "learning_rate", "vocabulary"]
    assert not errors_in(BitDelta(models=("a",), steps=0, vocabulary="common"))
    assert BitDelta(models=("a",)).calibrated
    assert not BitDelta(models=("a",), steps=0).calibrated


# --- distilled scales -------------------------------------------------------------------------------------------------


@dataclass
class Wholes(Models):
    """Two models of two layers in memory."""

    values: list[dict[str, Tensor]]
    notes: dict[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] = ("blocks.0.weight", "last.weight")
    blocks: dict[str, int | None] = field(default_factory=lambda: {"blocks.0.weight": 0, "last.weight": None})
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def over(self, items: Any, total: int | None, label: object) -> Iterator[Any]:
        return iter(items)

    def value(self, model: int, name: str) -> Tensor:
        return self.values[model][name]

    @contextmanager
    def running(self) -> Iterator[Running]:
        x = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))

        def logits(make: Make, numbers: Tensor) -> Tensor:
            values = make(self.names)
            return torch.tanh(x[numbers] @ values["blocks.0.weight"].T) @ values["last.weight"].T

        yield Running(logits, len(x), TrainingStore(), self.names, torch.zeros(len(x)))


def wholes() -> Wholes:
    generator = torch.Generator().manual_seed(9)
    first, last, change = (torch.randn(shape, generator=generator) for shape in ((8, 6), (4, 8), (8, 6)))
    tuned = first + 0.2 * change**3  # signs alone do not tell much of it
    return Wholes([{"blocks.0.weight": first, "last.weight": last}, {"blocks.0.weight": tuned, "last.weight": -last}])  # type: ignore[abstract]


@pytest.mark.parametrize("bits", [1, 2])
def test_distilled_scales_predict_more_like_the_fine_tune(bits: int) -> None:
    models = wholes()
    before = {name: value.clone() for name, value in models.values[0].items()}
    pass_ = BitDelta(models=("m",), bits=bits, steps=60, batch_size=8, learning_rate=0.05)
    found = pass_.learn(models)
    assert list(found) == ["blocks.0.weight"]
    assert models.notes["loss"] < models.notes["loss_start"]
    delta = (models.values[1]["blocks.0.weight"] - before["blocks.0.weight"]).flatten()
    scales = found["blocks.0.weight"]
    assert torch.equal(scales.fitted, fit_sign_scales(lambda: [delta], delta.numel(), bits))
    assert not torch.equal(scales.used, scales.fitted)
    assert all(torch.equal(value, models.values[0][name]) for name, value in before.items())
    again = pass_.learn(wholes())["blocks.0.weight"]
    assert torch.equal(again.used, scales.used)


def test_what_was_distilled_is_what_is_merged() -> None:
    models = wholes()
    pass_ = BitDelta(models=("m",), bits=2, steps=5, batch_size=8)
    found = pass_.learn(models)
    name = "blocks.0.weight"
    base, tuned = (values[name].flatten() for values in models.values)
    piece = Piece(name, base, (tuned,), total=len(base), block=0, shape=(8, 6))
    made = pass_.run(piece, pass_.look(lambda: iter([piece]), found))
    used = found[name].used
    signs = signs_of(tuned - base, found[name].fitted)[0]
    assert torch.equal(made, base + (signs[0] * used[0] + signs[1] * used[1]))


def test_the_gradient_of_a_scale_is_that_of_finite_differences() -> None:
    models = wholes()
    pass_ = BitDelta(models=("m",), bits=2)
    delta = (models.values[1]["blocks.0.weight"] - models.values[0]["blocks.0.weight"]).flatten()
    distilled = Distilled(models, {"blocks.0.weight": fit_sign_scales(lambda: [delta], delta.numel(), pass_.bits)}, 0.1)
    factors, numbers = distilled.factors["blocks.0.weight"], torch.arange(32)
    with models.running() as running:
        distance(running, models, distilled.make, numbers).backward()
        for i in range(pass_.bits):
            values = []
            for step in (-1e-3, 1e-3):
                with torch.no_grad():
                    factors[i] += step
                    values.append(float(distance(running, models, distilled.make, numbers)))
                    factors[i] -= step
            assert float(factors.grad[i]) == pytest.approx((values[1] - values[0]) / 2e-3, rel=2e-2)


def test_no_change_at_all_is_learned_as_no_change() -> None:
    models = wholes()
    models.values[1] = models.values[0]
    found = BitDelta(models=("m",), steps=5, batch_size=8).learn(models)
    assert found["blocks.0.weight"].used.tolist() == [0]
