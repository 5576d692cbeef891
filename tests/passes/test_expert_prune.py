"""Taking experts out: the scores of the paper, and a result that is a model of its kind like any other."""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from commands import compress_command, write_pipeline
from expert_models import KINDS_OF_ROUTERS, TOKENS, Unfused, experts_of, logits, make_mixture, unfused
from selection import only
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

import compress
from compress import ConfigError, ExpertPrune, Gptq, LayerDrop, Override, Perp, Rtn
from compress.checkpoint import opening
from compress.config.reading import parse
from compress.errors import NonFiniteError
from compress.models.experts import running_one_by_one
from compress.models.fewer_experts import check_fewer, fewer, mixture_of
from compress.models.graph import chosen as of_towers
from compress.models.graph import find
from compress.passes.interface import ExpertsSeen
from compress.passes.prune.expert_prune import best
from compress.planning import plan

pytestmark = pytest.mark.usefixtures("one_thread")

DEMO = "calibration: {source: demo, samples: 2, length: 32}\n"
W4 = {"bits": 4, "granularity": "channel"}


def pruned(model: nn.Module, **options: Any) -> compress.Result:
    return compress.apply(model, [ExpertPrune(**options)], TOKENS, evaluation=TOKENS, products="float32")


def gone_of(report: Any) -> dict[str, list[int]]:
    (facts,) = report.experts
    return {name: layer["gone"] for name, layer in facts["layers"].items()}


# --- what goes --------------------------------------------------------------------------------------------------------


def looped(model: transformers.PreTrainedModel) -> tuple[dict[str, list[float]], dict[str, list[int]]]:
    """Scores and counts of every expert, token by token, in a replica of linear layers."""
    replica, found, counts = unfused(model), {}, {}
    sent: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def see(name: str) -> Any:
        return lambda _, args: sent.__setitem__(name, args)

    modules = {name: module for name, module in replica.named_modules() if isinstance(module, Unfused)}
    for name, module in modules.items():
        module.register_forward_pre_hook(see(name))
    logits(replica)
    for name, (hidden, chosen, weights) in sent.items():
        experts = modules[name]
        sums, seen = [0.0] * len(experts.first), [0] * len(experts.first)
        for x, numbers, shares in zip(hidden, chosen.tolist(), weights.tolist(), strict=True):
            for number, share in zip(numbers, shares, strict=True):
                with torch.no_grad():
                    output = experts.down_proj[number](experts.activation(experts.first[number](x[None])))
                sums[number] += share * float(output.double().norm())
                seen[number] += 1
        found[name] = [total / max(1, count) for total, count in zip(sums, seen, strict=True)]
        counts[name] = seen
    return found, counts


