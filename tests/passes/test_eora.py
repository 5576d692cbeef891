"""EoRA: the best correction of its rank for the outputs, and everything it must not do to a weight."""

import copy
import math
from pathlib import Path

import pytest
import torch
from conftest import make_llama
from selection import only
from textbook import inputs, statistics
from textbook import weight as random_weight
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import compress
from compress.config.pipeline import Pipeline
from compress.encodings import LowRankFactors
from compress.errors import ConfigError
from compress.passes import Eora, FlexRound, Gptq, Magnitude, Override, Pass, Rtn, SparseGpt, Wanda
from compress.passes.base import Target
from compress.passes.compensate.ranks import by_budget, by_energy, too_little

ROWS, COLUMNS = 24, 40


def problem(seed: int = 0, masked: bool = False) -> tuple[Target, Tensor]:
    """What a 2-bit rounding lost, and the inputs."""
    original = random_weight(ROWS, COLUMNS, seed)
    x = inputs(COLUMNS, seed=seed)
    lost = original - Rtn(bits=2).nearest(original).dequantize()
    now = original - lost
    mask = torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed)) > 0.5 if masked else None
    return Target(now if mask is None else now * mask, mask, statistics(x), original=original), x


def correction(pass_: Eora, target: Target) -> LowRankFactors:
    found = pass_.run(target).low_rank
    assert found is not None
    return found


def output_error(target: Target, made: LowRankFactors | None, x: Tensor) -> float:
    """||(original - compressed - B A) X||."""
    assert target.original is not None
    lost = (target.original - target.weight).double()
    if made is not None:
        lost = lost - made.product().double()
    return float((x.double() @ lost.T).norm())


def best_error(target: Target, x: Tensor, rank: int) -> float:
    """The square root of the dropped squared singular values of what was lost, seen through the inputs."""
    assert target.original is not None
    seen = (target.original - target.weight).double() @ x.double().T
    return float(torch.linalg.svdvals(seen)[rank:].square().sum().sqrt())


@pytest.mark.parametrize("rank", [1, 4, 12])
@pytest.mark.parametrize("masked", [False, True])
def test_the_error_is_that_of_the_dropped_directions(rank: int, masked: bool) -> None:
    target, x = problem(masked=masked)
    found = output_error(target, correction(Eora(rank=rank, floor=1e-12), target), x)
    assert found == pytest.approx(best_error(target, x, rank), rel=1e-3)  # factors are stored in 16 bits


