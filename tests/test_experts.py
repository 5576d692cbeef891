"""Mixtures of experts: each expert of a fused parameter is a matrix like any other, to every pass."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_models import COMMON, KINDS, TOKENS, experts_of, logits, make_mixture, unfused
from selection import only
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import compress
from compress import ConfigError, Eora, FlexRound, Gptq, Magnitude, Override, Rtn, SparseGpt, Wanda
from compress.calibration import collect
from compress.checkpoint.artifact import Artifact
from compress.checkpoint.opening import open_model
from compress.checkpoint.sources import ModuleSource
from compress.encodings import Weight
from compress.engine.sweep import fused_parameters, parts_of
from compress.models.experts import running_one_by_one
from compress.models.graph import Graph, find
from compress.models.site import parameter_of
from compress.passes import LinearPass, Pass
from compress.passes.targets import works_on

pytestmark = pytest.mark.usefixtures("one_thread")

FUSED = ("Mixtral", "Qwen2Moe", "DeepseekV3", "Phimoe")  # that multiply by the transpose, as linear layers do
W4 = {"bits": 4, "group_size": 16}


def seen_by(model: nn.Module, graph: Graph, batches: list[Tensor], **options: Any) -> dict[str, Any]:
    """Statistics of everything in the first block that has any."""
    sites = graph.in_block(len(graph.blocks) - 1)
    modules = {s.name: model.get_submodule(s.name) for s in sites if not s.is_expert}
    experts = fused_parameters(model, [s for s in sites if s.is_expert])
    with torch.no_grad(), running_one_by_one(model):
        forwards = (lambda batch=batch: model(input_ids=batch) for batch in batches)
        return collect.statistics(modules, {s.name: "gram" for s in sites}, forwards, experts=experts, **options)


# --- what is found ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_matrix_of_a_block_is_reached_but_the_routers(kind: str) -> None:
    model = make_mixture(kind)
    graph = find(model)
    reached = {s.parameter for s in graph.sites if not s.router}
    left = {
        name
        for block in graph.blocks
        for name, p in model.get_submodule(block).named_parameters(prefix=block)
        if p.dim() > 1 and name not in reached
    }
    words = ("router", "gate.", "expert_gate", "_bias", "conv")
    assert all(any(word in name for word in words) for name in left), left
    assert any(s.is_expert for s in graph.sites)


@pytest.mark.parametrize("kind", KINDS)
def test_every_expert_is_read_and_put_together_again(kind: str) -> None:
    model = make_mixture(kind)
    artifact = Artifact(find(model), ModuleSource(model))
    for parameter in {s.parameter for s in artifact.graph.sites if s.is_expert}:
        sites, value = artifact.sites_of(parameter), model.get_parameter(parameter)
        matrices = [artifact.original(site) for site in sites]
        for site, matrix in zip(sites, matrices, strict=True):
            assert tuple(matrix.shape) == site.shape
            assert torch.equal(matrix, site.matrix(value))
        assert torch.equal(parameter_of(sites, matrices), value)
        assert torch.equal(parameter_of(sites, matrices, torch.bfloat16), value.bfloat16())


def test_a_router_is_worked_on_only_where_a_pattern_names_it() -> None:
    router = next(s for s in find(make_mixture("Phimoe")).sites if s.router)
    other = next(s for s in find(make_mixture("Qwen2Moe")).sites if s.router)
    assert other.name.endswith("shared_expert_gate")
    for include, router_too, other_too in (
        ((), False, False),
        (("*",), False, False),
        (("*.mlp.*",), False, False),
        (("*.router",), True, False),
        (("*shared_expert_gate",), False, True),
        ((router.name, other.name), True, True),
    ):
        assert works_on(Rtn(include=include), router) is router_too, include
        assert works_on(Rtn(include=include), other) is other_too, include
    assert not works_on(Rtn(include=("*.router",), exclude=("*",)), router)


# --- what their inputs are --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", COMMON)
def test_statistics_of_experts_are_those_of_linear_layers_in_their_place(kind: str) -> None:
    model = make_mixture(kind)
    replica, batches = unfused(model), [TOKENS[:1], TOKENS[1:5], TOKENS[5:]]
    ours, theirs = seen_by(model, find(model), batches), seen_by(replica, find(replica), batches)
    assert ours.keys() == theirs.keys()
    assert any("experts" in name for name in ours)
    for name, found in ours.items():
        assert found.tokens == theirs[name].tokens, name
        torch.testing.assert_close(found.gram, theirs[name].gram, rtol=1e-4, atol=1e-4)
    graph = find(model)
    chosen = sum(ours[s.name].tokens for s in graph.sites if s.is_expert and "down" in s.name and s.name in ours)
    assert chosen == TOKENS.numel() * 2, "each token is sent to two experts"


def test_experts_of_llama_4_count_the_tokens_that_are_theirs_alone() -> None:
    model = make_mixture("Llama4")
    seen = seen_by(model, find(model), [TOKENS])
    experts = [found for name, found in seen.items() if "gate_up_proj" in name and ".experts." in name]
    assert len(experts) > 1
    assert sum(found.tokens for found in experts) == TOKENS.numel()
    assert max(found.tokens for found in experts) < TOKENS.numel()


def test_an_expert_that_is_sent_nothing_has_no_statistics_and_one_that_is_later_has() -> None:
    model = make_mixture("Mixtral")
    graph = find(model)
    one = seen_by(model, graph, [TOKENS[:1, :2]])
    later = seen_by(model, graph, [TOKENS[:1, :2], TOKENS])
    experts = {s.name for s in graph.in_block(1) if s.is_expert}
    assert experts - one.keys(), "two tokens reach every expert"
    assert experts <= later.keys()
    assert all(found.tokens == 2 for name, found in one.items() if name not in experts)
    assert all(found.tokens == 2 + TOKENS.numel() for name, found in later.items() if name not in experts)


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss", "DeepseekV3"])
def test_all_experts_may_be_shown_all_tokens_and_the_model_computes_what_it_did(kind: str) -> None:
    model = make_mixture(kind)
    graph = find(model)
    seen, usual = (seen_by(model, graph, [TOKENS], all_experts=every) for every in (True, False))
    for site in graph.in_block(1):
        if site.is_expert:
            assert seen[site.name].tokens == TOKENS.numel(), site.name
        else:
            assert torch.equal(seen[site.name].gram, usual[site.name].gram), site.name
    first = [seen[s.name].gram for s in graph.in_block(1) if s.is_expert and "gate_up" in s.name]
    assert all(torch.equal(gram, first[0]) for gram in first), "all are shown the same"


# --- what passes make of them -----------------------------------------------------------------------------------------

PASSES: dict[str, list[Any]] = {
    "rtn": [Rtn(**W4)],
    "gptq": [Gptq(**W4)],
    "wanda": [Wanda(sparsity=0.5)],
    "sparsegpt": [SparseGpt(sparsity="2:4")],
    "wanda+gptq": [[Wanda(sparsity=0.5), Gptq(**W4)]],
    "eora": [Rtn(bits=3, group_size=16), Eora(rank=2)],
}


@pytest.mark.parametrize("passes", only(["sparsegpt", "wanda+gptq", "eora"], PASSES))
@pytest.mark.parametrize("kind", only(FUSED[:1], FUSED))
def test_a_pass_makes_of_an_expert_what_it_makes_of_the_same_linear_layer(kind: str, passes: str) -> None:
    model = make_mixture(kind)
    graph = find(model)
    skipped = tuple(s.name for s in graph.sites if s.router)  # a replica's experts are not beside its router
    steps = [[excluding(p, skipped) for p in (s if isinstance(s, list) else [s])] for s in PASSES[passes]]
    ours = compress.apply(model, steps, calibration=TOKENS, min_expert_tokens=1)
    theirs = compress.apply(unfused(model), steps, calibration=TOKENS)
    assert ours.weights.keys() == theirs.weights.keys()
    for name, weight in ours.weights.items():
        assert torch.equal(weight.dequantize(), theirs.weights[name].dequantize()), name
    with running_one_by_one(ours.model):
        assert torch.equal(logits(ours.model), logits(theirs.model))


def excluding(pass_: Pass, names: tuple[str, ...]) -> Pass:
    return replace(pass_, exclude=names) if names else pass_


def test_gptq_of_an_expert_is_that_of_its_matrix_on_the_tokens_that_it_was_sent() -> None:
    model = make_mixture("Mixtral")
    exact: dict[str, Any] = {"products": "float32"}
    result = compress.apply(model, [Gptq(**W4)], calibration=TOKENS, **exact)
    replica, name = unfused(model), "model.layers.0.mlp.experts.gate_up_proj.2"
    seen: list[Tensor] = []
    handle = replica.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits(replica)
    handle.remove()
    alone = nn.Sequential(copy.deepcopy(replica.get_submodule(name)))
    same = compress.apply(alone, [Gptq(**W4)], calibration=torch.cat(seen), **exact)
    assert torch.equal(result.weights[name].dequantize(), same.weights["0"].dequantize())
    rounded = compress.apply(alone, [Rtn(**W4)])
    assert not torch.equal(result.weights[name].dequantize(), rounded.weights["0"].dequantize())


FEW: list[tuple[LinearPass, LinearPass]] = [
    (Gptq(**W4), Rtn(**W4)),
    (Wanda(sparsity=0.5), Magnitude(sparsity=0.5)),
    (SparseGpt(sparsity="2:4"), Magnitude(sparsity="2:4")),
    (Eora(rank=2), Eora(rank=2, method="svd")),
]


@pytest.mark.parametrize(("pass_", "without"), only(FEW[:2], FEW), ids=[p.key for p, _ in FEW])
def test_an_expert_that_saw_too_few_tokens_is_worked_on_without_them(pass_: LinearPass, without: LinearPass) -> None:
    model = make_mixture("Mixtral")
    before = [Rtn(bits=3, group_size=16)] if pass_.key == "eora" else []
    every = {s.name for s in find(model).sites if s.is_expert}
    result = compress.apply(model, [*before, pass_], calibration=TOKENS, min_expert_tokens=10_000)
    expected = compress.apply(model, [*before, without], calibration=TOKENS if without.calibrated else None)
    for name, weight in result.weights.items():
        same = torch.equal(weight.dequantize(), expected.weights[name].dequantize())
        assert same == (name in every), name
    notes = result.report.layers
    for name in every:
        assert "fewer than 10000" in notes[name][pass_.key]["fallback"], name
    said = [text for text in result.report.fallbacks if "experts" in text]
    assert len(said) == 1, "one sentence, not one for each"
    assert f"{len(every)} experts saw fewer than 10000 tokens" in said[0]
    enough = compress.apply(model, [*before, pass_], calibration=TOKENS, min_expert_tokens=1)
    assert not enough.report.fallbacks


def test_all_tokens_leave_no_expert_without_statistics() -> None:
    model, few = make_mixture("Mixtral"), TOKENS[:1, :8]
    options: dict[str, Any] = {"calibration": few, "min_expert_tokens": few.numel()}
    assert compress.apply(model, [Gptq(**W4)], **options).report.fallbacks
    assert not compress.apply(model, [Gptq(**W4)], calibrate_all_experts=True, **options).report.fallbacks


@pytest.mark.parametrize("kind", ["GptOss", "LongcatFlash"])
def test_all_tokens_are_shown_whatever_the_code_of_a_model_calls_and_does_with_its_choices(kind: str) -> None:
    """gpt-oss has other words for them; LongCat's code fails on tokens with one choice."""
    options: dict[str, Any] = {"calibration": TOKENS, "min_expert_tokens": TOKENS.numel(), "products": "float32"}
    model = make_mixture(kind)
    every = [s.name for s in find(model).sites if s.is_expert]
    last = {f"{s.parameter}.{i}" for s in find(model).sites if s.is_expert for i in (4, 5)}  # LongCat's only pass on
    result = compress.apply(model, [Gptq(**W4)], calibrate_all_experts=True, **options)
    fell_back = {name for name in every if "fallback" in result.report.layers[name]["gptq"]}
    assert fell_back == last & set(every)


