"""mergekit configurations written as pipelines."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import compress_command, make_changed
from conftest import make_llama

import compress
from compress.config.mergekit import Converted, convert
from compress.config.reading import parse
from compress.errors import ConfigError
from compress.passes import Pass
from compress.passes.merge.schedules import Matched


def converted(tmp_path: Path, text: str) -> tuple[Converted, Pass]:
    file = tmp_path / "merge.yaml"
    file.write_text(text)
    found = convert(file)
    ((pass_,),) = parse(found.text).passes
    return found, pass_


LINEAR = """
merge_method: linear
models:
  - {model: org/a, parameters: {weight: 1.0}}
  - {model: org/b, parameters: {weight: 0.3}}
parameters: {normalize: false}
dtype: float16
"""

SLERP = """
slices:
  - sources:
      - {model: org/a, layer_range: [0, 32]}
      - {model: org/b, layer_range: [0, 32]}
merge_method: slerp
base_model: org/a
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0]}
    - value: 0.5
"""

TIES = """
merge_method: ties
base_model: org/base
models:
  - model: org/base
  - {model: org/a, parameters: {density: [1, 0.7, 0.1], weight: 1.0}}
  - {model: org/b, parameters: {density: 0.33, weight: [{filter: mlp, value: 0.5}, {value: 0}]}}
