"""Merging: the stage that makes one checkpoint of several, whatever the method."""

import itertools
import json
import re
import shutil
import signal
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from children import FILES, contents, prepare, run, unfinished
from commands import compress_command, make_changed, make_text_model, write_pipeline, write_text
from conftest import make_llama
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from selection import only
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

import compress
from compress import Average, TaskArithmetic
from compress.checkpoint import finite
from compress.checkpoint.sources import FolderSource
from compress.config.reading import parse
from compress.engine import block_stage
from compress.engine.merge import pieces
from compress.errors import ConfigError, DataError, MergeError, NonFiniteError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A tiny model and two others like it; to be read only."""
    folder = tmp_path_factory.mktemp("three")
    make_llama().save_pretrained(folder / "base")
    return [folder / "base", *(make_changed(folder / f"changed-{k}", folder / "base", k) for k in (1, 2))]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def others(three: list[Path]) -> list[str]:
    return [str(folder) for folder in three[1:]]


def merged(tmp_path: Path, model: Path, *passes: object) -> dict[str, Tensor]:
    """What a run leaves, as transformers loads it."""
    compress.run({"passes": list(passes)}, model, tmp_path / "out", overwrite=True)
    return dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict())


def refusal(model: Path, *passes: object) -> str:
    with pytest.raises(ConfigError) as caught:
        compress.run({"passes": list(passes)}, model, model.parent / "never")
    return str(caught.value)


def folder_of(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    return folder


# --- what is merged ---------------------------------------------------------------------------------------------------


def test_every_tensor_is_merged_and_everything_else_is_that_of_the_model(tmp_path: Path, three: list[Path]) -> None:
    found = merged(tmp_path, three[0], {"average": {"models": others(three)}})
    values = [weights(folder) for folder in three]
    assert found.keys() == values[0].keys()
    for name, value in found.items():
        assert torch.equal(value, torch.stack([v[name].float() for v in values]).sum(0) / 3), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 2


def test_in_memory_and_from_files_the_same_comes_out(tmp_path: Path, three: list[Path]) -> None:
    found = merged(tmp_path, three[0], {"average": {"models": others(three), "weights": [1.0, 2.0, 0.5]}})
    model = LlamaForCausalLM.from_pretrained(three[0])
    made = compress.apply(model, [Average(models=tuple(others(three)), weights=(1.0, 2.0, 0.5))]).model.state_dict()
    assert all(torch.equal(value, made[name]) for name, value in found.items())
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in weights(three[0]).items()), "changes what it is given"


def test_patterns_on_names_of_tensors_choose_what_is_merged(tmp_path: Path, three: list[Path]) -> None:
    options = {"models": others(three), "include": ["*.mlp.*"], "exclude": ["*.1.*"]}
    found, before = merged(tmp_path, three[0], {"average": options}), weights(three[0])
    changed = {name for name, value in found.items() if not torch.equal(value, before[name])}
    assert changed == {f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}


def test_overrides_change_options_where_a_name_matches(tmp_path: Path, three: list[Path]) -> None:
    override = {"match": "*norm*", "weights": [1.0, 0.0, 0.0]}
    found = merged(tmp_path, three[0], {"average": {"models": others(three), "overrides": [override]}})
    before = weights(three[0])
    assert {name for name, v in found.items() if torch.equal(v, before[name])} == {n for n in before if "norm" in n}


def test_values_over_depth_run_in_a_straight_line_from_the_first_block_to_the_last(tmp_path: Path) -> None:
    make_llama(num_hidden_layers=3).save_pretrained(tmp_path / "base")
    other = make_changed(tmp_path / "other", tmp_path / "base", 1)
    options = {"models": [str(other)], "weights": [[1.0, 0.0], [0.0, 1.0]]}
    found = merged(tmp_path, tmp_path / "base", {"average": options})
    a, b = weights(tmp_path / "base"), weights(other)
    for block, share in enumerate((0.0, 0.5, 1.0)):
        name = f"model.layers.{block}.mlp.up_proj.weight"
        assert torch.allclose(found[name], (1 - share) * a[name] + share * b[name], atol=1e-7)
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(found[name], a[name]), "outside the blocks the first value holds"


def test_the_last_pattern_that_matches_gives_a_value(tmp_path: Path, three: list[Path]) -> None:
    only = [{"match": "*", "value": 0.0}, {"match": "*mlp*", "value": 2.0}, {"match": "*up_proj*", "value": [1, 3]}]
    options = {"models": others(three)[:1], "weights": [1.0, only]}
    found = merged(tmp_path, three[0], {"average": options})
    a, b = (weights(folder) for folder in three[:2])
    for name, weight in (("self_attn.q_proj", 0.0), ("mlp.down_proj", 2.0), ("mlp.up_proj", 3.0)):
        name = f"model.layers.1.{name}.weight"
        assert torch.allclose(found[name], (a[name] + weight * b[name]) / (1 + weight), atol=1e-7)


def test_a_merge_of_a_merge_begins_with_the_merged_model(tmp_path: Path, three: list[Path]) -> None:
    first, second = ({"average": {"models": [other]}} for other in others(three))
    found = merged(tmp_path, three[0], first, second)
    a, b, c = (weights(folder) for folder in three)
    for name, value in found.items():
        assert torch.allclose(value, a[name] / 4 + b[name] / 4 + c[name] / 2, atol=1e-7)


def test_later_passes_work_on_the_merged_model_and_compare_with_it(tmp_path: Path, three: list[Path]) -> None:
    merge = {"average": {"models": others(three)}}
    mean = merged(tmp_path, three[0], merge)
    make_llama().save_pretrained(tmp_path / "mean")
    save_file({n: v.contiguous() for n, v in mean.items()}, tmp_path / "mean" / "model.safetensors", {"format": "pt"})
    tokens = torch.randint(256, (4, 32), generator=torch.Generator().manual_seed(1))
    compressing = [{"gptq": {"bits": 3}}, {"eora": {"rank": 4}}]
    for model, passes, out in ((three[0], [merge, *compressing], "a"), (tmp_path / "mean", compressing, "b")):
        compress.run({"passes": passes}, model, tmp_path / out, calibration=tokens)
    found, expected = (load_file(tmp_path / out / "compress.safetensors") for out in ("a", "b"))
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_the_first_row_and_the_divergence_are_those_of_the_model_the_pipeline_is_run_on(tmp_path: Path) -> None:
    base = make_text_model(tmp_path / "base")
    other = make_changed(tmp_path / "other", base, 1, size=3e-2)
    text = write_text(tmp_path / "words.txt")
    section = {"source": str(text), "samples": 4, "length": 32}
    merge = {"average": {"models": [str(other)], "weights": [0.0, 1.0]}}
    report = compress.run({"passes": [merge], "evaluate": section}, base, tmp_path / "out")
    tokens = compress.load_tokens(
        str(text), AutoTokenizer.from_pretrained(base), samples=4, length=32, split="evaluation"
    )
    a, b = (AutoModelForCausalLM.from_pretrained(folder) for folder in (base, other))
    found = compress.evaluate(b, tokens, against=a)
    start, parent, row = report.rows
    assert (parent.name, parent.perplexity, parent.kl) == (str(other), row.perplexity, row.kl)
    assert start.perplexity == pytest.approx(compress.evaluate(a, tokens).perplexity)
    assert row.perplexity == pytest.approx(found.perplexity)
    assert row.kl == pytest.approx(found.kl)
    assert row.kl > 0
    assert (row.bytes, row.bits_per_weight) == (start.bytes, start.bits_per_weight)
    against = {str(other): {"": 0.0}}
    assert report.merged == [{"pass": "average", "models": [str(other)], "tensors": 21, "against": against}]
    assert f"average merged it with {other}" in (tmp_path / "out" / "README.md").read_text()


def test_a_negative_variance_is_refused_and_its_statistics_can_be_left_out(tmp_path: Path) -> None:
    base, other = Normed().eval(), Normed().eval()
    other.layers[1].running_var.fill_(3.0)
    (tmp_path / "other").mkdir()
    save_file(other.state_dict(), tmp_path / "other" / "model.safetensors")
    models = (str(tmp_path / "other"),)
    away = {"models": models, "scale": -1.0}
    with pytest.raises(
        MergeError, match=r"layers\.1\.running_var is -1 after task_arithmetic.*`exclude` \*\.running_\*"
    ):
        compress.apply(base, [TaskArithmetic(**away)])
    kept = compress.apply(base, [TaskArithmetic(**away, exclude=("*.running_*",))]).model.state_dict()
    assert torch.equal(kept["layers.1.running_var"], torch.ones(8))
    mean = compress.apply(base, [Average(models=models)]).model.state_dict()
    assert torch.equal(mean["layers.1.running_var"], torch.full((8,), 2.0))


def test_the_first_layers_are_those_that_the_model_lists_first(tmp_path: Path, three: list[Path]) -> None:
    found = merged(tmp_path, three[0], {"robust_signature": {"models": others(three), "layers": 7}})
    standard = weights(three[1])
    same = {name for name, value in found.items() if torch.equal(value, standard[name])}
    first = {name for name in found if name == "model.embed_tokens.weight" or name.startswith("model.layers.0.")}
    assert same == found.keys() - first


# --- the checkpoint ---------------------------------------------------------------------------------------------------


def test_tied_tensors_are_merged_once_and_stay_tied(tmp_path: Path) -> None:
    base = folder_of(tmp_path / "base", make_llama(tie_word_embeddings=True))
    other = make_changed(tmp_path / "other", base, 1)
    found = merged(tmp_path, base, {"average": {"models": [str(other)]}})
    mean = (weights(base)["model.embed_tokens.weight"] + weights(other)["model.embed_tokens.weight"]) / 2
    assert torch.equal(found["model.embed_tokens.weight"], mean)
    assert torch.equal(found["lm_head.weight"], mean)
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "compress.safetensors")
    model = AutoModelForCausalLM.from_pretrained(base)
    made = compress.apply(model, [Average(models=(str(other),))]).model
    assert made.lm_head.weight is made.model.embed_tokens.weight
    assert torch.equal(made.lm_head.weight, mean)


def test_a_head_of_its_own_that_would_be_lost_is_refused(tmp_path: Path, three: list[Path]) -> None:
    tied = folder_of(tmp_path / "tied", make_llama(tie_word_embeddings=True))
    said = refusal(tied, {"average": {"models": others(three)[:1]}})
    assert "has a lm_head.weight of its own, which the base ties to model.embed_tokens.weight" in said
    found = merged(tmp_path, three[0], {"average": {"models": [str(tied)], "weights": [0.0, 1.0]}})
    assert torch.equal(found["lm_head.weight"], weights(tied)["model.embed_tokens.weight"])


class Normed(nn.Module):
    """A module of its own class, with running means and a count of batches."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_whole_numbers_are_the_bases_and_running_means_are_merged(tmp_path: Path) -> None:
    base, other = Normed().eval(), Normed().eval()
    norm = other.layers[1]
    assert isinstance(norm.running_mean, Tensor)
    assert isinstance(norm.num_batches_tracked, Tensor)
    norm.running_mean += 1
    norm.num_batches_tracked += 5
    (tmp_path / "other").mkdir()
    save_file(other.state_dict(), tmp_path / "other" / "model.safetensors")
    found = compress.apply(base, [Average(models=(str(tmp_path / "other"),))]).model.state_dict()
    assert found["layers.1.num_batches_tracked"] == 0
    assert torch.equal(found["layers.1.running_mean"], torch.full((8,), 0.5))
    assert torch.equal(found["layers.0.weight"], (base.layers[0].weight + other.layers[0].weight) / 2)