@pytest.mark.parametrize("kind", only(["GptOss"], ["Mixtral", "GptOss", "Llama4", "Dbrx"]))
def test_experts_are_learned(kind: str) -> None:
    """Rounding that is learned lowers the error of the block, and that of every expert that tokens were sent to."""
    model = make_mixture(kind)
    experts = {s.name for s in find(model).sites if s.is_expert}
    learned = compress.apply(model, [FlexRound(bits=2, group_size=16, steps=60)], calibration=TOKENS, evaluation=TOKENS)
    start = compress.apply(model, [Rtn(bits=2, group_size=16)], evaluation=TOKENS)
    assert learned.report.rows[-1].kl < start.report.rows[-1].kl
    moved = [n for n in experts if not torch.equal(learned.weights[n].dequantize(), start.weights[n].dequantize())]
    assert len(moved) > len(experts) // 2


def test_options_may_differ_from_expert_to_expert() -> None:
    override = Override("*.down_proj.1", {"bits": 8})
    result = compress.apply(make_mixture("Mixtral"), [Rtn(**W4, overrides=(override,))])
    bits = {name: weight.encoding.form.bits for name, weight in result.weights.items() if "down_proj" in name}
    assert {name: b for name, b in bits.items() if b == 8}.keys() == {n for n in bits if n.endswith("down_proj.1")}