parameters: {normalize: true, int8_mask: true}
"""

DARE = """
merge_method: dare_ties
base_model: org/base
models: [{model: org/a}, {model: org/b, parameters: {weight: 0.4, density: 0.5}}]
parameters: {weight: 1, lambda: 0.7}
"""


def test_a_linear_merge_keeps_weights_and_normalisation(tmp_path: Path) -> None:
    found, pass_ = converted(tmp_path, LINEAR)
    assert found.model == "org/a"
    assert pass_ == compress.Average(models=("org/b",), weights=(1.0, 0.3), normalize=False)
    assert "# dtype float16: pipelines merge in float32" in found.text


def test_filters_become_patterns_of_which_the_last_match_wins(tmp_path: Path) -> None:
    found, pass_ = converted(tmp_path, SLERP)
    t = (Matched("*", 0.5), Matched("*mlp*", (1.0, 0.0)), Matched("*self_attn*", (0.0, 0.5, 0.3, 0.7, 1.0)))
    assert pass_ == compress.Slerp(models=("org/b",), t=t)
    assert "# layer_range [0, 32] is taken for all blocks" in found.text


def test_settings_of_each_model_go_before_those_for_all_and_the_base_is_no_task(tmp_path: Path) -> None:
    found, pass_ = converted(tmp_path, TIES)
    weights = (1.0, (Matched("*", 0.0), Matched("*mlp*", 0.5)))
    density = ((1.0, 0.7, 0.1), 0.33)
    assert found.model == "org/base"
    assert pass_ == compress.Ties(models=("org/a", "org/b"), weights=weights, density=density, tie="positive")
    _, pass_ = converted(tmp_path, DARE)
    options = {"merge": "ties", "rescale": "l1", "tie": "positive", "scale": 0.7}
    assert pass_ == compress.Dare(models=("org/a", "org/b"), weights=(1.0, 0.4), density=(1.0, 0.5), **options)


def test_the_defaults_are_mergekits(tmp_path: Path) -> None:
    plain = "{base_model: b, models: [{model: a}], parameters: {weight: 1}, merge_method: %s}"
    methods = ("task_arithmetic", "ties", "dare_linear", "breadcrumbs", "breadcrumbs_ties", "della", "della_linear")
    made = {name: converted(tmp_path, plain % name)[1] for name in methods}
    task = compress.TaskArithmetic(models=("a",), weights=(1.0,), scale=1.0, combine="sum")
    assert made["task_arithmetic"] == task
    assert (made["ties"].density, made["ties"].combine, made["ties"].scope) == ((1.0,), "mean", "tensor")
    assert (made["dare_linear"].rescale, made["dare_linear"].combine) == ("l1", "sum")
    crumbs = compress.Breadcrumbs(models=("a",), weights=(1.0,), density=(1.0,), gamma=(0.01,))
    assert made["breadcrumbs"] == crumbs
    assert made["breadcrumbs_ties"] == replace(crumbs, merge="ties", tie="positive")
    della = compress.Della(models=("a",), weights=(1.0,), density=(1.0,), epsilon=0.15, rescale="l1")
    assert made["della"] == replace(della, combine="mean", tie="positive")
    assert made["della_linear"] == replace(della, merge="linear")


def test_methods_of_several_models_and_of_two(tmp_path: Path) -> None:
    models = "models: [{model: a, parameters: {weight: 3}}, {model: b, parameters: {weight: 1}}]"
    stock = converted(tmp_path, "{merge_method: model_stock, base_model: z, models: [{model: a}, {model: b}]}")
    assert (stock[0].model, stock[1]) == ("z", compress.ModelStock(models=("a", "b")))
    based = converted(tmp_path, f"{{merge_method: nuslerp, base_model: z, random_seed: 7, {models}}}")
    assert based[1] == compress.Nuslerp(models=("a", "b"), weights=(3.0, 1.0))
    assert parse(based[0].text).seed == 7
    alone = converted(tmp_path, f"{{merge_method: nuslerp, {models}}}")
    assert (alone[0].model, alone[1]) == ("a", compress.Slerp(models=("b",), t=0.25, straight=1.0))


def test_a_part_of_a_model_is_never_taken_for_the_whole(tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path / "model")
    other = make_changed(tmp_path / "other", tmp_path / "model", 1)

    def text(last: int) -> str:
        sources = [{"model": str(m), "layer_range": [0, last]} for m in (tmp_path / "model", other)]
        base = {"merge_method": "slerp", "base_model": str(tmp_path / "model"), "parameters": {"t": 0.5}}
        return yaml.dump({**base, "slices": [{"sources": sources}]})

    count = make_llama().config.num_hidden_layers
    assert converted(tmp_path, text(count))[0].notes == ()
    with pytest.raises(ConfigError, match=rf"is a part of .*, which has {count} blocks, .* add layer_drop"):
        converted(tmp_path, text(count - 1))
    (tmp_path / "hub.yaml").write_text(SLERP)
    ended = compress_command("init", tmp_path / "p.yaml", "--from-mergekit", tmp_path / "hub.yaml")
    assert ended.code == 0, ended.err
    assert "layer_range [0, 32] is taken for all blocks of the models" in ended.err


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"merge_method": "sce"}, "merge_method: sce is not one of those that are known here: linear"),
        ({"merge_method": "passthrough"}, "merge_method: passthrough stacks layers, and pipelines merge whole models"),
        ({"merge_method": "model_stock", "parameters": {"filter_wise": True}}, "parameters.filter_wise: angles here"),
        ({"merge_method": "nuslerp"}, "nuslerp merges two models beside its base; 1 are named"),
        ({"random_seed": -1}, "random_seed: -1 is not a whole number"),
        ({"chat_template": "chatml"}, "chat_template: pipelines keep that of the model"),
        ({"tokenizer_source": "union"}, "tokenizer_source: pipelines keep the tokenizer"),
        ({"base_model": None}, "base_model: ties needs one"),
        ({"modules": {}}, "modules: has no place in a pipeline"),
        ({"parameters": {"epsilon": 0.1, "weight": 1}}, "parameters.epsilon: is not known of ties"),
        ({"parameters": {}}, "parameters.weight: is missing for a model"),
        ({"parameters": {"weight": [{"filter": "mlp", "value": 1}]}}, "parameters.weight: has filters only"),
        ({"parameters": {"weight": "heavy"}}, "'heavy' is not a number or a list of numbers"),
        ({"parameters": {"weight": 1, "rescale": True}}, "ties does not rescale what it keeps"),
        ({"models": None, "slices": [{"sources": []}, {"sources": []}]}, "slices: layers of different models cannot"),
        ({"models": None}, "models: must be a list"),
        (
            {"models": None, "slices": [{"sources": [{"model": "a", "layer_range": [4, 8]}]}]},
            "slices[0]: pipelines merge whole models; layer_range [[4, 8]] is a part",
        ),
    ],
)
def test_what_a_pipeline_cannot_express_is_an_error_that_says_so(
    changed: dict[str, Any], said: str, tmp_path: Path
) -> None:
    data = {"merge_method": "ties", "base_model": "b", "models": [{"model": "a"}], "parameters": {"weight": 1}}
    (tmp_path / "merge.yaml").write_text(yaml.dump({k: v for k, v in (data | changed).items() if v is not None}))
    with pytest.raises(ConfigError) as caught:
        convert(tmp_path / "merge.yaml")
    assert said in str(caught.value)


def test_init_writes_a_pipeline_that_runs(tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path / "base")
    other = make_changed(tmp_path / "other", tmp_path / "base", 1)
    (tmp_path / "merge.yaml").write_text(TIES.replace("org/base", str(tmp_path / "base")).replace("org/a", str(other)))
    text = (tmp_path / "merge.yaml").read_text().replace("org/b", str(other))
    (tmp_path / "merge.yaml").write_text(text)
    ended = compress_command("init", tmp_path / "p.yaml", "--from-mergekit", tmp_path / "merge.yaml")
    assert ended.code == 0, ended.err
    assert (tmp_path / "p.yaml").read_text().startswith("# yaml-language-server: $schema=compress.schema.json\n")
    assert f"compress run {tmp_path / 'p.yaml'} {tmp_path / 'base'} -o OUT" in ended.out
    ended = compress_command("run", tmp_path / "p.yaml", tmp_path / "base", "-o", tmp_path / "out")
    assert ended.code == 0, ended.err
    ended = compress_command("init", tmp_path / "q.yaml", "--from-mergekit", tmp_path / "nowhere.yaml")
    assert ended.code == 2
    assert "cannot read" in ended.err