def test_the_type_of_the_model_is_kept_whatever_the_others_have(tmp_path: Path, three: list[Path]) -> None:
    base = folder_of(tmp_path / "half", make_llama().bfloat16())
    found = merged(tmp_path, base, {"average": {"models": others(three)}})
    name = "model.layers.0.mlp.up_proj.weight"
    values = [weights(folder)[name].float() for folder in (base, *three[1:])]
    assert found[name].dtype == torch.bfloat16
    assert torch.equal(found[name], (sum(values) / 3).bfloat16())


def test_a_model_in_shards_is_read_like_any_other(tmp_path: Path, three: list[Path]) -> None:
    LlamaForCausalLM.from_pretrained(three[1]).save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    whole, shards = (
        merged(tmp_path, three[0], {"average": {"models": [str(m)]}}) for m in (three[1], tmp_path / "shards")
    )
    assert all(torch.equal(whole[name], shards[name]) for name in whole)


def test_weights_that_are_stored_transposed_are_merged_as_they_are(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32)
    base = folder_of(tmp_path / "base", GPT2LMHeadModel(config))
    other = make_changed(tmp_path / "other", base, 1)
    found = merged(tmp_path, base, {"average": {"models": [str(other)]}})
    for name, value in weights(base).items():
        assert torch.equal(found[name], (value + weights(other)[name]) / 2)


