"""Merging experts: those that put out alike become one, and a result that is a model of its kind like any other."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import compress_command, write_pipeline
from expert_models import KINDS_OF_ROUTERS, TOKENS, experts_of, logits, make_mixture, redundant
from selection import only
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import compress
from compress import ConfigError, ExpertMerge, ExpertPrune, Gptq, Override, Rtn
from compress.calibration.experts import put_out
from compress.errors import NonFiniteError
from compress.models.experts import neurons_of_experts, running_one_by_one
from compress.models.fewer_experts import mixture_of
from compress.models.graph import find
from compress.passes.interface import ExpertsSeen
from compress.passes.prune.expert_merge import clusters

pytestmark = pytest.mark.usefixtures("one_thread")

DEMO = "calibration: {source: demo, samples: 2, length: 32}\n"
W4 = {"bits": 4, "granularity": "channel"}


def apply(model: nn.Module, pass_: Any) -> compress.Result:
    return compress.apply(model, [pass_], TOKENS, evaluation=TOKENS, products="float32")


def layers_of(report: Any) -> dict[str, dict[str, Any]]:
    (facts,) = report.experts
    found: dict[str, dict[str, Any]] = facts["layers"]
    return found


def groups_of(layer: dict[str, Any]) -> set[frozenset[int]]:
    """Which experts became one."""
    merged = [frozenset(numbers) for numbers in layer.get("merged", {}).values()]
    there = frozenset().union(*merged)
    return {*merged, *(frozenset({i}) for i in range(len(layer["tokens"])) if i not in there)}


# --- redundant experts: what the paper is about -----------------------------------------------------------------------


PAIRS = {frozenset({i, i + 4}) for i in range(4)}


def changed(model: nn.Module, pass_: Any) -> float:
    """How far logits are from the model's own, of their length."""
    expected = logits(model)
    return float((logits(apply(model, pass_).model) - expected).norm() / expected.norm())


def test_experts_that_are_there_twice_become_one_and_hardly_a_token_changes_where_pruning_loses_much() -> None:
    model = redundant()
    result = apply(model, ExpertMerge(keep=4))
    assert all(groups_of(layer) == PAIRS for layer in layers_of(result.report).values())
    assert result.model.config.num_local_experts == 4
    for name, module in experts_of(model).items():
        pairs = [i % 4 for i in range(8) if i not in layers_of(result.report)[name]["gone"]]
        torch.testing.assert_close(result.model.get_submodule(name).down_proj, module.down_proj[pairs])
        now, before = (m.get_submodule(name.rpartition(".")[0]).gate.weight for m in (result.model, model))
        torch.testing.assert_close(now, ((before[:4] + before[4:]) / 2)[pairs])
    merged = changed(model, ExpertMerge(keep=4))
    pruned = min(changed(model, ExpertPrune(keep=4, by=by)) for by in ("reap", "frequency"))
    assert merged < 1e-3
    assert pruned > 0.05
    assert changed(model, ExpertMerge(keep=4, router="dominant")) > pruned, "half of the tokens lose their way"


def test_experts_that_are_nearly_the_same_become_their_mean() -> None:
    model = redundant(noise=0.02)
    assert changed(model, ExpertMerge(keep=4)) < changed(model, ExpertPrune(keep=4, by="frequency")) / 4


def test_neurons_in_another_order_are_found_and_put_in_order() -> None:
    model = redundant(permuted=True)
    assert changed(model, ExpertMerge(keep=4)) < 1e-3
    assert changed(model, ExpertMerge(keep=4, align=False)) > 0.1


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss", "NemotronH", "LongcatFlash"])
def test_the_order_of_neurons_changes_nothing_that_an_expert_puts_out(kind: str) -> None:
    """Gates before the rest or by turns with it, matrices turned or not, with biases, and experts without gates."""
    for module in experts_of(make_mixture(kind)).values() or longcat_experts(kind):
        made = torch.Generator().manual_seed(2)
        for parameter in module.parameters():
            parameter.data = torch.randn(parameter.shape, generator=made) / 4
        neurons = neurons_of_experts(module)
        assert neurons is not None
        order = torch.randperm(neurons.count, generator=made)
        assert {place.tensor for place in neurons.places} <= {name for name, _ in module.named_parameters()}
        hidden = torch.randn(5, module.down_proj.shape[1 if kind != "GptOss" else 2], generator=made)
        with torch.no_grad():
            before = put_out(module, hidden, 1)
            for place in neurons.places:
                value = module.get_parameter(place.tensor)[1]
                entries = torch.arange(value.shape[place.axis])
                entries[place.index] = entries[place.index][order]
                value.copy_(value.clone().index_select(place.axis, entries))
            torch.testing.assert_close(put_out(module, hidden, 1), before, rtol=1e-4, atol=1e-4)
            assert len(neurons.places) == (3 if kind == "GptOss" else 2)


