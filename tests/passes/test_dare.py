"""The properties of dropping and rescaling."""

import pytest
import textbook
import torch
from textbook import fine_tunes
from torch import Tensor

from compress import Dare


def dare(models: list[dict[str, Tensor]], seed: int = 0, **options: object) -> dict[str, Tensor]:
    return textbook.merged(Dare(models=("m",) * (len(models) - 1), **options), models, seed=seed)


def test_on_average_over_seeds_it_is_the_task_vector_and_varies_as_it_should() -> None:
    base, tuned = fine_tunes(1)
    runs = [dare([base, tuned], seed, density=0.5) for seed in range(400)]
    for name in base:
        delta = tuned[name] - base[name]
        found = torch.stack([run[name] - base[name] for run in runs])
        error = delta.abs() / 20  # one standard deviation of the mean of 400
        assert ((found.mean(0) - delta).abs() <= 5 * error + 1e-6).all()
        assert float((found.var(0) / delta.square()).mean()) == pytest.approx(1.0, rel=0.05)  # p / (1 - p)


@pytest.mark.parametrize("rescale", ["unbiased", "l1", "none"])
@pytest.mark.parametrize("merge", ["linear", "ties"])
def test_nothing_dropped_is_the_fine_tune_and_everything_dropped_the_base(rescale: str, merge: str) -> None:
    base, tuned = fine_tunes(1)
    whole = dare([base, tuned], density=1.0, rescale=rescale, merge=merge)
    assert all(torch.allclose(value, tuned[name], atol=1e-6) for name, value in whole.items())
    nothing = dare([base, tuned], density=0.0, rescale=rescale, merge=merge)
    assert all(torch.equal(value, base[name]) for name, value in nothing.items())


def test_what_is_left_is_divided_by_the_density() -> None:
    base, tuned = fine_tunes(1)
    for name, value in dare([base, tuned], density=0.25).items():
        delta, found = (tuned[name] - base[name]).flatten(), (value - base[name]).flatten()
        left = found != 0
        assert 0 < int(left.sum()) < 0.6 * len(delta)
        assert torch.allclose(found[left], 4 * delta[left], atol=1e-5)


def test_l1_keeps_the_sum_of_magnitudes_of_every_tensor() -> None:
    base, tuned = fine_tunes(1)
    for name, value in dare([base, tuned], density=0.3, rescale="l1").items():
        delta, found = tuned[name] - base[name], value - base[name]
        assert float(found.abs().sum()) == pytest.approx(float(delta.abs().sum()), rel=1e-4)
        assert (found == 0).any()


def test_models_are_dropped_from_independently_and_the_same_seed_drops_the_same() -> None:
    base, tuned = fine_tunes(1)
    both = dare([base, tuned, tuned], density=0.5, rescale="none")
    name = "blocks.0.mlp.weight"
    counts = ((both[name] - base[name]) / (tuned[name] - base[name])).round()
    assert counts.unique().tolist() == [0, 1, 2]
    assert torch.equal(both[name], dare([base, tuned, tuned], density=0.5, rescale="none")[name])
    assert not torch.equal(both[name], dare([base, tuned, tuned], seed=1, density=0.5, rescale="none")[name])


def test_with_ties_those_of_the_elected_sign_are_summed_or_averaged() -> None:
    base, a, b = fine_tunes(2)
    options = {"density": 0.5, "rescale": "none"}
    alone = [dare([base, m], density=0.5, rescale="none") for m in (a, b)]
    found = dare([base, a, b], merge="ties", **options)
    name = "blocks.1.mlp.weight"
    first = alone[0][name] - base[name]  # the first model is dropped from alike with and without the second
    total = found[name] - base[name]
    assert ((first == 0) | (total != 0)).float().mean() > 0.95
    assert ((first * total >= 0) | (first.abs() < 1)).all()
