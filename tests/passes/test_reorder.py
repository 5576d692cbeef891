"""Neurons of like distribution side by side, and tables that runs of them share."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from selection import only
from textbook import target, weight
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import compress
from compress.config.pipeline import Pipeline
from compress.encodings import Codebooks, Weight, pack, spec_of, unpack
from compress.errors import ConfigError
from compress.models.symmetry import Axis
from compress.passes import Codebook, Gptq, Jlcm, Magnitude, Override, Reorder, Rtn
from compress.passes.base import Whole
from compress.passes.quantize.grouping import even_runs, run_tables
from compress.passes.quantize.reorder import sorted_by_group

NEURONS = ("*.gate_proj", "*.up_proj", "*.down_proj")
RUNS = tuple(Override(p, {"grouping": "runs"}) for p in ("*.gate_proj", "*.up_proj", "*.v_proj"))


@pytest.fixture
def llama() -> LlamaForCausalLM:
    """Neurons of four scales, scattered."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for block in model.model.layers:
            scale = 2.0 ** torch.randint(0, 4, (64, 1))
            block.mlp.up_proj.weight *= scale
            block.mlp.gate_proj.weight *= scale
    return model


def tokens(rows: int = 8) -> Tensor:
    return torch.randint(0, 64, (rows, 16), generator=torch.Generator().manual_seed(0))


def test_the_model_computes_what_it_did(llama: LlamaForCausalLM) -> None:
    before = llama(tokens()).logits
    result = compress.apply(copy.deepcopy(llama), [Reorder(groups=4)], evaluation=tokens())
    torch.testing.assert_close(result.model(tokens()).logits, before, rtol=1e-4, atol=1e-5)
    last = result.report.rows[-1]
    assert last.kl == pytest.approx(0, abs=1e-6)
    assert last.bytes == result.report.rows[0].bytes
    assert {name.rpartition(".")[2] for name in result.weights} == {
        "gate_proj",
        "up_proj",
        "down_proj",
        "v_proj",
        "o_proj",
    }


def test_neurons_of_one_scale_stand_together_from_narrow_to_wide() -> None:
    scale = 1.0 + 3 * torch.randint(0, 4, (64, 1), generator=torch.Generator().manual_seed(0))
    makers = [weight(64, 256) * scale, weight(64, 256, seed=1) * scale * 100]
    order = sorted_by_group(makers, Axis(("gate", "up"), ("down",), size=64), 4)
    assert torch.equal(scale[order[0], 0], scale[:, 0].sort().values)


def test_an_order_is_a_permutation_within_every_head() -> None:
    axis = Axis(("v",), ("o",), size=8, heads=3)
    order = sorted_by_group([weight(24, 40), weight(24, 40, seed=1)], axis, 4)
    assert torch.equal(order.sort(1).values, torch.arange(8).expand(3, 8))
    assert torch.equal(axis.rows(order).sort().values, torch.arange(24))


def test_without_free_channels_a_weight_stays_as_it_is() -> None:
    w = weight(8, 16)
    ((_, edit),) = Reorder().run(Whole(("a",), lambda _: target(w)))
    assert edit.weight is not None
    assert torch.equal(edit.weight, w)