@pytest.mark.parametrize(
    "kind", only(["DeepseekV3", "GptOss", "NemotronH"], ["Mixtral", "Qwen2Moe", "DeepseekV3", "GptOss", "NemotronH"])
)
def test_the_score_is_the_mean_of_router_weight_times_norm_of_output_over_the_tokens_of_an_expert(kind: str) -> None:
    model = make_mixture(kind)
    for parameter in model.parameters():  # biases too, which are part of what an expert puts out
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    scores, counts = looped(model)
    (facts,) = pruned(model, keep=0.5).report.experts
    assert facts["layers"].keys() == scores.keys() == experts_of(model).keys()
    for name, layer in facts["layers"].items():
        assert layer["tokens"] == counts[name]
        assert layer["scores"] == pytest.approx(scores[name], rel=1e-4)
    by_count = pruned(model, keep=0.5, by="frequency").report.experts[0]["layers"]
    assert {name: layer["scores"] for name, layer in by_count.items()} == counts
    groups = 2 if kind == "DeepseekV3" else 1
    for name, layer in facts["layers"].items():
        size = len(scores[name]) // groups
        for first in range(0, len(scores[name]), size):
            ranked = sorted(range(first, first + size), key=scores[name].__getitem__)
            assert set(layer["gone"]) & set(ranked) == set(ranked[: size // 2])


def test_those_of_the_largest_scores_stay_of_every_group_and_of_equal_ones_the_first() -> None:
    every = frozenset(range(6))
    assert best([5, 1, 4, 2, 3, 0], 3, 1, every) == (0, 2, 4)
    assert best([5, 6, 7, 2, 3, 0], 2, 2, every) == (2, 4)
    assert best([1, 1, 1, 1, 1, 1], 4, 2, every) == (0, 1, 3, 4)
    assert best([5, 1, 4, 2, 3, 0], 3, 1, frozenset({0, 2, 4})) == (1, 3, 5), "what must stay comes first"
    assert best([5, 1, 4, 2, 3, 0], 4, 1, frozenset({0, 2, 4})) == (0, 1, 3, 5)


def test_an_expert_that_is_sent_no_token_is_worth_nothing() -> None:
    tokens, weighted = torch.tensor([4, 0, 2]), torch.tensor([2.0, 0.0, 3.0], dtype=torch.float64)
    layer = ExpertsSeen(tokens, weighted, weighted, 2, 1, frozenset(range(3)))
    assert ExpertPrune().scores(layer).tolist() == [0.5, 0.0, 1.5]
    assert ExpertPrune(by="frequency").scores(layer).tolist() == [4, 0, 2]
    result = compress.apply(make_mixture("Olmoe"), [ExpertPrune(keep=4)], TOKENS[:1, :2], evaluation=TOKENS)
    (facts,) = result.report.experts
    unseen = sum(not layer["tokens"][i] for layer in facts["layers"].values() for i in layer["gone"])
    assert unseen
    assert f"({unseen} of those that went were sent no token)" in compress.report.report.caption(result.report)


def test_a_share_is_rounded_and_every_group_keeps_as_many() -> None:
    assert ExpertPrune().kept_of(128, 1) == 96
    assert ExpertPrune(keep=0.7).kept_of(8, 1) == 6
    assert ExpertPrune(keep=0.01).kept_of(8, 1) == 1
    assert ExpertPrune(keep=0.7).kept_of(256, 8) == 176
    assert ExpertPrune(keep=0.01).kept_of(256, 8, least=2) == 16
    assert ExpertPrune(keep=5).kept_of(8, 1) == 5


def test_experts_that_are_excluded_stay() -> None:
    model = make_mixture("Qwen3Moe")
    every = gone_of(pruned(model, keep=5).report)
    name = next(iter(every))
    spared = every[name][0]
    found = gone_of(pruned(model, keep=5, exclude=(f"{name}.down_proj.{spared}",)).report)
    assert spared not in found[name]
    assert set(every[name]) - {spared} < set(found[name])
    assert {n: v for n, v in found.items() if n != name} == {n: v for n, v in every.items() if n != name}


# --- what is left computes what the original does without the experts that went ---------------------------------------


ROUTERS = ("gate.weight", "router.weight", "wg.weight", "classifier.weight", "router.layer.weight")


class Masked(TorchFunctionMode):
    """While open, routers give the experts that went no chance: their logits are minus infinity, before all else."""

    def __init__(self, gone: dict[int, Tensor]):
        super().__init__()
        self.gone = gone  # the memory of a router's matrix -> the numbers of experts

    def __torch_function__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        weight = args[1] if func is nn.functional.linear else None
        if weight is not None and weight.data_ptr() in self.gone:
            made[..., self.gone[weight.data_ptr()]] = float("-inf")
        return made


@contextmanager
def masked(model: nn.Module, gone: dict[str, list[int]]) -> Iterator[nn.Module]:
    """A copy of a model whose routers cannot choose some experts."""
    model, places = copy.deepcopy(model), {}
    for name, numbers in gone.items():
        layer = model.get_submodule(name.rpartition(".")[0])
        for leaf, value in (*layer.named_parameters(), *layer.named_buffers()):
            if leaf.endswith("correction_bias"):
                value.data[..., numbers] = float("-inf")
            elif any(
                f".{leaf}".endswith(f".{part}.weight") for part in ("gate", "router", "wg", "classifier", "layer")
            ):
                places[value.data_ptr()] = torch.tensor(numbers)
    assert len(places) == len(gone)
    with running_one_by_one(model), Masked(places):
        yield model


@pytest.mark.parametrize("kind", only(KINDS_OF_ROUTERS[::2], KINDS_OF_ROUTERS))
def test_the_model_says_what_the_original_says_whose_router_cannot_choose_those_that_went(kind: str) -> None:
    model = make_mixture(kind)
    for name, buffer in model.named_buffers():
        if name.endswith("correction_bias"):
            buffer.data = 0.1 * torch.rand(buffer.shape, generator=torch.Generator().manual_seed(5))
    before = copy.deepcopy(model)
    result = pruned(model, keep=0.75 if kind == "Olmoe" else 0.5)
    gone = gone_of(result.report)
    assert all(gone.values())
    with masked(model, gone) as replica:
        expected = logits(replica)
    assert expected.isfinite().all()
    torch.testing.assert_close(logits(result.model), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, logits(model), atol=1e-3), "what went was of use"
    assert all(torch.equal(p, before.get_parameter(name)) for name, p in model.named_parameters()), "a copy was cut"
    assert model.config.to_dict() == before.config.to_dict()


@pytest.mark.parametrize("kind", only(["DeepseekV3"], KINDS_OF_ROUTERS))
def test_the_written_folder_loads_and_further_passes_work_behind(kind: str, tmp_path: Path) -> None:
    model = make_mixture(kind)
    model.save_pretrained(tmp_path / "model")
    steps: dict[str, Any] = {"passes": [{"expert_prune": {"keep": 0.5}}]}
    report = compress.run(steps, tmp_path / "model", tmp_path / "out", calibration=TOKENS, evaluation=TOKENS)
    assert report.verified["max_logit_difference"] == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert mixture_of(find(loaded)).count * 2 == mixture_of(find(model)).count
    with running_one_by_one(loaded):
        assert torch.equal(logits(loaded), logits(compress.apply(model, [ExpertPrune(keep=0.5)], TOKENS).model))
    start = {"input_ids": TOKENS[:2, :8], "max_new_tokens": 3, "do_sample": False}
    assert loaded.generate(**start).shape == (2, 11)
    steps = {"passes": [*steps["passes"], {"gptq": W4}], "export": ["hf"]}
    more = compress.run(steps, tmp_path / "model", tmp_path / "more", calibration=TOKENS, evaluation=TOKENS)
    assert more.verified["max_logit_difference"] == more.verified["hf"]["max_logit_difference"] == 0
    both = compress.apply(model, [ExpertPrune(keep=0.5), Gptq(**W4)], TOKENS)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "more").eval()
    with running_one_by_one(both.model):
        assert torch.equal(logits(packed), logits(both.model))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "more" / "hf", experts_implementation="eager").eval()
    assert torch.equal(logits(plain), logits(packed))