# --- vocabularies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [250, 300])
def test_vocabularies_of_different_size_are_refused_or_merged_in_the_rows_all_have(
    rows: int, tmp_path: Path, three: list[Path]
) -> None:
    other = folder_of(tmp_path / "other", make_llama(vocab_size=rows))
    said = refusal(three[0], {"average": {"models": [str(other)]}})
    assert f"{other} has {rows} rows in model.embed_tokens.weight and the base 256" in said
    assert "vocabulary: common" in said
    found = merged(tmp_path, three[0], {"average": {"models": [str(other)], "vocabulary": "common"}})
    a, b, both = weights(three[0]), weights(other), min(rows, 256)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(found[name][:both], (a[name][:both] + b[name][:both]) / 2)
        assert torch.equal(found[name][both:], a[name][both:])


# --- refused before any work ------------------------------------------------------------------------------------------


def test_models_that_do_not_fit_are_all_refused_at_once(tmp_path: Path, three: list[Path]) -> None:
    wide = folder_of(tmp_path / "wide", make_llama(intermediate_size=192))
    deep = folder_of(tmp_path / "deep", make_llama(num_hidden_layers=3))
    gpt2 = folder_of(tmp_path / "gpt2", GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2)))
    there = [str(p) for p in (wide, deep, gpt2, tmp_path / "nowhere")]
    pipeline = write_pipeline(tmp_path / "p.yaml", f"passes:\n  - average:\n      models: {there}\n")
    for command in ("run", "check", "plan"):
        ended = compress_command(command, pipeline, three[0], *(["-o", tmp_path / "out"] if command == "run" else []))
        assert ended.code == 2
        shapes = f"model.layers.0.mlp.gate_proj.weight has shape (192, 64) in {wide} and (128, 64) in the base"
        assert f"p.yaml:3: passes[0].average.models[0]: {shapes}" in ended.err
        assert f"{deep} has 3 blocks and the base 2" in ended.err
        assert f"{gpt2} is a GPT2LMHeadModel and the base is a LlamaForCausalLM" in ended.err
        assert "models[3]: no such folder" in ended.err
    assert not (tmp_path / "out.work").exists()