def test_experts_that_are_learned_in_part_leave_the_others_as_they_are() -> None:
    model = make_mixture("GptOss")
    some = ("*.experts.down_proj.1", "*.experts.gate_up_proj.*")
    result = compress.apply(model, [FlexRound(**W4, steps=2, include=some)], calibration=TOKENS)
    for name in ("model.layers.0.mlp.experts.down_proj", "model.layers.0.mlp.experts.gate_up_proj"):
        before, after = model.get_parameter(name), result.model.get_parameter(name)
        same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert same == ([True, False, True, True] if "down" in name else [False] * 4)


REFUSED: dict[str, tuple[Any, str]] = {
    "rounded inputs": (Rtn(bits=8, activation_bits=8), "whose inputs cannot be rounded or skipped; `exclude` them"),
    "a bias": (Eora(rank=2, bias=True), "can be given no bias; `exclude` them"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_place_at_an_expert_is_refused_before_work_starts(case: str) -> None:
    pass_, said = REFUSED[case]
    before = [Rtn(bits=3, group_size=16)] if case == "a bias" else []
    with pytest.raises(ConfigError, match=said):
        compress.apply(make_mixture("Mixtral"), [*before, pass_], calibration=TOKENS)
    without = replace(pass_, exclude=("*.experts.*",))
    assert compress.apply(make_mixture("Mixtral"), [*before, without], calibration=TOKENS).weights


def test_all_tokens_are_refused_where_there_are_no_experts_or_they_choose_themselves(tiny_llama: nn.Module) -> None:
    options: dict[str, Any] = {"calibration": TOKENS, "calibrate_all_experts": True}
    with pytest.raises(ConfigError, match="LlamaForCausalLM keeps no experts together"):
        compress.apply(tiny_llama, [Gptq(**W4)], **options)
    for kind in ("Llama4", "JetMoe"):
        with pytest.raises(ConfigError, match="cannot be told which experts to run"):
            compress.apply(make_mixture(kind), [Gptq(**W4)], **options)


def test_the_caller_gets_back_how_experts_were_run(tiny_llama: nn.Module) -> None:
    for chosen in ("grouped_mm", "batched_mm", "eager"):
        model = make_mixture("Mixtral")
        model.set_experts_implementation(chosen)
        before = {name: p.clone() for name, p in model.named_parameters()}
        result = compress.apply(model, [Rtn(**W4)])
        assert model.config._experts_implementation == result.model.config._experts_implementation == chosen
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()), "a copy was worked on"
        compress.apply(model, [Rtn(**W4)], inplace=True)
        assert model.config._experts_implementation == chosen
        assert torch.equal(logits(model), logits(result.model))


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", only(["Mixtral"], KINDS))
def test_a_packed_folder_computes_and_generates_what_the_result_in_memory_does(kind: str, tmp_path: Path) -> None:
    model = make_mixture(kind)
    model.save_pretrained(tmp_path / "model")
    steps = {"passes": [{"gptq": {"bits": 4, "granularity": "channel"}}], "export": ["hf"]}
    report = compress.run(steps, tmp_path / "model", tmp_path / "out", calibration=TOKENS, evaluation=TOKENS)
    assert report.verified["max_logit_difference"] == 0.0
    assert report.verified["hf"]["max_logit_difference"] == 0.0
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    result = compress.apply(model, [Gptq(bits=4, granularity="channel")], calibration=TOKENS, evaluation=TOKENS)
    with running_one_by_one(result.model):
        assert torch.equal(logits(packed), logits(result.model))
        start = {"input_ids": TOKENS[:2, :8], "max_new_tokens": 4, "do_sample": False, "use_cache": False}
        assert torch.equal(packed.generate(**start), result.model.generate(**start))
    held = sum(b.nbytes for name, b in packed.named_buffers() if ".experts." in name)
    dense = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name and p.dim() > 1)
    assert held < dense / 5
    stored = find(open_model(tmp_path / "model").artifact.graph.model)
    modules = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["modules"]
    assert {s.name for s in stored.sites if s.is_expert} <= modules.keys()