def test_with_factors_that_are_not_rounded_it_is_so_to_four_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.passes.solvers.whitening.stored_factor", lambda t: t)
    target, x = problem()
    for rank in (1, 4, 12):
        found = output_error(target, correction(Eora(rank=rank, floor=1e-12), target), x)
        assert found == pytest.approx(best_error(target, x, rank), rel=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_more_rank_is_never_worse_and_it_beats_what_it_is_compared_with(seed: int) -> None:
    target, x = problem(seed)
    errors = {
        (method, rank): output_error(target, correction(Eora(rank=rank, method=method), target), x)
        for method in ("eora", "activation", "svd")
        for rank in (1, 2, 4, 8, 16)
    }
    along = [output_error(target, None, x), *(errors["eora", rank] for rank in (1, 2, 4, 8, 16))]
    assert along == sorted(along, reverse=True)
    for rank in (1, 2, 4, 8, 16):
        assert errors["eora", rank] <= errors["activation", rank] * 1.001
        assert errors["eora", rank] <= errors["svd", rank] * 1.001


def test_the_notes_say_what_was_reached() -> None:
    target, x = problem()
    edit = Eora(rank=4, floor=1e-12).run(target)
    assert target.original is not None
    size = float((x.double() @ target.original.double().T).norm())
    assert edit.notes["output_error_start"] == pytest.approx(output_error(target, None, x) / size, rel=1e-4)
    assert edit.notes["output_error"] == pytest.approx(output_error(target, edit.low_rank, x) / size, rel=1e-3)


def test_full_rank_restores_the_original_and_nothing_lost_needs_nothing() -> None:
    target, _ = problem()
    assert target.original is not None
    full = target.weight + correction(Eora(rank=ROWS), target).product()
    torch.testing.assert_close(full, target.original, rtol=0, atol=5e-3)
    nothing = Target(target.original, None, target.statistics, original=target.original)
    assert float(correction(Eora(rank=4), nothing).product().abs().max()) < 1e-6


def test_larger_inputs_and_another_order_of_tokens_change_nothing() -> None:
    target, x = problem()
    same = correction(Eora(rank=4), target).product()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    for other in (x * 10, x[order]):
        moved = Target(target.weight, None, statistics(other), original=target.original)
        torch.testing.assert_close(correction(Eora(rank=4), moved).product(), same, rtol=0, atol=5e-3)


def test_inputs_that_never_vary_do_not_blow_up_the_factors() -> None:
    target, x = problem()
    x[:, :10] = 0
    x[:, 11] = x[:, 12]
    singular = Target(target.weight, None, statistics(x), original=target.original)
    made = correction(Eora(rank=4), singular)
    assert made.defect((ROWS, COLUMNS)) is None
    assert output_error(singular, made, x) < output_error(singular, None, x)


@pytest.mark.parametrize(("bits", "worse"), [(8, 1.02), (4, 1.35)])
def test_factors_in_codes_lose_little(bits: int, worse: float) -> None:
    target, x = problem()
    plain = output_error(target, correction(Eora(rank=6), target), x)
    made = correction(Eora(rank=6, adapter_bits=bits), target)
    assert made.form.bits == bits
    assert output_error(target, made, x) < worse * plain
    assert output_error(target, made, x) < output_error(target, None, x)


# --- ranks ------------------------------------------------------------------------------------------------------------


def test_energy_takes_the_smallest_rank_that_keeps_it() -> None:
    assert [by_energy([8, 4, 2, 2], share) for share in (0.1, 0.5, 0.75, 0.8, 1.0)] == [1, 1, 2, 3, 4]
    assert by_energy([0.0, 0.0], 0.5) == 1


def test_a_budget_goes_where_it_brings_most() -> None:
    energies = {"a": [10.0, 1.0], "b": [6.0, 5.0, 0.1], "dear": [20.0, 9.0]}
    costs = {"a": 1.0, "b": 1.0, "dear": 10.0}
    assert by_budget(energies, costs, 3) == {"a": 1, "b": 2, "dear": 0}
    assert by_budget(energies, costs, 14.5) == {"a": 2, "b": 2, "dear": 1}
    assert by_budget(energies, costs, 1000) == {"a": 2, "b": 3, "dear": 2}
    assert by_budget({"a": []}, {"a": 1.0}, 5) == {"a": 0}


def test_the_budget_is_kept_over_all_layers_and_is_all_but_spent(tokens: Tensor) -> None:
    result = compress.apply(make_llama(), [Rtn(bits=2), Eora(rank=None, budget=2.0)], calibration=tokens)
    assert 1.7 < extra_bits(result) <= 2.0
    ranks = {w.low_rank.rank if w.low_rank else 0 for w in result.weights.values()}
    assert len(ranks) > 1


def test_a_budget_that_pays_for_nothing_is_refused_with_the_smallest_that_pays_for_something(tokens: Tensor) -> None:
    # The cheapest of the 14 layers, k_proj, is 32 x 64: one rank takes 16 * 96 bits, and there are 73728 weights.
    said = (
        r"passes\[1\]\.eora\.budget: 0\.02 bits per weight .* rank 1 of model\.layers\.0\.self_attn\.k_proj, takes 1536"
    )
    with pytest.raises(ConfigError, match=rf"{said} bits.* The smallest budget that pays for one is 0\.0209$"):
        compress.apply(make_llama(), [Rtn(bits=2), Eora(rank=None, budget=0.02)], calibration=tokens)
    result = compress.apply(make_llama(), [Rtn(bits=2), Eora(rank=None, budget=0.0209)], calibration=tokens)
    assert [w.low_rank.rank for w in result.weights.values() if w.low_rank] == [1]


def test_what_a_rank_costs_counts_the_bits_that_an_override_gives_a_layer() -> None:
    eora = Eora(rank=None, budget=0.006, overrides=(Override("*.k_proj", {"adapter_bits": 4}),))
    shapes = {"layers.0.k_proj": (32, 64), "layers.0.up_proj": (128, 512)}
    assert eora.check_shapes(shapes) is None  # 4 * 96 bits for 67584 weights; 16 * 96 would be 0.023 bits per weight
    assert Eora(rank=None, budget=0.006).check_shapes(shapes) is not None
    decided = eora.allocated({name: {"energies": [1.0], "shape": shape} for name, shape in shapes.items()})
    assert decided.at("layers.0.k_proj").rank == 1
    assert not decided.selects("layers.0.up_proj", in_block=True)


@pytest.mark.parametrize("costs", [{"a": 96, "b": 960}, {"b": 7}, {"a": 123456}])
@pytest.mark.parametrize("weights", [1000, 73728, 10**9, 7])
def test_the_budget_that_is_proposed_is_enough_and_hardly_more(costs: dict[str, int], weights: int) -> None:
    said = too_little(costs, weights, 1e-12)
    assert said is not None
    enough = float(said.rpartition(" ")[2])
    assert too_little(costs, weights, enough) is None
    assert too_little(costs, weights, enough * 0.98) is not None


def extra_bits(result: compress.Result) -> float:
    sites = [w for w in result.weights.values() if w.encoding is not None]
    extra = sum(8 * sum(t.nbytes for t in w.low_rank.tensors().values()) for w in sites if w.low_rank)
    return extra / sum(w.encoding.codes.numel() for w in sites)  # type: ignore[union-attr]


# --- in a pipeline ----------------------------------------------------------------------------------------------------


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "before",
    only(
        [[Wanda(sparsity="2:4")], [Magnitude(), Rtn(bits=3)]],
        [[Rtn(bits=2)], [Wanda(sparsity="2:4")], [SparseGpt(sparsity=0.5), Gptq(bits=3)], [Magnitude(), Rtn(bits=3)]],
    ),
    ids=lambda passes: "+".join(p.key for p in passes),
)
def test_it_corrects_whatever_was_lost_and_the_written_model_computes_the_same(
    before: list[Pass], tokens: Tensor, tmp_path: Path
) -> None:
    make_llama().save_pretrained(tmp_path / "model")
    pipeline = Pipeline(passes=tuple((p,) for p in [*before, Eora(rank=4)]))
    report = compress.run(pipeline, tmp_path / "model", tmp_path / "out", calibration=tokens, evaluation=tokens)
    assert report.verified["max_logit_difference"] == 0
    *_, without, with_ = report.rows
    assert with_.kl < without.kl
    assert with_.sparsity == without.sparsity
    for notes in report.layers.values():
        assert notes["eora"]["output_error"] < notes["eora"]["output_error_start"]
    resident = compress.apply(make_llama(), [*before, Eora(rank=4)], calibration=tokens)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, made in resident.weights.items():
        assert torch.equal(loaded.get_submodule(name).dequantize(), made.dequantize()), name