OTHER_MEANING: dict[str, tuple[dict[str, Any], str]] = {
    "rope": ({"rope_theta": 500000.0}, "rope_theta (10000.0 in the base, 500000.0 here)"),
    "scaled rope": (
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
        "rope_type ('default' in the base, 'linear' here)",
    ),
    "heads of the same shape": (
        {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8},
        "num_attention_heads (4 in the base, 8 here)",
    ),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act ('silu' in the base, 'gelu' here)"),
    "another norm": ({"rms_norm_eps": 1e-3}, "rms_norm_eps (1e-06 in the base, 0.001 here)"),
}


@pytest.mark.parametrize(
    ("changes", "said"),
    only([OTHER_MEANING["scaled rope"], OTHER_MEANING["another norm"]], OTHER_MEANING.values()),
    ids=OTHER_MEANING.keys(),
)
def test_models_that_fit_but_mean_something_else_are_refused_or_accepted_by_name(
    changes: dict[str, Any], said: str, tmp_path: Path, three: list[Path]
) -> None:
    other = folder_of(tmp_path / "other", make_llama(**changes))
    merge: dict[str, Any] = {"models": [*others(three), str(other)]}
    refused = refusal(three[0], {"average": merge})
    assert f"passes[0].average.models[2]: {other} differs from the base in " in refused
    assert said in refused
    with pytest.raises(ConfigError, match="differs from the base"):
        compress.apply(make_llama(), [Average(models=(str(other),))])
    fields = re.findall(r"accept: \[(.*?)\]", refused)[0]
    accepted = [name.rpartition(".")[2] for name in fields.split(", ")]
    assert merged(tmp_path, three[0], {"average": {**merge, "accept": accepted}})