def longcat_experts(kind: str) -> list[nn.Module]:
    return [m for m in make_mixture(kind).modules() if type(m).__name__ == f"{kind}Experts"]


# --- what is merged ---------------------------------------------------------------------------------------------------


def test_clusters_are_those_of_average_linkage() -> None:
    places = torch.tensor([[0.0], [1.0], [2.2], [10.0], [10.5], [30.0]]).double()
    distances = torch.cdist(places, places)
    assert clusters(distances, range(6), 3) == [[0, 1, 2], [3, 4], [5]]
    assert clusters(distances, range(6), 6) == [[i] for i in range(6)]
    assert clusters(distances, [0, 2, 5], 2) == [[0, 2], [5]]
    assert clusters(distances, [0, 5], 1) == [[0, 5]]
    assert clusters(distances, [], 0) == []
    # 2.2 is nearer to 4.1 than the mean of 0 and 1 is, but not nearer than the pair of 0 and 1 are to one another.
    line = torch.tensor([[0.0], [1.0], [2.2], [4.1]]).double()
    assert clusters(torch.cdist(line, line), range(4), 2) == [[0, 1, 2], [3]]
    same = torch.zeros(5, 5).double()
    assert len(clusters(same, range(5), 3)) == 3, "ties do not make fewer"


def seen(tokens: list[int], distances: Tensor, keep: int, **others: Any) -> ExpertsSeen:
    count = torch.tensor(tokens)
    given = {"groups": 1, "may": frozenset(range(len(tokens))), **others}
    weights = given.pop("weights", count.double())
    return ExpertsSeen(count, torch.zeros(len(tokens)).double(), weights, keep, distances=distances, **given)


def test_shares_are_those_of_tokens_weights_or_equal_and_the_largest_lends_its_number() -> None:
    places = torch.tensor([[0.0], [10.0], [0.1], [10.1]]).double()
    distances = torch.cdist(places, places)
    layer = seen([3, 0, 9, 0], distances, 2, weights=torch.tensor([6.0, 0, 2.0, 0]).double())
    left = ExpertMerge().run(layer)
    assert left.numbers == (1, 2)
    assert left.made_of == {2: {0: 0.25, 2: 0.75}, 1: {1: 0.5, 3: 0.5}}
    assert ExpertMerge(weigh="router_weight").run(layer).made_of[0] == {0: 0.75, 2: 0.25}
    assert ExpertMerge(weigh="equal").run(layer).made_of[0] == {0: 0.5, 2: 0.5}


def test_only_experts_of_one_group_and_those_that_may_become_one() -> None:
    places = torch.tensor([[0.0], [5.0], [0.1], [0.2], [5.1], [0.3]]).double()
    distances = torch.cdist(places, places)
    left = ExpertMerge().run(seen([1] * 6, distances, 4, groups=2))
    assert [sorted(of) for of in left.made_of.values()] == [[0, 2], [3, 5]]
    spared = ExpertMerge().run(seen([1] * 6, distances, 4, groups=2, may=frozenset({1, 2, 3, 4, 5})))
    assert sorted(sorted(of) for of in spared.made_of.values()) == [[1, 2], [3, 5]]
    assert 0 in spared.numbers


def looped(model: PreTrainedModel) -> dict[str, tuple[Tensor, list[int], list[float]]]:
    """Of every layer the mean of what each expert makes of all tokens, how many it is sent, and their weights."""
    found = {}
    sent: dict[str, Any] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: sent.__setitem__(name, args))
        for name, module in experts_of(model).items()
    ]
    logits(model)
    for handle in handles:
        handle.remove()
    for name, (hidden, chosen, weights) in sent.items():
        module = model.get_submodule(name)
        with torch.no_grad():
            means = torch.stack([put_out(module, hidden, i).double().mean(0) for i in range(len(module.down_proj))])
        counts = [int((chosen == i).sum()) for i in range(len(means))]
        found[name] = means, counts, [float(weights[chosen == i].double().sum()) for i in range(len(means))]
    return found