def test_the_size_is_what_was_planned_and_shrinks_by_what_went(tmp_path: Path) -> None:
    model = make_mixture("Mixtral")
    model.save_pretrained(tmp_path / "model")
    pipeline = parse(f"{DEMO}passes: [{{expert_prune: {{keep: 1}}}}]")
    opened = opening.open_model(tmp_path / "model")
    expected = plan.make(pipeline, opened.artifact.graph, opened.dtypes)
    report = compress.run(pipeline, tmp_path / "model", tmp_path / "out", calibration=TOKENS, evaluation=TOKENS)
    assert report.rows[-1].bytes == expected.final_bytes
    gone = {n: p for n, p in model.named_parameters() if ".experts." in n or ".gate." in n}
    assert report.rows[0].bytes - report.rows[-1].bytes == sum(p.nbytes * 3 // 4 for p in gone.values())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (1, 1)


def test_no_more_experts_are_chosen_than_there_are_in_the_groups_of_a_token() -> None:
    result = pruned(make_mixture("DeepseekV3", num_experts_per_tok=4), keep=4)
    assert result.model.config.n_routed_experts == 4
    assert result.model.config.num_experts_per_tok == result.model.model.layers[1].mlp.gate.top_k == 2
    for numbers in gone_of(result.report).values():
        assert sum(number < 4 for number in numbers) == 2, "two of each group of four"


def test_what_was_done_to_experts_before_is_kept_of_those_that_stay(tmp_path: Path) -> None:
    model = make_mixture("Qwen3Moe")
    model.save_pretrained(tmp_path / "model")
    whole = compress.apply(model, [Rtn(**W4)])
    result = compress.apply(model, [Rtn(**W4), ExpertPrune(keep=0.5)], TOKENS)
    for layer, gone in gone_of(result.report).items():
        stay = [number for number in range(8) if number not in gone]
        for leaf in ("gate_up_proj", "down_proj"):
            for new, old in enumerate(stay):
                now, was = (r.weights[f"{layer}.{leaf}.{n}"] for r, n in ((result, new), (whole, old)))
                assert torch.equal(now.dequantize(), was.dequantize())
                notes = [
                    r.report.layers[f"{layer}.{leaf}.{n}"]["rtn"]["error"] for r, n in ((result, new), (whole, old))
                ]
                assert notes[0] == notes[1]
            assert f"{layer}.{leaf}.4" not in result.weights
    steps = {"passes": [{"rtn": W4}, {"expert_prune": {"keep": 0.5}}]}
    report = compress.run(steps, tmp_path / "model", tmp_path / "out", calibration=TOKENS, evaluation=TOKENS)
    assert report.verified["max_logit_difference"] == 0


def test_biases_of_routers_that_were_trained_are_cut_too(tmp_path: Path) -> None:
    model = make_mixture("GptOss")
    model.save_pretrained(tmp_path / "model")
    trained = {"perp": {"train": ["bias"], "objective": "next_token", "steps": 2}}
    steps = {"passes": [{"magnitude": {"sparsity": 0.3}}, trained, {"expert_prune": {"keep": 2}}]}
    report = compress.run(steps, tmp_path / "model", tmp_path / "out", calibration=TOKENS, evaluation=TOKENS)
    assert report.verified["max_logit_difference"] == 0
    before = compress.run({"passes": steps["passes"][:2]}, tmp_path / "model", tmp_path / "first", calibration=TOKENS)
    assert before.trained
    first, left = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("first", "out"))
    for layer, gone in gone_of(report).items():
        router = f"{layer.rpartition('.')[0]}.router.bias"
        stay = [number for number in range(4) if number not in gone]
        assert torch.equal(left.get_parameter(router), first.get_parameter(router)[stay])
        assert not torch.equal(first.get_parameter(router), model.get_parameter(router))


