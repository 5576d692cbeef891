"""The properties of balancing the competition of parameters."""

import pytest
import textbook
import torch
from textbook import fine_tunes
from torch import Tensor

from compress import Pcb
from compress.passes.merge.base import Piece
from compress.passes.merge.pcb import measured_bounds, scores


def pcb(models: list[dict[str, Tensor]], **options: object) -> dict[str, Tensor]:
    return textbook.merged(Pcb(models=("m",) * (len(models) - 1), **options), models, piece=13)


def flat(model: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in model.values()])


def published(taus: Tensor, density: float, clip: float) -> Tensor:
    """The last of the authors' forms on whole vectors (K, N), float64."""
    taus = taus.double()
    count, total = taus.shape
    low, high = (taus.abs().sort(dim=1).values[:, int(q * (total - 1))][:, None] for q in (clip, 1 - clip))
    magnitudes = taus.abs().clamp(low, high)
    u = (magnitudes - low) / (high - low)
    v = taus.sign() * u
    balance = torch.exp(count * u**2) * torch.stack([torch.tanh(v[i] * v).sum(0) for i in range(count)])
    kept = max(1, int(density * total))
    cut = balance.sort(dim=1, descending=True).values[:, min(kept, total - 1)][:, None]
    share = ((balance - cut) / (balance.max(1, keepdim=True).values - cut)).clamp(min=0)
    return (share * taus.sign() * magnitudes).sum(0) / share.sum(0).clamp(min=1e-12)


@pytest.mark.parametrize("density", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("clip", [0.0, 0.01, 0.1])
def test_the_whole_vector_is_scored_as_in_the_authors_code(density: float, clip: float) -> None:
    models = fine_tunes(3)
    found = flat(pcb(models, density=density, clip=clip, scale=1.2)) - flat(models[0])
    taus = torch.stack([flat(m) - flat(models[0]) for m in models[1:]])
    assert torch.allclose(found.double(), 1.2 * published(taus, density, clip), atol=2e-5)


def test_with_scope_tensor_every_tensor_is_scored_by_itself() -> None:
    models = fine_tunes(2)
    found = pcb(models, density=0.3, scope="tensor")
    for name, value in found.items():
        taus = torch.stack([(m[name] - models[0][name]).flatten() for m in models[1:]])
        expected = published(taus, 0.3, 0.01)
        assert torch.allclose((value - models[0][name]).flatten().double(), expected, atol=2e-5)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_copies_of_one_task_are_its_clipped_vector_on_the_top_share_for_any_number(count: int) -> None:
    base, tuned = fine_tunes(1)
    found = flat(pcb([base, *[tuned] * count], density=0.2)) - flat(base)
    tau = flat(tuned) - flat(base)
    kept = tau.abs().argsort(descending=True)[: int(0.2 * len(tau))]
    low, high = (tau.abs().sort().values[int(q * (len(tau) - 1))] for q in (0.01, 0.99))
    expected = torch.zeros_like(tau)
    expected[kept] = (tau.sign() * tau.abs().clamp(low, high))[kept]
    agrees = torch.isclose(found, expected, atol=1e-5)
    assert int((~agrees).sum()) <= 3, "but for those clipped to one value at the cut"


def test_exactly_the_share_survives_and_the_best_score_counts_in_full() -> None:
    models = [flat(m) for m in fine_tunes(3)]
    piece = Piece("all", models[0], tuple(models[1:]), total=len(models[0]))
    facts = measured_bounds(lambda: iter([piece]), len(models[0]), [0.25] * 3, clip=0.0)
    for score, m in zip(scores(list(piece.deltas()), facts), facts, strict=True):
        share = ((score - m.cut) / (m.top - m.cut)).clamp(min=0)
        assert int((share > 0).sum()) == int(0.25 * len(models[0]))
        assert share.max() == 1


def test_the_order_of_the_tasks_does_not_matter() -> None:
    base, *tuned = fine_tunes(3)
    first, second = pcb([base, *tuned]), pcb([base, *tuned[::-1]])
    assert all(torch.allclose(first[name], second[name], atol=1e-5) for name in first)


def test_a_task_that_stands_against_the_others_is_dropped_there_and_the_others_count_in_full() -> None:
    base = {"last.weight": torch.zeros(10)}
    both = {"last.weight": torch.tensor([5.0, 1, 1, 1, 1, 1, 1, 1, 1, 0])}
    other = {"last.weight": torch.tensor([-5.0, 1, 1, 1, 1, 1, 1, 1, 1, 0])}
    found = pcb([base, both, both, other], density=0.1, clip=0.0, scope="tensor")["last.weight"]
    assert found[0] == 5


def test_tasks_that_change_nothing_or_everything_alike_are_no_harm() -> None:
    base, tuned = fine_tunes(1)
    still = pcb([base, base, base])
    assert all(torch.equal(value, base[name]) for name, value in still.items())
    shifted = {name: value + 0.5 for name, value in base.items()}
    assert all(torch.isfinite(value).all() for value in pcb([base, shifted, tuned]).values())
