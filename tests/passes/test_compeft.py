"""The properties of ComPEFT: trim, keep signs, one scale."""

import pytest
import textbook
import torch
from textbook import fine_tunes
from torch import Tensor

from compress import Compeft
from compress.config.options import errors_in


def compeft(base: dict[str, Tensor], tuned: dict[str, Tensor], **options: object) -> dict[str, Tensor]:
    return textbook.merged(Compeft(models=("m",), **options), [base, tuned], piece=11)


def delta_of(base: dict[str, Tensor], tuned: dict[str, Tensor], **options: object) -> dict[str, Tensor]:
    """What is kept of a delta; from a base of zeros, so that nothing is lost in adding it."""
    zeros = {name: torch.zeros_like(value) for name, value in base.items()}
    return compeft(zeros, {name: tuned[name] - base[name] for name in base}, **options)


def published(tau: Tensor, density: float, alpha: float) -> Tensor:
    """The paper's three steps on a flat vector; the scale a bfloat16."""
    kept = tau.abs().argsort(descending=True, stable=True)[: max(1, int(density * len(tau)))]
    found = torch.zeros_like(tau)
    found[kept] = tau[kept].sign() * (alpha * tau.double().std(correction=0)).bfloat16().float()
    return found


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5])
def test_with_scope_model_and_std_it_is_as_published(density: float) -> None:
    base, tuned = fine_tunes(1)
    names = list(base)
    found = delta_of(base, tuned, density=density, alpha=2.0, scope="model", magnitude="std")
    tau = torch.cat([(tuned[name] - base[name]).flatten() for name in names])
    assert torch.equal(torch.cat([found[name].flatten() for name in names]), published(tau, density, 2.0))


def test_each_tensor_by_itself_has_its_own_share_and_scale() -> None:
    base, tuned = fine_tunes(1)
    tuned["last.weight"] = base["last.weight"] + 100 * (tuned["last.weight"] - base["last.weight"])
    for name, value in delta_of(base, tuned, density=0.2, magnitude="std", scope="tensor").items():
        assert torch.equal(value.flatten(), published((tuned[name] - base[name]).flatten(), 0.2, 1.0))


def test_the_mean_of_what_is_kept_is_the_scale_with_the_least_error() -> None:
    base, tuned = fine_tunes(1)

    def error(alpha: float) -> float:
        found = delta_of(base, tuned, density=0.3, alpha=alpha, magnitude="mean", scope="tensor")
        return sum(float((found[n].double() - (tuned[n] - base[n])).square().sum()) for n in base)

    least = error(1.0)
    assert all(error(alpha) > least for alpha in (0.9, 1.1, 2.0))
    std = delta_of(base, tuned, density=0.3, magnitude="std", scope="tensor")
    assert least < sum(float((std[n].double() - (tuned[n] - base[n])).square().sum()) for n in base)


def test_with_l2_what_is_kept_is_as_long_as_the_whole_delta_was() -> None:
    base, tuned = fine_tunes(1)
    delta = {name: tuned[name] - base[name] for name in base}
    for name, value in delta_of(base, tuned, density=0.2, scope="tensor").items():
        assert float(value.norm()) == pytest.approx(float(delta[name].norm()), rel=2**-8)
    whole = delta_of(base, tuned, density=0.2)
    found, meant = (sum(float(v.square().sum()) for v in values.values()) for values in (whole, delta))
    assert found == pytest.approx(meant, rel=2**-7)
    few = {"last.weight": torch.tensor([0.0, 1.0, 0.0, -7.0])}  # fewer changes than are kept
    zeros = {"last.weight": torch.zeros(4)}
    assert compeft(zeros, few, density=0.9)["last.weight"].tolist() == [0, 5, 0, -5]


@pytest.mark.parametrize("magnitude", ["l2", "mean", "std"])
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_a_delta_twice_as_large_is_kept_twice_as_large(scope: str, magnitude: str) -> None:
    base, tuned = fine_tunes(1)
    options = {"density": 0.2, "scope": scope, "magnitude": magnitude}
    once = delta_of(base, tuned, **options)
    for factor in (2.0, 0.25, -1.0):
        scaled = {name: factor * (tuned[name] - base[name]) for name in base}
        zeros = {name: torch.zeros_like(value) for name, value in base.items()}
        assert all(torch.equal(v, factor * once[n]) for n, v in compeft(zeros, scaled, **options).items())


def test_untrimmed_every_sign_is_kept() -> None:
    base, tuned = fine_tunes(1)
    for name, value in delta_of(base, tuned, density=1.0, scope="tensor").items():
        assert torch.equal(value.sign(), (tuned[name] - base[name]).sign())
        assert value.abs().unique().numel() == 1


def test_exactly_that_many_are_kept_also_where_magnitudes_are_equal() -> None:
    base = {"last.weight": torch.zeros(10, 10)}
    tuned = {"last.weight": torch.randint(1, 4, (10, 10)).float()}
    for count in (0, 1, 7, 50, 100):
        assert int(torch.count_nonzero(compeft(base, tuned, density=count / 100)["last.weight"])) == count


def test_an_empty_delta_and_a_density_of_zero_leave_the_base() -> None:
    base, tuned = fine_tunes(1)
    for found in (compeft(base, base), compeft(base, tuned, density=0.0), compeft(base, tuned, alpha=0.0)):
        assert all(torch.equal(value, base[name]) for name, value in found.items())


def test_what_is_impossible_is_said() -> None:
    wrong = [e.option for e in errors_in(Compeft(models=("a", "b"), density=1.5))]
    assert wrong == ["models", "density"]
    assert [e.option for e in errors_in(Compeft(models=("a",), scope="model", density=((0.1, 0.5),)))] == ["density"]
