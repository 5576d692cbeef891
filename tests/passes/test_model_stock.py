"""The properties of Model Stock: a point between the base and a mean, found from angles alone."""

import textbook
import torch
from textbook import fine_tunes
from torch import Tensor

from compress import ModelStock
from compress.config.options import errors_in
from compress.passes.merge.model_stock import stock_share


def stock(models: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return textbook.merged(ModelStock(models=("m",) * (len(models) - 1)), models, piece=7)


def test_fine_tunes_on_a_shell_meet_near_its_centre() -> None:
    """The paper's claim: next to the centre of what fine-tunes scatter around, nearer than their mean."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4000, generator=generator)
    centre = base + 0.05 * torch.randn(4000, generator=generator)
    tuned = [centre + 0.1 * torch.randn(4000, generator=generator) for _ in range(3)]
    found = stock([{"weight": value} for value in (base, *tuned)])["weight"]
    mean = torch.stack(tuned).mean(0)
    distances = [float((value - centre).norm()) for value in (found, mean, base)]
    assert distances[0] < 0.9 * min(distances[1:])


def test_the_share_of_the_mean_is_that_of_the_paper() -> None:
    for cosine in (0.0, 0.3, 1.0):
        assert stock_share(cosine, 2) == 2 * cosine / (1 + cosine)
        assert stock_share(cosine, 4) == 4 * cosine / (1 + 3 * cosine)
    assert stock_share(-1.0, 2) == 0.0, "opposite fine-tunes have no mean but the base"
    base, *tuned = fine_tunes(3)
    for name, value in stock([base, *tuned]).items():
        deltas = torch.stack([(t[name] - base[name]).flatten() for t in tuned]).double()
        unit = deltas / deltas.norm(dim=1, keepdim=True)
        cosine = float((unit @ unit.T)[[0, 0, 1], [1, 2, 2]].mean())
        share = stock_share(cosine, 3)
        expected = base[name].double() + share * deltas.mean(0).view(base[name].shape)
        torch.testing.assert_close(value.double(), expected, atol=1e-6, rtol=1e-5)


def test_the_same_fine_tune_twice_is_that_and_fine_tunes_that_changed_nothing_leave_the_base() -> None:
    base, tuned = fine_tunes(1)
    for name, value in stock([base, tuned, tuned]).items():
        torch.testing.assert_close(value, tuned[name])
    assert all(torch.equal(value, base[name]) for name, value in stock([base, base, base]).items())
    assert [e.option for e in errors_in(ModelStock(models=("one",)))] == ["models"]