@pytest.mark.parametrize("kind", ["Mixtral", "DeepseekV3", "GptOss"])
def test_what_is_compared_is_the_mean_of_what_each_expert_puts_out_for_every_token(kind: str) -> None:
    model = make_mixture(kind)
    keep = 4 if kind == "DeepseekV3" else 2
    by_count = apply(model, ExpertMerge(keep=keep))
    by_weight = layers_of(apply(model, ExpertMerge(keep=keep, weigh="router_weight")).report)
    groups = 2 if kind == "DeepseekV3" else 1
    for name, (means, counts, weights) in looped(model).items():
        layer = layers_of(by_count.report)[name]
        assert layer["tokens"] == layer["scores"] == counts
        assert by_weight[name]["scores"] == pytest.approx(weights, rel=1e-4)
        expected, size = set(), len(means) // groups
        for first in range(0, len(means), size):
            found = clusters(torch.cdist(means, means), range(first, first + size), keep // groups)
            expected |= {frozenset(numbers) for numbers in found}
        assert groups_of(layer) == expected


@pytest.mark.parametrize("weigh", ["frequency", "equal"])
def test_the_experts_that_are_left_are_weighted_means_of_the_original_ones(weigh: str) -> None:
    model = make_mixture("Qwen3Moe")
    result = apply(model, ExpertMerge(keep=4, align=False, weigh=weigh))
    for name, layer in layers_of(result.report).items():
        stay = [i for i in range(8) if i not in layer["gone"]]
        router = model.get_submodule(name.rpartition(".")[0]).gate.weight
        for new, old in enumerate(stay):
            members = layer["merged"].get(str(old), [old])
            shares = torch.tensor([float(layer["scores"][i]) for i in members])
            shares = shares / shares.sum() if shares.sum() else torch.full_like(shares, 1 / len(members))
            assert int(shares.argmax()) == members.index(old)
            for leaf in ("gate_up_proj", "down_proj"):
                whole = model.get_parameter(f"{name}.{leaf}")[members]
                mean = (whole * shares[:, None, None]).sum(0)
                torch.testing.assert_close(result.model.get_parameter(f"{name}.{leaf}")[new], mean)
            row = result.model.get_submodule(name.rpartition(".")[0]).gate.weight[new]
            torch.testing.assert_close(row, router[members].mean(0))


def test_an_expert_that_is_sent_nothing_adds_nothing_and_one_that_stays_alone_is_the_same_to_the_bit() -> None:
    model = make_mixture("Olmoe")
    result = compress.apply(model, [ExpertMerge(keep=6)], TOKENS[:1, :2], evaluation=TOKENS)
    alone = unseen = 0
    for name, layer in layers_of(result.report).items():
        stay = [i for i in range(8) if i not in layer["gone"]]
        for new, old in enumerate(stay):
            counts = [layer["tokens"][i] for i in layer["merged"].get(str(old), [old])]
            if sum(count > 0 for count in counts) == 1 or len(counts) == 1:
                now, was = (m.get_parameter(f"{name}.down_proj") for m in (result.model, model))
                assert torch.equal(now[new], was[old])
                alone, unseen = alone + (len(counts) == 1), unseen + (len(counts) > 1)
    assert alone
    assert unseen


# --- a model of its kind like any other -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", only(["Mixtral"], KINDS_OF_ROUTERS))
def test_the_written_folder_loads_and_further_passes_work_behind(kind: str, tmp_path: Path) -> None:
    model = make_mixture(kind)
    model.save_pretrained(tmp_path / "model")
    steps: dict[str, Any] = {"passes": [{"expert_merge": {"keep": 0.5}}, {"gptq": W4}], "export": ["hf"]}
    report = compress.run(steps, tmp_path / "model", tmp_path / "out", calibration=TOKENS, evaluation=TOKENS)
    assert report.verified["max_logit_difference"] == report.verified["hf"]["max_logit_difference"] == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "hf").eval()
    assert mixture_of(find(plain)).count * 2 == mixture_of(find(model)).count
    both = compress.apply(model, [ExpertMerge(keep=0.5), Gptq(**W4)], TOKENS)
    with running_one_by_one(both.model):
        assert torch.equal(logits(loaded), logits(both.model))
    start = {"input_ids": TOKENS[:2, :8], "max_new_tokens": 3, "do_sample": False}
    assert loaded.generate(**start).shape == (2, 11)


