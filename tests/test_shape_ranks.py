"""Passes that change a model all over, by several processes, and killed in the middle."""

import json
import os
import signal
from pathlib import Path

import pytest
from children import contents
from commands import make_text_model, write_text
from expert_models import make_mixture
from selection import only
from test_ranks import end, perplexities, run, said_by_both, start, wait_for

DATA = (
    "calibration: {source: words.txt, samples: 9, length: 32}\nevaluate: {source: words.txt, samples: 6, length: 64}\n"
)
EXPERTS = "passes: [{%s: {keep: 4}}, {gptq: {scheme: w4g16}}]\n"
# What is run, on which model, and a file that is there once the pass has done a part of its work.
PIPELINES = {
    "obs": (
        "passes: [{width_prune: {sparsity: 0.5}}, {gptq: {scheme: w4g16}}]\n",
        "dense",
        "s00-mlp-b0001.safetensors",
    ),
    "taylor": (
        "passes: [{perp: {steps: 2, train: [bias, lora], rank: 2, objective: next_token}},"
        " {width_prune: {sparsity: 0.5, score: taylor}}]\n",
        "dense",
        "s01-slopes.json",
    ),
    "transforms": (
        "passes: [{rotate: {}}, {smooth: {}}, {scale: {scheme: w4g16, steps: 4}}, {gptq: {scheme: w4g16}}]\n",
        "dense",
        "s01-b0000.safetensors",
    ),
    "expert_prune": (EXPERTS % "expert_prune", "mixture", "s00-routing.json"),
    "expert_merge": (EXPERTS % "expert_merge", "mixture", "s00-routing.json"),
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    make_text_model(folder / "dense", hidden_size=32, intermediate_size=64, num_key_value_heads=2, num_hidden_layers=2)
    make_text_model(folder / "mixture")
    vocabulary = json.loads((folder / "mixture" / "config.json").read_text())["vocab_size"]
    make_mixture("Qwen3Moe", vocab_size=vocabulary).save_pretrained(folder / "mixture")
    write_text(folder / "words.txt", words=3000)
    for name, (text, *_) in PIPELINES.items():
        (folder / f"{name}.yaml").write_text(DATA + text)
    return folder


def facts(folder: Path) -> dict[str, object]:
    report = json.loads((folder / "report.json").read_text())
    gone = [{n: layer["gone"] for n, layer in section["layers"].items()} for section in report["experts"]]
    return {"kept": [section["layers"] for section in report["width"]], "gone": gone}


@pytest.mark.slow
@pytest.mark.parametrize("name", only(["transforms"], PIPELINES))
def test_two_processes_make_what_one_makes_and_after_a_kill_the_same_bits(name: str, prepared: Path) -> None:
    _, model, file = PIPELINES[name]
    command = ["run", f"{name}.yaml", model, "-o"]
    assert run(prepared, [*command, f"{name}-alone"], 1) == [0]
    assert run(prepared, [*command, f"{name}-two"], 2) == [0, 0], said_by_both(prepared)
    alone, together = prepared / f"{name}-alone", prepared / f"{name}-two"
    assert facts(together) == facts(alone), "the same units go"
    assert perplexities(together) == pytest.approx(perplexities(alone), rel=5e-3)
    processes = start(prepared, [*command, f"{name}-killed"], 2)
    wait_for(prepared / f"{name}-killed.work" / file)
    assert processes[1].pid is not None
    os.kill(processes[1].pid, signal.SIGKILL)
    assert end(processes) == [1, -signal.SIGKILL]
    assert run(prepared, [*command, f"{name}-killed"], 2, apart=True) == [0, 0], said_by_both(prepared)
    assert contents(prepared / f"{name}-killed") == contents(together)
