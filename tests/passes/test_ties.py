"""The properties of TIES: trim, elect, merge."""

from collections.abc import Iterator

import pytest
import textbook
import torch
from textbook import fine_tunes
from torch import Tensor

from compress import Ties
from compress.config.options import errors_in
from compress.passes.merge.trimming import kth_largest, limits


def ties(models: list[dict[str, Tensor]], **options: object) -> dict[str, Tensor]:
    return textbook.merged(Ties(models=("m",) * (len(models) - 1), **options), models, piece=11)


def published(base: Tensor, tuned: list[Tensor], density: float, scale: float = 1.0, mean: bool = True) -> Tensor:
    """The paper's three steps, on flat vectors."""
    taus = torch.stack([t - base for t in tuned]).double()
    count = max(1, int(density * base.numel()))
    for tau in taus:
        tau[tau.abs().argsort(descending=True, stable=True)[count:]] = 0
    sign = taus.sum(0).sign()
    agree = (taus.sign() == sign) & (taus != 0)
    merged = (taus * agree).sum(0)
    if mean:
        merged /= agree.sum(0).clamp(min=1)
    return (base.double() + scale * merged).float()


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("combine", ["mean", "sum"])
def test_each_tensor_is_trimmed_elected_and_merged_as_published(density: float, combine: str) -> None:
    base, *tuned = fine_tunes(3)
    found = ties([base, *tuned], density=density, combine=combine, scale=0.7)
    for name, value in found.items():
        flat = [t[name].flatten() for t in tuned]
        expected = published(base[name].flatten(), flat, density, 0.7, combine == "mean")
        assert torch.allclose(value.flatten(), expected, atol=1e-6)


def test_with_scope_model_the_whole_vector_is_trimmed() -> None:
    base, *tuned = fine_tunes(2)
    for tune in tuned:
        tune["blocks.1.mlp.weight"] += 3  # its changes are the largest: they crowd out the others
    found = ties([base, *tuned], scope="model", density=0.15)
    names = list(base)
    flat = [torch.cat([m[name].flatten() for name in names]) for m in (base, *tuned)]
    expected = published(flat[0], flat[1:], 0.15)
    assert torch.allclose(torch.cat([found[name].flatten() for name in names]), expected, atol=1e-6)
    assert torch.equal(found["last.weight"], base["last.weight"])


def test_the_same_task_many_times_is_the_trimmed_task() -> None:
    base, tuned = fine_tunes(1)
    for count in (1, 3):
        for name, value in ties([base, *[tuned] * count], density=0.4).items():
            delta = (tuned[name] - base[name]).flatten()
            kept = delta.abs().argsort(descending=True)[: int(0.4 * len(delta))]
            expected = torch.zeros_like(delta)
            expected[kept] = delta[kept]
            assert torch.allclose(value.flatten() - base[name].flatten(), expected, atol=1e-6)


def test_a_task_and_its_opposite_are_even_and_leave_the_base() -> None:
    base, tuned = fine_tunes(1)
    base = {name: torch.zeros_like(value) for name, value in base.items()}
    opposite = {name: -value for name, value in tuned.items()}
    assert all(torch.equal(v, base[n]) for n, v in ties([base, tuned, opposite], density=1.0).items())
    positive = ties([base, tuned, opposite], density=1.0, tie="positive")
    assert all(torch.allclose(v, tuned[n].abs()) for n, v in positive.items())


def test_untrimmed_and_of_one_sign_it_is_the_mean() -> None:
    base = fine_tunes(1)[0]
    tuned = [{n: v + torch.rand_like(v) + 0.1 for n, v in base.items()} for _ in range(3)]
    for name, value in ties([base, *tuned], density=1.0).items():
        assert torch.allclose(value, torch.stack([t[name] for t in tuned]).mean(0), atol=1e-6)


def test_weights_count_in_the_election_and_in_the_mean() -> None:
    zeros = {"last.weight": torch.zeros(1)}
    up, down = {"last.weight": torch.tensor([1.0])}, {"last.weight": torch.tensor([-2.0])}
    assert ties([zeros, up, down], density=1.0)["last.weight"] == -2
    assert ties([zeros, up, down], density=1.0, weights=(3.0, 1.0))["last.weight"] == 1
    assert ties([zeros, up, up], density=1.0, weights=(3.0, 1.0), combine="sum")["last.weight"] == 4


def test_each_model_may_have_a_density_of_its_own_and_by_depth() -> None:
    base, a, b = fine_tunes(2)
    found = ties([base, a, b], density=(0.0, (0.0, 1.0)))
    assert torch.equal(found["blocks.0.mlp.weight"], base["blocks.0.mlp.weight"])
    assert torch.allclose(found["blocks.2.mlp.weight"], b["blocks.2.mlp.weight"], atol=1e-6)
    wrong = [e.option for e in errors_in(Ties(models=("a", "b"), scope="model", density=(0.5, (0.0, 1.0))))]
    assert wrong == ["density"]


# --- order statistics -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["normal", "few values", "one value", "sorted", "two scales", "zeros", "tiny"])
def test_the_kth_largest_is_exact_however_the_numbers_lie(kind: str) -> None:
    values = torch.randn(5000).abs()
    if kind == "few values":
        values = (values * 2).round()
    elif kind in ("one value", "zeros"):
        values = torch.full((5000,), float(kind == "one value"))
    elif kind == "sorted":
        values = values.sort().values
    elif kind == "two scales":
        values[::79] *= 1e6
    elif kind == "tiny":
        values *= 1e-41
    descending = values.sort(descending=True).values

    def parts() -> Iterator[list[Tensor]]:
        return iter([[part] for part in values.split(333)])

    for k in (1, 2, 63, 500, 2500, 4999, 5000):
        (found,) = kth_largest(parts, 5000, [k])
        assert found.value == descending[k - 1]
        assert found.above == int((values > found.value).sum())
        assert found.equal == int((values == found.value).sum())
        (limit,) = limits(parts, 5000, [k])
        kept = torch.cat([limit.trimmed(v, 333 * i) for i, v in enumerate(values.split(333))])
        chosen = values.argsort(descending=True, stable=True)[:k]
        expected = torch.zeros(5000).index_put((chosen,), values[chosen])
        assert torch.equal(kept, expected), "exactly k are kept; of equal ones the first"


def test_the_kth_largest_of_negative_numbers_is_exact_too() -> None:
    values = torch.cat([torch.randn(1000), torch.tensor([-torch.inf, 0.0, -3e38, 3e38, 1e-42, -1e-42])])
    descending = values.sort(descending=True).values
    for k in (1, 2, 300, 503, 504, 505, 800, 1005, 1006):
        (found,) = kth_largest(lambda: iter([[values]]), 1006, [k], signed=True)
        assert found.value == descending[k - 1]
        assert found.above == int((values > found.value).sum())