@pytest.mark.parametrize(
    "method",
    only([Codebook(bits=2, overrides=RUNS)], [Codebook(bits=2, overrides=RUNS), Jlcm(bits=2, steps=5, overrides=RUNS)]),
)
def test_runs_of_sorted_rows_share_tables_and_the_written_model_computes_the_same(
    method: Codebook | Jlcm, llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    llama.save_pretrained(tmp_path / "model")
    pipeline = Pipeline(passes=((Reorder(groups=4),), (method,)))
    report = compress.run(pipeline, tmp_path / "model", tmp_path / "out", calibration=tokens(), evaluation=tokens())
    assert report.verified["max_logit_difference"] == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    up = loaded.model.layers[0].mlp.up_proj
    assert up.spec.form.period == 64
    assert up.run_ends.tolist()[-1] == 64
    assert loaded.model.layers[0].self_attn.v_proj.spec.form.period == 8
    notes = report.layers["model.layers.0.mlp.up_proj"]
    assert notes["reorder"]["error"] == 0
    if isinstance(method, Jlcm):  # learned against the original in its new order
        assert notes["jlcm"]["block_error"] <= notes["jlcm"]["block_error_start"] < 1


def test_learning_after_reordering_compares_with_the_model_in_its_new_order(llama: LlamaForCausalLM) -> None:
    """The rounding of eight bits is all that may differ, not the order."""
    passes = [Reorder(groups=4), compress.FlexRound(bits=8, steps=2)]
    result = compress.apply(copy.deepcopy(llama), passes, calibration=tokens())
    assert all(notes["flexround"]["block_error"] < 1e-3 for notes in result.report.layers.values())


# --- runs -------------------------------------------------------------------------------------------------------------


def best_by_trying(losses: Tensor, period: int) -> float:
    """Over every way to cut a period into runs."""
    at_place = losses.view(-1, period, losses.shape[1]).sum(0)
    best = at_place[:, 0].cumsum(0)
    for g in range(1, losses.shape[1]):
        options = torch.full((period, period + 1), torch.inf, dtype=losses.dtype)
        for end in range(period):
            for begin in range(end + 2):
                before = best[begin - 1] if begin else torch.zeros((), dtype=losses.dtype)
                options[end, begin] = before + at_place[begin : end + 1, g].sum()
        best = torch.minimum(best, options.amin(1))
    return float(best[-1])


@pytest.mark.parametrize(("rows", "period"), [(12, 12), (12, 4)])
@pytest.mark.parametrize("seed", range(4))
def test_runs_are_the_best_there_are(rows: int, period: int, seed: int) -> None:
    losses = torch.rand(rows, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    label = run_tables(losses, period)
    assert bool((label[:period].diff() >= 0).all())
    assert torch.equal(label, label[:period].repeat(rows // period))
    assert float(losses.gather(1, label[:, None]).sum()) == pytest.approx(best_by_trying(losses, period))


def test_even_runs_use_every_table_in_every_period() -> None:
    label = even_runs(12, 6, 3)
    assert label.tolist() == [0, 0, 1, 1, 2, 2] * 2


def test_runs_survive_packing_and_take_less_room() -> None:
    w = weight(96, 32) * torch.linspace(0.1, 3, 96)[:, None]
    free = Codebook(bits=2, tables=6, weighting="none")
    runs = replace(free, grouping="runs").run(target(w)).encoding
    assert isinstance(runs, Codebooks)
    assert runs.period == 96
    spec, tensors = pack(Weight(encoding=runs))
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == spec.tensors()
    again = unpack(type(spec).from_json(spec.to_json()), tensors)
    assert torch.equal(again.dequantize(), runs.dequantize())
    assert spec.num_bytes < spec_of(Weight(encoding=free.run(target(w)).encoding)).num_bytes


def test_codes_that_are_not_in_runs_are_a_defect() -> None:
    codes, table = torch.zeros(4, 8, dtype=torch.uint8), torch.tensor([[0.0, 1.0], [0.0, 2.0]])
    for label in ([1, 0, 0, 1], [0, 1, 1, 1]):
        broken = Codebooks(codes, table, torch.tensor(label, dtype=torch.uint8), period=2)
        assert "runs" in str(broken.defect())
    assert Codebooks(codes, table, torch.tensor([0, 1, 0, 1], dtype=torch.uint8), period=2).defect() is None


# --- refused ----------------------------------------------------------------------------------------------------------


def test_layers_that_share_neurons_go_together(llama: LlamaForCausalLM) -> None:
    with pytest.raises(ConfigError, match=r"share their channels with .*down_proj"):
        compress.apply(llama, [Reorder(include=("*.up_proj", "*.gate_proj"))])


def test_it_comes_first(llama: LlamaForCausalLM) -> None:
    with pytest.raises(ConfigError, match="put reorder before every other pass"):
        compress.apply(llama, [Magnitude(sparsity=0.5, include=("*.up_proj",)), Reorder()])
    with pytest.raises(ConfigError, match="reorder"):
        compress.apply(llama, [Rtn(), Reorder()])


def test_a_model_without_free_orders_is_refused() -> None:
    with pytest.raises(ConfigError, match="whose order is free"):
        compress.apply(torch.nn.Sequential(torch.nn.Linear(8, 8)), [Reorder()])


@pytest.mark.parametrize("options", [{"groups": 1}, {"groups": 257}, {"overrides": (Override("*", {"groups": 3}),)}])
def test_impossible_options(options: dict[str, object], llama: LlamaForCausalLM) -> None:
    with pytest.raises(ConfigError, match="reorder"):
        compress.apply(llama, [Reorder(**options)])


def test_gptq_after_it_gives_the_same_quality(llama: LlamaForCausalLM) -> None:
    plain = compress.apply(copy.deepcopy(llama), [Gptq(bits=8)], calibration=tokens(), evaluation=tokens())
    sorted_ = compress.apply(copy.deepcopy(llama), [Reorder(), Gptq(bits=8)], calibration=tokens(), evaluation=tokens())
    assert sorted_.report.rows[-1].perplexity == pytest.approx(plain.report.rows[-1].perplexity, rel=1e-3)
