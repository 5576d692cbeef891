"""`compress eval --task`: tasks of lm-evaluation-harness, refused before any work where they cannot be run."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from commands import compress_command, make_text_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress.report.sentences import evaluation_lines

TASK = """\
task: words
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: choices
target_delimiter: " "
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
QUESTIONS = [
    {"question": "the list", "choices": ["of a value", "string return"], "answer": 0},
    {"question": "return the", "choices": ["path", "with"], "answer": 1},
    {"question": "a string", "choices": ["value", "of the list"], "answer": 1},
]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--task-folder", "."), "--task-folder holds tasks, and none is named; give --task"),
        (("--task", "words", "--runtime", "onnxruntime"), "--task is for one process that runs transformers"),
    ],
)
def test_what_no_task_can_be_run_with_is_refused(options: tuple[str, ...], said: str) -> None:
    ended = compress_command("eval", "nowhere", *options)
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.err


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="the library is installed")
def test_without_the_library_it_is_said_how_to_get_it_before_a_model_is_looked_for() -> None:
    ended = compress_command("eval", "nowhere", "--task", "words")
    assert (ended.code, ended.out) == (2, "")
    assert "--task: the Python package lm_eval is not installed; pip install 'compress-pipeline[lm-eval]'" in ended.err


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")  # of the library and of what it imports
def test_a_task_of_ones_own_is_answered_as_the_model_would(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", exc_type=ImportError)
    folder = make_text_model(tmp_path / "model", num_hidden_layers=1)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "words.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    text = TASK.replace("FILE", str(tmp_path / "tasks" / "words.jsonl"))
    (tmp_path / "tasks" / "words.yaml").write_text(text)
    few = ("--samples", 1, "--length", 32, "--task-folder", tmp_path / "tasks", "--json")
    ended = compress_command("eval", folder, *few, "--task", "words", "--against", folder)
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert found["tasks"] == found["tasks_of_original"]
    assert found["tasks"]["words"]["samples"] == len(QUESTIONS)

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    right = 0
    for asked in QUESTIONS:
        sums = []
        for choice in asked["choices"]:
            before, whole = (tokenizer(t)["input_ids"] for t in (asked["question"], f"{asked['question']} {choice}"))
            with torch.no_grad():
                chances = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            places = range(len(before), len(whole))
            sums.append(sum(float(chances[place - 1, whole[place]]) for place in places))
        right += sums.index(max(sums)) == asked["answer"]
    assert found["tasks"]["words"]["acc"] == pytest.approx(right / len(QUESTIONS))

    ended = compress_command("eval", folder, *few, "--task", "wrods")
    assert ended.code == 2
    assert "--task wrods: no such task; did you mean words?" in ended.err


def test_metrics_are_said_with_their_errors_and_beside_the_originals() -> None:
    found = {
        "perplexity": 9.0, "kl": None, "kl_tokens": 0, "tokens": 62, "bytes": 10, "windows": 2, "length": 32,
        "source": "demo", "tasks": {"words": {"acc": 0.5, "acc_stderr": 0.25, "samples": 4}},
        "tasks_of_original": {"words": {"acc": 0.75, "acc_stderr": 0.2, "samples": 4}},
    }  # fmt: skip
    assert "\n  words: acc 0.5000 ± 0.2500 (the original 0.7500) on 4 samples\n" in evaluation_lines("m", found, None)