def test_it_follows_and_is_followed_by_blocks_and_experts_that_go(tmp_path: Path) -> None:
    make_mixture("Mixtral", num_hidden_layers=3).save_pretrained(tmp_path / "model")
    steps = {"passes": [{"layer_drop": {}}, {"expert_prune": {"keep": 3}}, {"expert_prune": {"keep": 2}}]}
    report = compress.run(steps, tmp_path / "model", tmp_path / "out", calibration=TOKENS, evaluation=TOKENS)
    assert report.verified["max_logit_difference"] == 0
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    assert (config.num_hidden_layers, config.num_local_experts) == (2, 2)
    assert [facts["of"] for facts in report.experts] == [4, 3]
    back = {"passes": [{"expert_prune": {"keep": 2}}, {"layer_drop": {}}]}
    report = compress.run(back, tmp_path / "model", tmp_path / "back", calibration=TOKENS, evaluation=TOKENS)
    assert report.verified["max_logit_difference"] == 0


@pytest.mark.parametrize("counted", only(["num_experts"], ["num_local_experts", "num_experts"]))
def test_of_a_model_of_text_and_images_the_configuration_of_the_text_counts_them(counted: str, tmp_path: Path) -> None:
    """By whichever of the two names that transformers reads the file has."""
    text = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
            "num_key_value_heads": 2, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}  # fmt: skip
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64,
              "deepstack_visual_indexes": [0], "num_position_embeddings": 16}  # fmt: skip
    torch.manual_seed(7)
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    kind = transformers.Qwen3VLMoeForConditionalGeneration
    kind(config).eval().save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    settings = json.loads(file.read_text())
    (saved,) = {"num_local_experts", "num_experts"} & settings["text_config"].keys()
    settings["text_config"][counted] = settings["text_config"].pop(saved)
    file.write_text(json.dumps(settings))
    steps = {"passes": [{"expert_prune": {"keep": 0.5}}, {"rtn": W4}]}
    report = compress.run(steps, tmp_path / "model", tmp_path / "out", calibration=TOKENS, evaluation=TOKENS)
    assert report.verified["max_logit_difference"] == 0
    loaded = kind.from_pretrained(tmp_path / "out")
    assert loaded.config.text_config.num_experts == 4
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("model", "out"))
    assert {k for k, v in before.items() if after[k] != v} == {"text_config"}
    assert {k for k, v in before["text_config"].items() if after["text_config"][k] != v} == {counted}
    assert after["text_config"].keys() == before["text_config"].keys()