PARTLY = {"one expert": ("*.layers.1.*experts.down_proj.2",), "a block": ("*.layers.1.*experts.*",)}


@pytest.mark.parametrize("left", PARTLY)
@pytest.mark.parametrize("kind", only(["GptOss"], ["Mixtral", "Qwen3Moe", "GptOss"]))
def test_experts_that_no_pass_worked_on_are_kept_as_they_were(kind: str, left: str, tmp_path: Path) -> None:
    model = make_mixture(kind).bfloat16()
    model.save_pretrained(tmp_path / "model")
    steps = {"passes": [{"rtn": {**W4, "exclude": list(PARTLY[left])}}]}
    report = compress.run(steps, tmp_path / "model", tmp_path / "out", evaluation=TOKENS)
    assert report.verified["max_logit_difference"] == 0.0
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    for name, module in experts_of(packed).items():
        for number in range(len(module.down_proj)):
            was = model.get_submodule(name).down_proj[number]
            kept = name.split(".")[2] == "1" and (left == "a block" or number == 2)
            now = module.down_proj[number]
            assert now.dtype == was.dtype
            assert torch.equal(now, was) is kept, (name, number)
    whole = isinstance(packed.get_submodule("model.layers.1.mlp.experts").down_proj, nn.Parameter)
    assert whole is (left == "a block")


