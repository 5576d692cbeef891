"""Options for each layer under a budget: what is measured, what is chosen, and what a user sees."""

import json
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import compress_command, make_text_model, write_text
from selection import only
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, ViTConfig, ViTForImageClassification

import compress
from compress.api.fit import prepare
from compress.config.reading import load_pipeline
from compress.encodings import Weight
from compress.engine.context import Context
from compress.engine.fit import divergence, sensitivity
from compress.engine.fit.divergence import divergences
from compress.engine.fit.errors import sweep_options
from compress.engine.fit.gradients import output_fisher
from compress.engine.ledger import MemoryLedger
from compress.errors import ResourceError, UsageError
from compress.passes import Gptq, Override, Rtn
from compress.planning import in_memory
from compress.planning.overrides import with_overrides

OPTIONS = ("w2g32", "w3g32", "w4g32", "w8g32")
STEPS: dict[str, Any] = {"passes": [{"gptq": {"group_size": 32}}]}


@pytest.fixture(scope="module", autouse=True)
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is calibrated on: the bundled text takes seconds to read."""
    file = write_text(tmp_path_factory.mktemp("text") / "words.txt")
    STEPS["calibration"] = {"source": str(file), "samples": 4, "length": 32}
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    return make_text_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def context(folder: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Context:
    """The tiny model, as a sweep is given it."""
    return prepare(STEPS, folder, tmp_path_factory.mktemp("none") / "out").context(MemoryLedger())


@pytest.fixture(scope="module")
def samples() -> Tensor:
    return torch.randint(0, 4096, (6, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def fitted(folder: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> compress.Fit:
    """A model whose file of weights is to be no larger than so many bytes."""
    out = tmp_path_factory.mktemp("fit") / "out"
    return compress.fit(folder, out, size=2_145_000, pipeline=STEPS, options=OPTIONS)


def logits_of(folder: Path, tokens: Tensor, **changed: Tensor) -> Tensor:
    """Log-probabilities of a model with some parameters changed."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for name, value in changed.items():
            model.get_parameter(name.replace("__", ".")).copy_(value)
        found: Tensor = model(input_ids=tokens).logits.float().log_softmax(-1)
    return found


# --- what is measured -------------------------------------------------------------------------------------------------


def test_errors_are_those_of_outputs_on_the_calibration_data(context: Context, samples: Tensor) -> None:
    """Against outputs that are computed, token by token, of a layer that sees the embedding of every token."""
    passes = [Rtn(bits=bits, group_size=32, include=("*.0.*.q_proj",)) for bits in (2, 4)]
    swept = sweep_options(context, passes, [samples], {}, None, "")
    ((name, found),) = swept.sites.items()
    model = context.graph.model
    read = context.artifact.source.read
    hidden = torch.nn.functional.embedding(samples, read("model.embed_tokens.weight").float())
    norm = model.get_submodule("model.layers.0.input_layernorm")
    inputs = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + norm.variance_epsilon)
    inputs = inputs * read("model.layers.0.input_layernorm.weight").float()
    weight = read(f"{name}.weight").float()
    for pass_, option in zip(passes, found.options, strict=True):
        lost = inputs @ (pass_.nearest(weight).dequantize() - weight).T
        assert option.relative == pytest.approx(
            float(lost.square().sum() / (inputs @ weight.T).square().sum()), rel=1e-2
        )
        assert option.weighted is None


def test_half_the_fisher_information_times_a_squared_change_is_about_the_divergence(
    context: Context, folder: Path
) -> None:
    """Of independent changes to what each output of a layer puts out, small against the model's predictions."""
    tokens = torch.randint(0, 4096, (64, 32), generator=torch.Generator().manual_seed(5))
    sites = [s for s in context.graph.sites if s.name.endswith("0.mlp.down_proj")]
    fisher = output_fisher(context, sites, tokens, "")[sites[0].name]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    noise = torch.Generator().manual_seed(3)
    scale = 1e-2

    def disturb(_: Any, __: Any, output: Tensor) -> Tensor:
        return output + scale * torch.randn(output.shape, generator=noise)

    with torch.no_grad():
        before = model(input_ids=tokens).logits.log_softmax(-1)
        handle = model.get_submodule(sites[0].name).register_forward_hook(disturb)
        after = model(input_ids=tokens).logits.log_softmax(-1)
        handle.remove()
    kl = float((before.exp() * (before - after)).sum(-1).mean())
    assert kl == pytest.approx(float(fisher.sum()) / 2 * scale**2, rel=0.25)