@pytest.mark.parametrize("counted", only(["both"], ["num_local_experts", "num_experts", "both"]))
def test_the_count_stands_in_the_file_under_the_name_it_had(counted: str, tmp_path: Path) -> None:
    make_mixture("Qwen3Moe").save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    settings = json.loads(file.read_text())
    (saved,) = {"num_local_experts", "num_experts"} & settings.keys()
    names = ["num_local_experts", "num_experts"] if counted == "both" else [counted]
    count = settings.pop(saved)
    file.write_text(json.dumps(settings | dict.fromkeys(names, count)))
    steps = {"passes": [{"expert_prune": {"keep": 5}}, {"expert_prune": {"keep": 3}}]}
    compress.run(steps, tmp_path / "model", tmp_path / "out", calibration=TOKENS)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {k: v for k, v in written.items() if k in ("num_local_experts", "num_experts")} == dict.fromkeys(names, 3)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_experts == 3


def test_plan_and_the_table_say_what_goes(tmp_path: Path) -> None:
    make_mixture("Mixtral").save_pretrained(tmp_path / "model")
    pipeline = write_pipeline(tmp_path / "p.yaml", f"{DEMO}passes: [expert_prune, {{rtn: {{bits: 4}}}}]")
    rows = json.loads(compress_command("plan", pipeline, tmp_path / "model", "--json").out)["passes"]
    assert [(row["layers"], row["becomes"]) for row in rows] == [
        (16, "75% of the experts of every layer left"),
        (20, "quantized"),
    ]
    report = compress.run(
        {"passes": [{"expert_prune": {"keep": 3}}]}, tmp_path / "model", tmp_path / "out", calibration=TOKENS
    )
    said = "expert_prune kept 3 of 4 experts in each of 2 layers"
    assert said in compress.report.report.caption(report)
    assert said in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "report.json").read_text())["experts"] == report.experts


# --- what it refuses --------------------------------------------------------------------------------------------------