def test_what_changes_nothing_that_is_computed_may_differ(tmp_path: Path, three: list[Path]) -> None:
    other = Path(shutil.copytree(three[1], tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    config |= {"max_position_embeddings": 4096, "use_cache": False, "attention_dropout": 0.1, "bos_token_id": 3}
    config |= {"unsloth_version": "1", "_name_or_path": "a/b", "transformers_version": "4.1.0", "dtype": "bfloat16"}
    (other / "config.json").write_text(json.dumps(config))
    assert merged(tmp_path, three[0], {"average": {"models": [str(other)]}})


def test_what_is_accepted_must_differ(three: list[Path]) -> None:
    said = refusal(three[0], {"average": {"models": others(three), "accept": ["rope_teta"]}})
    assert "passes[0].average.accept: rope_teta: no model differs from the base in it; they differ in nothing" in said


def test_a_tokenizer_that_numbers_tokens_otherwise_is_refused_unless_no_row_is_merged(tmp_path: Path) -> None:
    base = make_text_model(tmp_path / "base")
    other = make_changed(tmp_path / "other", base, 1)
    shutil.copy(base / "tokenizer.json", other / "tokenizer.json")
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[10:12]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer, indent=1))
    merge: dict[str, Any] = {"models": [str(other)]}
    said = refusal(base, {"average": merge})
    assert f"tokenizer ({first!r} as token " in said
    assert f"{second!r} and 1 more here)" in said
    assert merged(tmp_path, base, {"average": {**merge, "accept": ["tokenizer"]}})
    assert merged(tmp_path, base, {"average": {**merge, "exclude": ["*embed_tokens*", "lm_head*"]}})
    tokenizer["model"]["vocab"] = {**vocabulary, first: vocabulary[second], second: vocabulary[first]}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert merged(tmp_path, base, {"average": merge}), "the same, written otherwise"


def test_a_merge_that_goes_by_the_loss_is_not_judged_on_single_tokens(tmp_path: Path, three: list[Path]) -> None:
    merge = {"slerp": {"models": others(three)[:1], "choose": {"t": [0.5]}}}
    with pytest.raises(DataError, match="at least two tokens"):
        compress.run({"passes": [merge]}, three[0], tmp_path / "out", calibration=torch.ones(4, 1, dtype=torch.long))