def test_inputs_come_from_the_chain_that_is_already_corrected(tokens: Tensor) -> None:
    """With full rank every layer is the original again, so the last sees the original's inputs and loses nothing."""
    passes = [Rtn(bits=2), Eora(rank=None, energy=1.0)]
    result = compress.apply(make_llama(), passes, calibration=tokens, evaluation=tokens)
    assert result.report.rows[-1].kl == pytest.approx(0, abs=1e-4)


def test_quantized_inputs_stay_on_their_grid(tokens: Tensor) -> None:
    passes = [Rtn(bits=4, activation_bits=8), Eora(rank=2)]
    result = compress.apply(make_llama(), passes, calibration=tokens)
    assert all(w.inputs is not None and w.low_rank is not None for w in result.weights.values())


def test_a_layer_that_nothing_reaches_is_corrected_without_its_inputs() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.used, self.spare = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    x = torch.randn(32, 16)
    for eora in (Eora(rank=2), Eora(rank=None, budget=1.0)):
        result = compress.apply(Spare(), [Rtn(bits=2), eora], calibration=x)
        assert result.weights["used"].low_rank is not None
        fallen = [note for note in result.report.fallbacks if note.startswith("spare")]
        assert (fallen == []) == (eora.budget is not None)


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("passes", "said"),
    [
        ([Eora(rank=2)], "nothing was lost there. Put eora after"),
        ([Rtn(bits=2), Eora(rank=2), Eora(rank=2)], "they have a correction. Raise its rank instead"),
        ([Wanda(), Eora(rank=2), Gptq(bits=4)], "Put gptq before eora"),
        ([Wanda(), Eora(rank=2), FlexRound(bits=4)], "Put flexround before eora"),
        ([Rtn(bits=2), Eora(rank=1000)], "rank 1000 is more than"),
        ([Rtn(bits=2), Eora(rank=4, energy=0.5)], "set one of rank, energy, budget"),
        ([Rtn(bits=2), Eora(rank=None)], "set one of rank, energy, budget"),
        ([Rtn(bits=2), Eora(rank=0)], "0 is not a positive number"),
        ([Rtn(bits=2), Eora(rank=4, adapter_bits=3)], "3 is not 4 or 8"),
        ([Rtn(bits=2), Eora(rank=4, floor=0.0)], "0.0 is not between 0 and 1"),
        ([Rtn(bits=2), Eora(rank=None, budget=-1.0)], "is not positive"),
        ([[Rtn(bits=2), Eora(rank=None, budget=1.0)]], "must be the first of `blockwise:`"),
        ([Rtn(bits=2), Eora(rank=None, budget=1.0, overrides=(Override("*", {"budget": 2.0}),))], "spent over all"),
    ],
)
def test_impossible_orders_and_options(passes: list[Pass], said: str, tokens: Tensor) -> None:
    with pytest.raises(ConfigError, match=said):
        compress.apply(copy.deepcopy(make_llama()), passes, calibration=tokens)


def test_svd_needs_no_data() -> None:
    result = compress.apply(nn.Sequential(nn.Linear(16, 16)), [Rtn(bits=2), Eora(rank=2, method="svd")])
    assert result.weights["0"].low_rank is not None
    assert math.isfinite(result.report.layers["0"]["eora"]["output_error"])