REFUSED: dict[str, tuple[str, list[Any], str]] = {
    "more than there are": ("Mixtral", [ExpertPrune(keep=5)], r"keep: keeps 5 experts of every layer, and each has 4"),
    "all gone": ("Mixtral", [ExpertPrune(keep=0)], "keep: 0 "),
    "a share of all": ("Mixtral", [ExpertPrune(keep=1.0)], "keep: 1.0 "),
    "groups": ("DeepseekV3", [ExpertPrune(keep=5)], "2 groups .*keep a multiple of 2, and at least 4"),
    "small groups": ("DeepseekV3", [ExpertPrune(keep=2)], "2 groups .*keep a multiple of 2, and at least 4"),
    "not told": ("Llama4", [ExpertPrune()], "experts of a Llama4ForCausalLM is not told which experts"),
    "overrides": ("Mixtral", [ExpertPrune(overrides=(Override("*", {"keep": 2}),))], "every layer keeps as many"),
    "too few may": ("Mixtral", [ExpertPrune(keep=1, exclude=("*.1.*_proj.[012]",))], r"layers.1.* only 1 may"),
    "no matrix whole": ("Mixtral", [ExpertPrune(include=("*down_proj*",))], "only 0 may"),
    "no match": ("Mixtral", [ExpertPrune(exclude=("*.9",))], "matches no layer"),
    "fused": ("Mixtral", [[ExpertPrune(), Rtn(**W4)]], "cannot be fused"),
    "a router": ("Phimoe", [Rtn(**W4, include=("*.router",)), ExpertPrune()], "worked on before.*put expert_prune"),
    "kinds": ("Mixtral", [Rtn(**W4, include=("*down_proj.1",)), ExpertPrune()], "different kinds.*put expert_prune"),
    "distill": ("Mixtral", [ExpertPrune(), Perp(objective="distill")], "without the blocks, experts.*next_token"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_before_work(case: str) -> None:
    kind, passes, said = REFUSED[case]
    with pytest.raises(ConfigError, match=said):
        compress.apply(make_mixture(kind), passes, TOKENS)


def test_dense_models_and_missing_data_are_refused(tiny_llama: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM keeps no experts.*layer_drop.*wanda"):
        compress.apply(tiny_llama, [ExpertPrune()], TOKENS)
    with pytest.raises(ConfigError, match=r"Sequential keeps no experts"):
        compress.apply(nn.Sequential(nn.Linear(8, 8)), [ExpertPrune()], torch.randn(4, 8))
    with pytest.raises(ConfigError, match="expert_prune learns from data"):
        compress.apply(make_mixture("Mixtral"), [ExpertPrune()])


def test_models_that_do_not_follow_from_their_count_of_experts_are_refused() -> None:
    model = make_mixture("Mixtral")
    del model.config.num_local_experts
    model.config.__dict__.pop("num_experts", None)
    with pytest.raises(ConfigError, match="no entry that counts its 4 experts"):
        compress.apply(model, [ExpertPrune()], TOKENS)
    model = make_mixture("Mixtral")
    model.model.layers[1].mlp.register_buffer("of_token", torch.zeros(256, 2, dtype=torch.int64))
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.of_token .* holds numbers of experts"):
        compress.apply(model, [ExpertPrune()], TOKENS)
    model = make_mixture("Mixtral")
    experts = model.model.layers[0].mlp.experts
    experts.down_proj, experts.gate_up_proj = (nn.Parameter(p[:3]) for p in (experts.down_proj, experts.gate_up_proj))
    with pytest.raises(ConfigError, match=r"has 3 experts and .* 4; all must have equally many"):
        compress.apply(model, [ExpertPrune()], TOKENS)


def test_outputs_that_are_not_finite_are_said() -> None:
    model = make_mixture("Mixtral")
    model.model.layers[1].mlp.experts.down_proj.data[2] = float("inf")
    with pytest.raises(NonFiniteError, match=r"experts of model\.layers\.1\.mlp\.experts put out NaN or infinity"):
        compress.apply(model, [ExpertPrune()], TOKENS)


def test_every_number_of_experts_can_be_kept_where_no_groups_forbid_it() -> None:
    graph = find(make_mixture("Qwen3Moe"))
    mixture = mixture_of(graph)
    for keep in range(1, 9):
        assert check_fewer(mixture, keep) is None
        made = fewer(graph, {name: tuple(range(keep)) for name in mixture.layers})
        assert mixture_of(made.graph).count == keep
        assert mixture_of(of_towers(made.graph)).chosen == min(2, keep)
        sites = [s for s in made.graph.sites if s.is_expert]
        assert {s.ref.of for s in sites} == {keep}
        assert len(sites) == 2 * 2 * keep


def test_the_kept_number_may_be_all_of_them() -> None:
    model = make_mixture("Mixtral")
    result = pruned(model, keep=4)
    assert torch.equal(logits(result.model), logits(model))
    assert gone_of(result.report) == {name: [] for name in experts_of(model)}
    assert compress.apply(model, [LayerDrop(blocks=0), ExpertPrune(keep=4)], TOKENS).report.experts