def test_a_divergence_is_that_of_the_whole_model_with_one_layer_changed(
    context: Context, folder: Path, samples: Tensor
) -> None:
    """Run from the block on that the layer is in, with what arrives there kept."""
    sites = [s for s in context.graph.sites if s.block == 1][-2:]
    weights = {s.name: Weight(context.artifact.original(s).float() * 0.9) for s in sites}
    found = divergences(context, [sites, sites[:1]], weights, samples, "")
    for group, kl in zip(([*sites], sites[:1]), found, strict=True):
        changed = {s.parameter.replace(".", "__"): weights[s.name].dequantize() for s in group}
        before, after = logits_of(folder, samples), logits_of(folder, samples, **changed)
        expected = float((before.exp() * (before - after))[:, :-1].sum(-1).mean())
        assert kl == pytest.approx(expected, rel=1e-3)


def test_blocks_before_a_changed_layer_are_not_run_again(
    context: Context, samples: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = [s for s in context.graph.sites if s.block == 1]
    weights = {s.name: Weight(context.artifact.original(s).float() * 0.9) for s in last}
    skipping = divergences(context, [[s] for s in last], weights, samples, "")
    monkeypatch.setattr(divergence, "SAME", -1.0)  # no run from a block on counts as the same: all of it runs
    assert divergences(context, [[s] for s in last], weights, samples, "") == pytest.approx(skipping, rel=1e-4)


def test_layers_with_the_same_inputs_are_bound_together_and_blocks_hold_all_of_theirs(
    context: Context, samples: Tensor
) -> None:
    swept = sweep_options(context, [Gptq(bits=2), Gptq(bits=4)], [samples], {}, None, "")
    sites = [s for s in context.graph.sites if s.block is not None]
    names = [[s.name.rpartition(".")[2] for s in group] for group in sensitivity.grouped(sites, swept, "fused")]
    block = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert names == 2 * block
    assert [len(group) for group in sensitivity.grouped(sites, swept, "block")] == [7, 7]
    assert len(sensitivity.grouped(sites, swept, "site")) == 14


# --- what is chosen ---------------------------------------------------------------------------------------------------


def test_overrides_give_every_layer_its_own_options_and_none_is_idle() -> None:
    names = [f"model.layers.{i}.{name}" for i in range(12) for name in ("mlp.up", "mlp.down", "attn[0].q")]
    generator = torch.Generator().manual_seed(0)
    for many in (1, 2, 3):
        drawn = torch.randint(0, many + 1, (len(names),), generator=generator).tolist()
        both = zip(names, drawn, strict=True)
        chosen = {name: {"bits": 2 + bits, "group_size": 64 if bits else None} for name, bits in both}
        most, overrides = with_overrides(chosen)
        pass_ = Gptq(**most, overrides=overrides)
        assert all(pass_.at(name) == Gptq(**options) for name, options in chosen.items())
        winners = {max(i for i, o in enumerate(overrides) if o == w) for n in names if (w := _winner(pass_, n))}
        assert winners == set(range(len(overrides)))


def _winner(pass_: Gptq, name: str) -> Override | None:
    return next((o for o in reversed(pass_.overrides) if fnmatchcase(name, o.match)), None)


def test_layers_that_differ_in_numbers_alone_share_an_override() -> None:
    chosen = {f"layers.{i}.{name}": {"bits": 8 if name == "down" else 4} for i in range(9) for name in ("up", "down")}
    chosen["layers.3.down"] = {"bits": 2}
    most, overrides = with_overrides({"x.up": {"bits": 4}, **chosen})
    assert (most, overrides) == (
        {"bits": 4},
        (Override("layers.*.down", {"bits": 8}), Override("layers.3.down", {"bits": 2})),
    )


def test_the_file_of_weights_is_as_large_as_was_said_and_not_above_the_budget(fitted: compress.Fit) -> None:
    out = fitted.pipeline.parent.with_name("out")
    size = (out / "compress.safetensors").stat().st_size
    assert size == fitted.fitted.chosen.bytes <= 2_145_000
    assert 2_145_000 - size < 64 * 128 // 8 + 64  # one step of the largest layer from one width to the next
    assert fitted.report is not None
    assert fitted.report.rows[-1].bits_per_weight == pytest.approx(fitted.fitted.chosen.bits)
    assert len(fitted.fitted.counts()) > 1


def test_every_layer_is_stored_as_it_was_chosen(fitted: compress.Fit) -> None:
    out = fitted.pipeline.parent.with_name("out")
    modules = json.loads((out / "config.json").read_text())["quantization_config"]["modules"]
    assert modules.keys() == fitted.fitted.layers.keys()
    for name, layer in fitted.fitted.layers.items():
        assert f"w{modules[name]['bits']}g32" == layer.option
    written = load_pipeline(out / "pipeline.yaml")
    assert written.passes == load_pipeline(fitted.pipeline).passes


def test_the_front_falls_and_no_uniform_choice_is_below_it(fitted: compress.Fit) -> None:
    found = json.loads((fitted.pipeline.with_name("fit.json")).read_text())
    sizes, losses = [p["bytes"] for p in found["front"]], [p["loss"] for p in found["front"]]
    assert sizes == sorted(set(sizes))
    assert losses == sorted(losses, reverse=True)
    for point in found["uniform"].values():
        below = [p["loss"] for p in found["front"] if p["bytes"] >= point["bytes"]]
        assert not below or min(below) <= point["loss"] + 1e-12
    assert found["chosen"]["loss"] <= min(p["loss"] for p in found["uniform"].values() if p["bytes"] <= 2_145_000)


@pytest.mark.parametrize("measure", ["kl", "fisher", "error"])
def test_every_measure_finds_more_lost_with_fewer_bits(folder: Path, tmp_path: Path, measure: Any) -> None:
    made = compress.fit(
        folder, tmp_path / "out", bits=4, pipeline=STEPS, options=OPTIONS, sensitivity=measure, dry_run=True
    )
    for losses in made.fitted.losses:
        assert list(losses.values()) == sorted(losses.values(), reverse=True)
    assert made.report is None
    assert not (tmp_path / "out").exists()


def test_a_second_budget_takes_the_sweep_of_the_first(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"pipeline": STEPS, "options": OPTIONS, "work": tmp_path / "work", "dry_run": True}
    options["sensitivity"] = "kl"
    first = compress.fit(folder, tmp_path / "out", bits=4, **options)

    def again(*_: object, **__: object) -> None:
        raise AssertionError("a layer was quantized once more")

    monkeypatch.setattr("compress.engine.fit.errors.solved_by_group", again)
    monkeypatch.setattr(divergence, "in_memory", again)
    second = compress.fit(folder, tmp_path / "other", bits=3, **options)
    assert second.fitted.front == first.fitted.front
    assert second.fitted.chosen.bits <= 3 < first.fitted.chosen.bits <= 4
    with pytest.raises(AssertionError):
        compress.fit(folder, tmp_path / "other", bits=3, fresh=True, **options)


@pytest.mark.parametrize("measure", only(["fisher"], ["kl", "fisher", "error"]))
def test_data_and_models_of_other_kinds_are_fitted_too(measure: str, tmp_path: Path) -> None:
    """Images from Python, which no file holds; patches that a convolution reads are chosen for, the head is not."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=10))
    model.save_pretrained(tmp_path / "model")
    steps = {"passes": [{"gptq": {"include": ["*.layer*", "*patch_embeddings*"]}}], "calibration": {"source": "demo"}}
    images = torch.randn(16, 3, 32, 32)
    options: dict[str, Any] = {"pipeline": steps, "options": OPTIONS, "sensitivity": measure, "calibration": images}
    made = compress.fit(tmp_path / "model", tmp_path / "out", size=90_000, **options)
    assert (tmp_path / "out" / "compress.safetensors").stat().st_size <= 90_000
    assert len(made.fitted.layers) == 13
    assert all(list(each.values()) == sorted(each.values(), reverse=True) for each in made.fitted.losses)


def test_experts_of_fused_parameters_are_fitted_by_what_can_be_seen_of_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    experts = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    MixtralForCausalLM(MixtralConfig(vocab_size=256, **sizes, **experts)).save_pretrained(tmp_path / "model")
    tokens = torch.randint(0, 256, (8, 64))
    options: dict[str, Any] = {"pipeline": {**STEPS}, "options": OPTIONS, "calibration": tokens, "dry_run": True}
    made = compress.fit(tmp_path / "model", tmp_path / "out", bits=4, sensitivity="kl", **options)
    assert sum("experts" in name for name in made.fitted.layers) == 2 * 4 * 2
    assert all(max(each.values()) > 0 for each in made.fitted.losses)
    with pytest.raises(UsageError, match=r"no gradient of what .*experts.* puts out is seen"):
        compress.fit(tmp_path / "model", tmp_path / "out", bits=4, sensitivity="fisher", **options)


def test_layers_of_one_group_have_one_option(folder: Path, tmp_path: Path) -> None:
    made = compress.fit(folder, tmp_path / "out", bits=4, pipeline=STEPS, options=OPTIONS, groups="fused", dry_run=True)
    for block in ("model.layers.0", "model.layers.1"):
        names = [f"{block}.self_attn.{n}_proj" for n in "qkv"], [f"{block}.mlp.{n}_proj" for n in ("gate", "up")]
        assert all(len({made.fitted.layers[n].option for n in group}) == 1 for group in names)


def test_for_an_engine_groups_are_chosen_together_among_what_it_reads(folder: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"pipeline": STEPS, "sensitivity": "error", "runtime": "vllm"}
    made = compress.fit(folder, tmp_path / "out", bits=6, **asked)
    layers = made.fitted.layers
    assert {layer.option for layer in layers.values()} == {"w4g64", "w8g64"}
    for block in ("model.layers.0", "model.layers.1"):
        assert len({layers[f"{block}.self_attn.{n}_proj"].option for n in "qkv"}) == 1
    config = json.loads((tmp_path / "out" / "compressed-tensors" / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"].values()
    assert {(g["weights"]["num_bits"], g["weights"]["symmetric"]) for g in groups} == {(4, True), (8, True)}


def test_embedding_and_head_are_chosen_for_where_they_are_named(folder: Path, tmp_path: Path) -> None:
    steps = {**STEPS, "passes": [{"rtn": {"include": ["*_proj", "*embed_tokens*", "lm_head"]}}]}
    made = compress.fit(folder, tmp_path / "out", size="230KB", pipeline=steps, options=OPTIONS)
    assert {"model.embed_tokens", "lm_head"} < made.fitted.layers.keys()
    assert all(min(losses.values()) > 0 for losses in made.fitted.losses)
    assert (tmp_path / "out" / "compress.safetensors").stat().st_size <= 230_000


# --- what is refused --------------------------------------------------------------------------------------------------


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "give a budget, --size"),
    ({"size": "1GB", "bits": 3}, "not both"),
    ({"size": "1 potato"}, "'1 potato' is not a size"),
    ({"size": "0GB"}, "must be more than 0"),
    ({"bits": -1.0}, "must be more than 0"),
    ({"bits": float("nan")}, "must be more than 0"),
    ({"bits": 4, "work": "out.work"}, "give the sweep another folder"),
    ({"bits": 4, "groups": "row"}, "groups 'row': known are site, fused, block"),
    ({"bits": 4, "sensitivity": "guess"}, "known are kl, fisher, error"),
    ({"bits": 4, "options": ["w3g32"]}, "nothing to choose"),
    ({"bits": 4, "options": ["w3g32", "w3g32"]}, "w3g32: is given twice"),
    ({"bits": 4, "options": ["w3g32", "three"]}, "three: is not bits and group size"),
    ({"bits": 4, "options": ["w3g32", "w9g32"]}, "w9g32.bits: 9"),
    ({"bits": 4, "options": ["w3g32", {"bitts": 4}]}, "bitts=4.bitts: unknown option of gptq"),
    ({"bits": 4, "options": ["w3g32", "w4g48"]}, "group_size 48 does not divide its 64 columns"),
    ({"bits": 4, "runtime": "vllm", "options": ["w3g64", "w4g64"]}, "option w3g64: vllm runs 4 or 8 bits"),
    ({"bits": 4, "runtime": "tpu"}, "--for tpu: known are"),
    ({"bits": 4, "runtime": "vllm", "options": ["w4g64", {"bits": 8}]}, "options must be bits and columns"),
    ({"bits": 4, "passes": ["wanda"]}, "must be one quantizer"),
    ({"bits": 4, "passes": ["wanda", "gptq"]}, "there are wanda, gptq"),
    ({"bits": 4, "passes": [{"gptq": {"embeddings": "w8"}}]}, "embeddings: is what fit writes"),
    ({"bits": 4, "pipeline": {"passes": ["rtn"]}}, "calibration: is missing"),
]


@pytest.mark.parametrize(("options", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_what_cannot_be_is_refused_before_any_work(
    folder: Path, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    steps = {**STEPS, "passes": options.get("passes", STEPS["passes"])}
    asked = {name: value for name, value in options.items() if name != "passes"}
    asked |= {"work": tmp_path / asked["work"]} if "work" in asked else {}
    with pytest.raises(UsageError) as raised:
        compress.fit(folder, tmp_path / "out", **{"pipeline": steps, "options": OPTIONS, **asked})
    assert said in str(raised.value)
    assert not list(tmp_path.glob("out.fit/s00*"))


@pytest.mark.parametrize(
    ("budget", "unit"), [({"size": "300KB"}, r"takes (\d+) bytes"), ({"bits": 2.1}, r"takes (\d+\.\d+) bits")]
)
def test_an_impossible_budget_is_refused_with_the_smallest_possible_one(
    folder: Path, tmp_path: Path, budget: dict[str, Any], unit: str
) -> None:
    options: dict[str, Any] = {"pipeline": STEPS, "options": OPTIONS, "sensitivity": "error", "dry_run": True}
    with pytest.raises(UsageError) as raised:
        compress.fit(folder, tmp_path / "out", **budget, **options)
    found = re.search(unit, str(raised.value))
    assert found is not None
    assert not (tmp_path / "out.fit").exists(), "refused before the sweep"
    enough: dict[str, Any] = {"size": int(found[1])} if "size" in budget else {"bits": float(found[1])}
    assert compress.fit(folder, tmp_path / "out", **enough, **options).fitted.counts() == {"w2g32": 14}


@pytest.mark.parametrize("groups", ["site", "fused", "block"])
@pytest.mark.parametrize("budget", [{"size": "100MB"}, {"bits": 32}])
def test_a_budget_that_the_model_meets_as_it_is_leaves_nothing_to_do(
    folder: Path, tmp_path: Path, budget: dict[str, Any], groups: Any
) -> None:
    with pytest.raises(UsageError, match="there is nothing to do; give less"):
        compress.fit(folder, tmp_path / "out", **budget, groups=groups, pipeline=STEPS, options=OPTIONS)
    assert not (tmp_path / "out.fit").exists()


def test_a_model_too_large_for_memory_is_refused_with_the_measure_that_needs_less(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_memory, "available_memory", lambda: 1 << 20)
    with pytest.raises(ResourceError, match="sensitivity error needs one block at a time"):
        compress.fit(folder, tmp_path / "out", bits=4, pipeline=STEPS, options=OPTIONS, dry_run=True)


# --- what a user sees -------------------------------------------------------------------------------------------------


def test_the_command_says_what_was_chosen_and_runs_it(folder: Path, text: Path, tmp_path: Path) -> None:
    pipeline = tmp_path / "steps.yaml"
    pipeline.write_text(json.dumps({**STEPS, "evaluate": {"source": str(text), "samples": 2, "length": 32}}))
    base = (
        "fit",
        folder,
        "-o",
        tmp_path / "out",
        "--bits",
        "4",
        "--pipeline",
        pipeline,
        "--options",
        ",".join(OPTIONS),
    )
    ended = compress_command(*base, "--dry-run")
    assert ended.code == 0, ended.err
    assert "w2g32 everywhere: " in ended.out
    assert "perplexity" not in ended.out
    ended = compress_command(*base)
    assert ended.code == 0, ended.err
    assert "perplexity" in ended.out
    assert f"{tmp_path}/out.fit/pipeline.yaml" in ended.out
    again = compress_command("run", tmp_path / "out.fit" / "pipeline.yaml", folder, "-o", tmp_path / "again", "-q")
    assert again.code == 0, again.err
    same = [(tmp_path / name / "compress.safetensors").read_bytes() for name in ("out", "again")]
    assert same[0] == same[1]
    ended = compress_command(*base, "--dry-run", "--json")
    found = json.loads(ended.out)
    assert found["chosen"]["bits"] <= 4
    assert found["report"] is None


def test_the_command_refuses_what_cannot_be_with_exit_code_2(folder: Path, tmp_path: Path) -> None:
    ended = compress_command("fit", folder, "-o", tmp_path / "out")
    assert (ended.code, "give a budget, --size" in ended.err) == (2, True)
