"""Sparse model soups: what all copies share, the average has; and it is judged beside them."""

from itertools import pairwise

import pytest
import textbook
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import compress
from compress.config.options import errors_in
from compress.errors import ConfigError
from compress.passes import Eora, GlobalMagnitude, Magnitude, Perp, Rtn, SparseSoup
from compress.passes.base import Pass, Target
from compress.passes.prune.global_magnitude import smallest_cut
from compress.passes.retrain.sparse_soup import Member, greedy, member_mean

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = {"steps": 6, "rank": 2, "learning_rate": 2e-3}


@pytest.fixture
def tokens() -> Tensor:
    """(32, 32) tokens of which each says what comes next."""
    starts = torch.randint(24, (32, 1), generator=torch.Generator().manual_seed(1))
    return (starts + torch.arange(32)) % 24


def targets() -> dict[str, Target]:
    kept = textbook.mask(8, 16)
    return {"a": Target(textbook.weight(8, 16) * kept, kept, generator=torch.Generator().manual_seed(0))}


def test_the_average_of_equal_copies_is_the_copy_to_the_bit() -> None:
    w = {"a": textbook.weight(8, 16) / 3}
    assert torch.equal(member_mean([w, w, w])["a"], w["a"])


def test_the_average_is_the_mean() -> None:
    members = [{"a": textbook.weight(8, 16, seed)} for seed in range(3)]
    assert torch.allclose(member_mean(members)["a"], torch.stack([m["a"] for m in members]).mean(0), atol=1e-6)


def test_a_greedy_soup_leaves_out_what_makes_it_worse() -> None:
    members = [Member({"a": torch.tensor([x])}, abs(x)) for x in (0.5, -0.4, 9.0)]
    chosen = greedy(members, lambda values: float(values["a"].abs()))
    assert sorted(float(m.values["a"]) for m in chosen) == [pytest.approx(-0.4), pytest.approx(0.5)]


def test_a_greedy_soup_takes_what_makes_it_neither_better_nor_worse() -> None:
    members = [Member({"a": torch.tensor([x])}, 1.0) for x in (1.0, 1.0)]
    assert len(greedy(members, lambda values: 1.0)) == 2


def test_the_zeros_of_the_average_are_those_of_the_start() -> None:
    given = targets()
    edit = dict(SparseSoup(models=3, train=("full",), **QUICK).run(textbook.whole(given)))["a"]
    assert torch.equal(edit.mask, given["a"].mask)
    assert bool((edit.weight[~given["a"].mask] == 0).all())
    assert not torch.equal(edit.weight, given["a"].weight)


def test_copies_differ_by_their_seeds() -> None:
    one = dict(SparseSoup(models=1, train=("mask_lora",), **QUICK).run(textbook.whole(targets())))["a"].weight
    two = dict(SparseSoup(models=2, train=("mask_lora",), **QUICK).run(textbook.whole(targets())))["a"].weight
    assert not torch.allclose(one, two)


def test_one_copy_is_one_retraining(tiny_llama: LlamaForCausalLM, tokens: Tensor) -> None:
    soup = compress.apply(tiny_llama, [Magnitude(sparsity=0.6), SparseSoup(models=1, **QUICK)], tokens)
    alone = compress.apply(tiny_llama, [Magnitude(sparsity=0.6), Perp(**QUICK)], tokens)
    notes = [next(iter(r.report.layers.values())) for r in (soup, alone)]
    assert notes[0]["sparse_soup"]["loss"] == pytest.approx(notes[1]["perp"]["loss"], rel=0.2)
    assert notes[0]["sparse_soup"]["loss"] == pytest.approx(notes[0]["sparse_soup"]["loss_best_member"], rel=1e-5)


def test_phases_end_at_the_sparsity_asked_for_with_vectors_averaged(
    tiny_llama: LlamaForCausalLM, tokens: Tensor
) -> None:
    pass_ = SparseSoup(models=2, phases=2, sparsity=0.75, **QUICK)
    result = compress.apply(tiny_llama, [pass_], tokens)
    assert result.report.rows[-1].sparsity == pytest.approx(0.75, abs=1e-3)
    changed = [n for n, p in result.model.named_parameters() if p.dim() == 1 and bool((p != 1).any())]
    assert len(changed) == 5


