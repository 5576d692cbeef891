"""mergekit configurations written as pipelines."""

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
    assert "# layer_range [0, 32] was taken for all blocks" in found.text


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
    made = {name: converted(tmp_path, plain % name)[1] for name in ("task_arithmetic", "ties", "dare_linear")}
    task = compress.TaskArithmetic(models=("a",), weights=(1.0,), scale=1.0, combine="sum")
    assert made["task_arithmetic"] == task
    assert (made["ties"].density, made["ties"].combine, made["ties"].scope) == ((1.0,), "mean", "tensor")
    assert (made["dare_linear"].rescale, made["dare_linear"].combine) == ("l1", "sum")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"merge_method": "model_stock"}, "merge_method: model_stock is not one of those that are known here: linear"),
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