def test_a_packed_folder_is_saved_again_moved_to_another_type_and_inspected(tmp_path: Path) -> None:
    make_mixture("Qwen3Moe").save_pretrained(tmp_path / "model")
    compress.run({"passes": [{"rtn": W4}]}, tmp_path / "model", tmp_path / "out")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    packed.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(logits(packed), logits(again))
    experts = packed.model.layers[0].mlp.experts.down_proj
    assert experts.shape == (8, 64, 32)
    assert torch.equal(experts[torch.tensor(-1)], experts[7])
    assert nn.ModuleList([packed]).bfloat16()[0].model.layers[0].mlp.experts.down_proj[1].dtype == torch.bfloat16
    with pytest.raises(TypeError, match="one by one; run the model with experts_implementation='eager'"):
        experts[torch.tensor([0, 1])]


def test_a_folder_that_lacks_an_expert_is_refused(tmp_path: Path) -> None:
    make_mixture("Mixtral").save_pretrained(tmp_path / "model")
    compress.run({"passes": [{"rtn": W4}]}, tmp_path / "model", tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    name = "model.layers.0.mlp.experts.down_proj.3"
    del config["quantization_config"]["modules"][name]
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{name} is not described"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


CHAINS: dict[str, list[Any]] = {
    "learned": [{"flexround": {**W4, "steps": 2}}],
    "compensated": [{"rtn": {"bits": 3, "group_size": 16}}, {"eora": {"rank": 2}}],
    "pruned by a threshold over the model": [{"global_magnitude": {"sparsity": 0.5}}],
    "trained": [{"magnitude": {"sparsity": 0.5}}, {"perp": {"steps": 2}}],
    "factors": [{"low_rank": {"ratio": 0.5, "steps": 2}}],
    "tables": [{"codebook": {"bits": 4}}],
}


@pytest.mark.parametrize("chain", only(["learned", "trained"], CHAINS))
@pytest.mark.parametrize("kind", only(["GptOss"], ["Qwen2Moe", "GptOss"]))
def test_passes_of_every_reach_make_folders_that_reload_to_the_bit(kind: str, chain: str, tmp_path: Path) -> None:
    make_mixture(kind).save_pretrained(tmp_path / "model")
    steps = {"passes": CHAINS[chain]}
    report = compress.run(steps, tmp_path / "model", tmp_path / "out", calibration=TOKENS, evaluation=TOKENS)
    assert report.verified["max_logit_difference"] == 0.0
    assert report.rows[-1].bits_per_weight < 24


@pytest.mark.parametrize(
    "merge", only(["ties", "bitdelta"], ["task_arithmetic", "ties", "average", "compeft", "bitdelta"])
)
def test_experts_are_merged(merge: str, tmp_path: Path) -> None:
    model = make_mixture("Mixtral")
    model.save_pretrained(tmp_path / "model")
    other = copy.deepcopy(model)
    for p in other.parameters():
        p.data += 0.05 * torch.randn_like(p)
    other.save_pretrained(tmp_path / "other")
    options = {"steps": 2} if merge == "bitdelta" else {}
    steps = {"passes": [{merge: {"models": [str(tmp_path / "other")], **options}}, {"rtn": W4}]}
    data = {"calibration": TOKENS} if merge == "bitdelta" else {}
    report = compress.run(steps, tmp_path / "model", tmp_path / "out", evaluation=TOKENS, **data)
    assert report.verified["max_logit_difference"] == 0.0
    if merge == "average":
        packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        name = "model.layers.0.mlp.experts"
        mean = (model.get_submodule(name).down_proj[1] + other.get_submodule(name).down_proj[1]) / 2
        rounded = compress.apply(nn.Sequential(linear(mean)), [Rtn(**W4)]).weights["0"].dequantize()
        torch.testing.assert_close(packed.get_submodule(name).down_proj[1], rounded, rtol=0.02, atol=1e-6)


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    return layer


def test_options_of_experts_are_part_of_what_a_run_is(tmp_path: Path) -> None:
    make_mixture("Mixtral").save_pretrained(tmp_path / "model")
    found = []
    choices: list[dict[str, Any]] = [{}, {"min_expert_tokens": 10_000}, {"calibrate_all_experts": True}]
    for number, options in enumerate(choices):
        steps = {"calibration": {"source": "demo", **options}, "passes": [{"gptq": W4}]}
        report = compress.run(steps, tmp_path / "model", tmp_path / f"out{number}", calibration=TOKENS)
        folder = AutoModelForCausalLM.from_pretrained(tmp_path / f"out{number}").eval()
        found.append((report.verified["run"], folder.model.layers[1].mlp.experts.down_proj[0]))
        assert bool(report.fallbacks) is (number == 1)
    assert len({run for run, _ in found}) == 3
    assert not any(torch.equal(found[0][1], other) for _, other in found[1:])


def test_dequantized_experts_are_what_was_measured() -> None:
    result = compress.apply(make_mixture("GptOss"), [Rtn(**W4)])
    for name, weight in result.weights.items():
        parameter, _, number = name.rpartition(".")
        if ".experts." in name:
            assert isinstance(weight, Weight)
            assert torch.equal(result.model.get_parameter(parameter)[int(number)].T, weight.dequantize())


def test_a_block_of_many_experts_is_worked_on_part_by_part_with_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_mixture("Qwen3Moe").save_pretrained(tmp_path / "model")
    sizes = [s.shape[0] * s.shape[1] for s in find(make_mixture("Qwen3Moe")).in_block(0)]
    found = []
    for number, most in enumerate((sum(sizes), max(sizes) * 3, 1)):
        monkeypatch.setattr("compress.engine.sweep.LARGEST_UNIT", most)
        steps = {"passes": [{"rtn": W4}, {"eora": {"rank": 2, "method": "svd"}}]}
        compress.run(steps, tmp_path / "model", tmp_path / f"out{number}")
        found.append((tmp_path / f"out{number}" / "compress.safetensors").read_bytes())
    assert found[0] == found[1] == found[2]
    assert [len(part) for part in parts_of(list(find(make_mixture("Qwen3Moe")).in_block(0)))][:2] == [4, 1]
    assert len(parts_of(list(find(make_mixture("Mixtral")).in_block(0)[:4]))) == 1, "layers stay together"