def test_every_layer_keeps_its_minimum_in_every_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = textbook.weight(8, 16, 0) * 1e-3, textbook.weight(8, 16, 1)
    given = {"small": Target(small, None), "large": Target(large, None)}
    for min_keep, left in ((0.0, 0), (0.05, 12)):  # 5 % of all 256 weights
        seen: list[dict[str, int]] = []

        def watched(names, load, share, floor=0.0, seen=seen):  # type: ignore[no-untyped-def]
            masks = dict(smallest_cut(names, load, share, floor))
            seen.append({name: int(mask.sum()) for name, mask in masks.items()})
            return masks.items()

        monkeypatch.setattr("compress.passes.retrain.sparse_soup.smallest_cut", watched)
        soup = SparseSoup(models=1, train=("full",), sparsity=0.7, phases=2, min_keep=min_keep, **QUICK)
        edits = dict(soup.run(textbook.whole(given)))
        assert len(seen) == 2
        assert min(each["small"] for each in seen) == left
        assert sum(int(edit.mask.sum()) for edit in edits.values()) == 256 - int(0.7 * 256)
    shapes = dict.fromkeys(given, (8, 16))
    assert SparseSoup(sparsity=0.7, min_keep=0.1).check_shapes(shapes) is None
    said = SparseSoup(sparsity=0.95, min_keep=0.1).check_shapes(shapes)
    assert said is not None
    assert "cannot be reached with min_keep 0.1" in said.message


def test_the_learning_rates_of_copies_lie_around_the_one_given() -> None:
    rates: list[float] = []

    class Seen(SparseSoup):
        def trainables(self, *given: object) -> object:  # type: ignore[override]
            rates.append(self.learning_rate)
            return super().trainables(*given)  # type: ignore[arg-type]

    list(Seen(models=3, vary="learning_rate", steps=1, learning_rate=0.01).run(textbook.whole(targets())))
    assert rates == [0.005, 0.01, 0.02]


@pytest.mark.parametrize("before", [[Rtn(bits=4)], [Magnitude(), Eora(rank=1)]])
def test_what_is_packed_or_corrected_is_refused(
    tiny_llama: LlamaForCausalLM, tokens: Tensor, before: list[Pass]
) -> None:
    with pytest.raises(ConfigError, match="Put sparse_soup before"):
        compress.apply(tiny_llama, [*before, SparseSoup(**QUICK)], tokens)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"phases": 2}, "phases: each prunes a part"),
        ({"min_keep": 0.1}, "min_keep: is a floor under pruning"),
        ({"train": ("lora",)}, "lora cannot be averaged"),
        ({"models": 0}, "models: 0 is not a positive number"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, object], said: str) -> None:
    assert any(said in str(error) for error in errors_in(SparseSoup(**options)))


# --- gradual pruning --------------------------------------------------------------------------------------------------


def test_gradual_pruning_ends_at_the_same_sparsity_and_a_lower_loss(
    tiny_llama: LlamaForCausalLM, tokens: Tensor
) -> None:
    once = compress.apply(tiny_llama, [GlobalMagnitude(sparsity=0.8)], tokens, evaluation=tokens)
    options = {**QUICK, "steps": 10, "train": ("full", "norm")}
    more = compress.apply(tiny_llama, [GlobalMagnitude(sparsity=0.8, cuts=4, **options)], tokens, evaluation=tokens)
    assert more.report.rows[-1].sparsity == pytest.approx(once.report.rows[-1].sparsity, abs=1e-4)
    assert more.report.rows[-1].perplexity < once.report.rows[-1].perplexity


@pytest.mark.parametrize("regrow", [False, True])
def test_what_is_gone_comes_back_only_where_asked_for(regrow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.passes.prune import global_magnitude

    masks: list[Tensor] = []
    cut = global_magnitude.smallest_cut

    def seen(*given: object) -> object:
        for name, mask in cut(*given):  # type: ignore[arg-type]
            masks.append(mask)
            yield name, mask

    monkeypatch.setattr(global_magnitude, "smallest_cut", seen)
    given = {"a": Target(textbook.weight(16, 24), generator=torch.Generator())}
    pass_ = GlobalMagnitude(sparsity=0.7, cuts=5, regrow=regrow, train=("full",), steps=25, learning_rate=0.05)
    list(pass_.run(textbook.whole(given)))
    assert len(masks) == 5
    gone = [int((~m).sum()) for m in masks]
    assert gone == [int(16 * 24 * round(0.7 * (1 - (1 - t / 5) ** 3), 6)) for t in range(1, 6)]
    back = sum(int((later & ~earlier).sum()) for earlier, later in pairwise(masks))
    assert (back > 0) == regrow


def test_training_options_without_training_are_refused() -> None:
    assert [e.option for e in errors_in(GlobalMagnitude(steps=5))] == ["steps"]
    assert errors_in(GlobalMagnitude(steps=5, cuts=2)) == []