def test_no_more_experts_are_chosen_than_are_left(tmp_path: Path) -> None:
    make_mixture("Mixtral").save_pretrained(tmp_path / "model")
    steps: dict[str, Any] = {"passes": [{"expert_merge": {"keep": 2}}, {"expert_merge": {"keep": 1}}]}
    report = compress.run(steps, tmp_path / "model", tmp_path / "out", calibration=TOKENS, evaluation=TOKENS)
    assert report.verified["max_logit_difference"] == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (1, 1)
    assert [facts["of"] for facts in report.experts] == [4, 2]
    assert compress.run(
        {"passes": [{"expert_prune": {"keep": 3}}, {"expert_merge": {"keep": 2}}, {"layer_drop": {}}]},
        tmp_path / "model", tmp_path / "mixed", calibration=TOKENS, evaluation=TOKENS,
    ).verified["max_logit_difference"] == 0  # fmt: skip


def test_the_number_that_is_kept_may_be_all_of_them() -> None:
    model = make_mixture("Mixtral")
    result = apply(model, ExpertMerge(keep=4))
    assert torch.equal(logits(result.model), logits(model))
    assert all(layer["gone"] == [] for layer in layers_of(result.report).values())


def test_plan_and_the_table_say_what_is_left(tmp_path: Path) -> None:
    make_mixture("Mixtral").save_pretrained(tmp_path / "model")
    pipeline = write_pipeline(tmp_path / "p.yaml", f"{DEMO}passes: [expert_merge, {{rtn: {{bits: 4}}}}]")
    rows = json.loads(compress_command("plan", pipeline, tmp_path / "model", "--json").out)["passes"]
    assert [(row["layers"], row["becomes"]) for row in rows] == [
        (16, "75% of the experts of every layer left"),
        (20, "quantized"),
    ]
    steps = {"passes": [{"expert_merge": {"keep": 3}}]}
    report = compress.run(steps, tmp_path / "model", tmp_path / "out", calibration=TOKENS)
    assert "expert_merge made 3 experts of 4 in each of 2 layers" in compress.report.report.caption(report)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["experts"] == report.experts


# --- what it refuses --------------------------------------------------------------------------------------------------


REFUSED: dict[str, tuple[str, list[Any], str]] = {
    "more than there are": ("Mixtral", [ExpertMerge(keep=5)], r"keep: keeps 5 experts of every layer, and each has 4"),
    "groups": ("DeepseekV3", [ExpertMerge(keep=5)], "2 groups .*keep a multiple of 2, and at least 4"),
    "not told": ("Llama4", [ExpertMerge()], "experts of a Llama4ForCausalLM is not told which experts"),
    "overrides": ("Mixtral", [ExpertMerge(overrides=(Override("*", {"keep": 2}),))], "every layer keeps as many"),
    "too few may": ("Mixtral", [ExpertMerge(keep=2, exclude=("*.1.*_proj.[01]",))], 
                    r"3 experts of .*layers.1.* become 1, and only 2 may"),
    "worked on": ("Mixtral", [Rtn(**W4), ExpertMerge()], "was worked on before.*put expert_merge before"),
    "a router": ("Phimoe", [Rtn(**W4, include=("*.router",)), ExpertMerge()], "worked on before.*put expert_merge"),
    "an option": ("Mixtral", [ExpertMerge(weigh="norm")], "weigh: 'norm' is not one of"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_before_work(case: str) -> None:
    kind, passes, said = REFUSED[case]
    with pytest.raises(ConfigError, match=said):
        compress.apply(make_mixture(kind), passes, TOKENS)


def test_experts_whose_neurons_are_not_known_are_merged_as_they_stand_or_refused() -> None:
    model = make_mixture("Mixtral")
    for module in experts_of(model).values():
        module.register_parameter("extra", nn.Parameter(torch.zeros(4, 2, 2)))
    with pytest.raises(ConfigError, match=r"not known which neurons .*align: false"):
        compress.apply(model, [ExpertMerge()], TOKENS)


def test_outputs_that_are_not_finite_are_said() -> None:
    model = make_mixture("Mixtral")
    model.model.layers[1].mlp.experts.down_proj.data[2] = float("inf")
    with pytest.raises(NonFiniteError, match=r"experts of model\.layers\.1\.mlp\.experts put out NaN or infinity"):
        compress.apply(model, [ExpertMerge()], TOKENS)