def test_a_parameter_that_the_others_lack_is_refused(tmp_path: Path, three: list[Path]) -> None:
    base = folder_of(tmp_path / "base", make_llama(attention_bias=True))
    said = refusal(base, {"average": {"models": others(three)[:1]}})
    assert "has no model.layers.0.self_attn.q_proj.bias, which the base has" in said
    assert merged(tmp_path, base, {"average": {"models": others(three)[:1], "exclude": ["*.bias"]}})


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("average", "models: no model to merge with"),
        ("average: {models: [a], weights: [1, 2, 3]}", "weights: 3 values for 2 models"),
        ("average: {models: [a], weights: heavy}", "'heavy' is not a number or a list of {match: pattern"),
        ("average: {models: [a], weights: [{match: 3, value: 1}]}", "is not a number or a list of {match"),
        ("average: {models: [a], weights: 0}", "all are zero"),
        ("average: {models: [a], overrides: [{match: '*', models: [b]}]}", "models: is the same for every tensor"),
    ],
)
def test_an_impossible_option_is_refused_with_its_place(entry: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(f"passes:\n  - {entry}\n")
    assert said in str(caught.value)
    assert "pipeline:2: passes[0].average" in str(caught.value)


@pytest.mark.parametrize("options", [{"include": ["*.conv"]}, {"weights": [1.0, [{"match": "conv*", "value": 1.0}]]}])
def test_a_pattern_that_matches_no_tensor_is_an_error(options: dict[str, Any], three: list[Path]) -> None:
    said = refusal(three[0], {"average": {"models": others(three)[:1], **options}})
    assert "matches no tensor; tensors are named like model.embed_tokens.weight" in said


def test_merging_comes_before_every_other_pass_and_alone(three: list[Path]) -> None:
    merge = {"average": {"models": others(three)}}
    assert "average merges whole checkpoints, before anything else; put it before rtn" in refusal(
        three[0], {"rtn": {}}, merge
    )
    assert "cannot be fused" in refusal(three[0], {"blockwise": [merge, {"rtn": {}}]})


def test_what_is_not_finite_is_named_with_the_model_it_comes_from(tmp_path: Path, three: list[Path]) -> None:
    other = shutil.copytree(three[1], tmp_path / "other")
    values = weights(other)
    values["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.inf
    save_file(values, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.up_proj.*as it does in .*other"):
        compress.run({"passes": [{"average": {"models": [str(other)]}}]}, three[0], tmp_path / "out")
    huge = {"average": {"models": others(three), "weights": 3e38, "normalize": False}}
    with pytest.raises(NonFiniteError, match="too large for float32"):
        compress.run({"passes": [huge]}, three[0], tmp_path / "out2")


# --- plan -------------------------------------------------------------------------------------------------------------


def test_the_plan_says_with_what_it_is_merged_and_counts_the_merged_checkpoint(
    tmp_path: Path, three: list[Path]
) -> None:
    pipeline = write_pipeline(tmp_path / "p.yaml", f"passes: [average: {{models: {others(three)}}}, rtn: {{bits: 4}}]")
    ended = compress_command("plan", pipeline, three[0], "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert found["passes"][0]["becomes"] == f"merged with {', '.join(others(three))}"
    assert found["passes"][1]["becomes"] == "quantized"
    alone = json.loads(
        compress_command(
            "plan", write_pipeline(tmp_path / "r.yaml", "passes: [rtn: {bits: 4}]"), three[0], "--json"
        ).out
    )
    assert found["original_bytes"] <= found["disk"] - alone["disk"] < 1.1 * found["original_bytes"]  # and a header
    assert found["final_bytes"] == alone["final_bytes"]


@pytest.mark.parametrize("links", [True, False])
def test_a_merge_alone_is_written_once_where_the_disk_has_links(
    links: bool, tmp_path: Path, three: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise OSError("no links here")

    pipeline = {"passes": [{"average": {"models": others(three)}}]}
    compress.run(pipeline, three[0], tmp_path / "linked")
    if not links:
        monkeypatch.setattr(Path, "hardlink_to", refused)
    compress.run(pipeline, three[0], tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "linked")
    assert not (tmp_path / "out.work").exists()


# --- streaming, resuming ----------------------------------------------------------------------------------------------


def test_a_few_pieces_of_one_tensor_are_in_memory_whatever_the_models_size(
    tmp_path: Path, three: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (pieces, finite):
        monkeypatch.setattr(module, "PIECE", 1000)
    alive: set[int] = set()
    numbers = itertools.count()
    most = 0
    read = FolderSource.piece

    def counted(source: FolderSource, name: str, start: int, stop: int) -> Tensor:
        nonlocal most
        assert stop - start <= 1000
        value = read(source, name, start, stop)
        number = next(numbers)
        alive.add(number)
        most = max(most, len(alive))
        weakref.finalize(value, alive.discard, number)
        return value

    small = merged(tmp_path, three[0], {"average": {"models": others(three)}})
    monkeypatch.setattr(FolderSource, "piece", counted)
    whole = merged(tmp_path, three[0], {"average": {"models": others(three)}})
    assert 0 < most <= 6
    assert all(torch.equal(small[name], whole[name]) for name in small)


MERGING = """\
calibration: {source: calibration.txt, samples: 4, length: 32}
evaluate: {source: calibration.txt, samples: 2, length: 32}
passes:
  - average: {models: [other], weights: [0.5, 1]}
  - average: {models: [other, third]}
  - gptq: {scheme: w4g32}
"""


@FILES
def test_killed_again_and_again_the_run_ends_bit_identical_and_merges_nothing_twice(files: int, tmp_path: Path) -> None:
    whole, killed = prepare(tmp_path, MERGING)
    for seed, name in enumerate(("other", "third")):
        other = make_changed(tmp_path / f"{name}-model", tmp_path / "model", seed)
        for folder in (whole, killed):
            (folder / name).symlink_to(other)
    assert run(whole, "model") == 0
    done: dict[str, int] = {}
    while (code := run(killed, "model", kill_after=files)) == -signal.SIGKILL:
        assert not (killed / "out").exists()
        found = {name: at for name, at in unfinished(killed).items() if name != "out"}
        assert found.items() >= done.items(), "what was finished is done again"
        if found == done:
            break
        done = found
    assert len([name for name in done if "-merged-" in name]) == 2
    assert code == 0 or run(killed, "model") == 0
    assert contents(killed / "out") == contents(whole / "out")


def test_an_unfinished_or_damaged_merge_is_made_again(
    tmp_path: Path, three: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = {"passes": [{"average": {"models": others(three)}}, {"rtn": {"bits": 4}}]}
    expected = compress.run(pipeline, three[0], tmp_path / "whole")

    def stop(*_: Any) -> None:
        raise RuntimeError("stopped")

    with monkeypatch.context() as patched:
        patched.setattr(block_stage, "run_passes", stop)
        with pytest.raises(RuntimeError, match="stopped"):
            compress.run(pipeline, three[0], tmp_path / "out")
    (file,) = (tmp_path / "out.work").glob("s00-merged-*")
    file.write_bytes(file.read_bytes()[:-50])
    compress.run(pipeline, three[0], tmp_path / "out")
    assert len(expected.rows) == 3
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_changed_parent_is_another_run(tmp_path: Path, three: list[Path]) -> None:
    other = Path(shutil.copytree(three[1], tmp_path / "other"))
    pipeline = {"passes": [{"average": {"models": [str(other)]}}]}
    compress.run(pipeline, three[0], tmp_path / "out")
    assert compress.run(pipeline, three[0], tmp_path / "out").rows
    values = weights(other)
    save_file({n: v + 1 for n, v in values.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(compress.UsageError, match="not the result of this run"):
        compress.run(pipeline, three[0], tmp_path / "out")


def test_tied_embeddings_stay_one_after_the_model_was_measured(tmp_path: Path) -> None:
    base = make_llama(tie_word_embeddings=True)
    for name in ("base", "tuned"):
        base.save_pretrained(tmp_path / name)
        base.lm_head.weight.data += 0.01
    tokens = torch.randint(256, (2, 16))
    steps = {"passes": [{"dare": {"models": [str(tmp_path / "tuned")], "density": 0.5}}]}
    report = compress.run(steps, tmp_path / "base", tmp_path / "out", evaluation=tokens)  # measured before it is merged
    assert report.verified["max_logit_difference"] == 0
    with safe_open(tmp_path / "out" / "compress.safetensors", "pt") as file:
        assert len({"lm_head.weight", "model.embed_tokens.weight"} & set(file.keys())) == 1
