"""What models are judged by that predict no next token: hidden tokens, classes, or how far their outputs went."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from commands import compress_command
from selection import only
from torch import Tensor

import compress
from compress import Gptq, Rtn, Wanda
from compress.calibration.data import Dataset
from compress.calibration.masks import EVERY, masked
from compress.errors import ConfigError, DataError, GateError
from compress.models.named import LEFT_OUT

SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = torch.randint(5, 64, (6, 20), generator=torch.Generator().manual_seed(1))
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *(chr(c) for c in range(33, 127)),
    *(f"##{chr(c)}" for c in range(33, 127)),
]


def bert(cls: str, **options: Any) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    made = getattr(transformers, cls)
    model: transformers.PreTrainedModel = made(transformers.BertConfig(**SIZE, **{"vocab_size": 64, **options})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)  # so that a random model has preferences
    return model


def outputs(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens)[0].flatten(0, -2)


def test_outputs_are_compared_row_by_row_with_those_of_the_original() -> None:
    model = bert("BertModel")
    result = compress.apply(model, [Rtn(bits=3, group_size=16)], evaluation=TOKENS)
    before, after = outputs(model, TOKENS), outputs(result.model, TOKENS)
    row = result.report.rows[-1]
    assert row.relative_error == pytest.approx(
        float(((after - before).norm(dim=1) / before.norm(dim=1)).mean()), rel=1e-4
    )
    assert row.cosine == pytest.approx(float(torch.cosine_similarity(before, after).mean()), rel=1e-5)
    assert row.perplexity is row.accuracy is row.kl is row.change is None
    original = result.report.rows[0]
    assert (original.relative_error, original.cosine) == (0.0, 1.0)
    same = compress.evaluate(result.model, TOKENS, against=model)
    assert same.relative_error == pytest.approx(row.relative_error, rel=1e-5)


def test_logits_without_labels_are_compared_by_their_divergence_too() -> None:
    model = bert("BertForSequenceClassification", num_labels=5)
    row = compress.apply(model, [Rtn(bits=3, group_size=16)], evaluation=TOKENS).report.rows[-1]
    assert row.kl is not None
    assert row.kl > 0
    assert row.relative_error is not None


def test_a_classifier_of_texts_is_judged_by_its_accuracy() -> None:
    model = bert("BertForSequenceClassification", num_labels=5)
    labels = outputs(model, TOKENS).reshape(len(TOKENS), -1).argmax(1)
    report = compress.apply(model, [Wanda(sparsity=0.5)], calibration=TOKENS, evaluation=(TOKENS, labels)).report
    assert report.rows[0].accuracy == 1.0
    assert report.rows[-1].change == report.rows[-1].accuracy - 1.0


def test_a_class_for_each_token_counts_where_there_is_a_label() -> None:
    model = bert("BertForTokenClassification", num_labels=4)
    labels = outputs(model, TOKENS).argmax(1).view(TOKENS.shape)
    wrong = labels.clone()
    wrong[:, 0], wrong[:, 1:4] = (labels[:, 0] + 1) % 4, -100
    assert compress.evaluate(model, (TOKENS, wrong)).accuracy == pytest.approx(16 / 17)


def test_every_seventh_token_is_hidden_another_one_in_every_window() -> None:
    hidden = masked(Dataset(TOKENS), 4)
    assert hidden.labels is not None
    there = hidden.labels != LEFT_OUT
    assert torch.equal(hidden.labels[there], TOKENS[there])
    assert (hidden.inputs[there] == 4).all()
    assert torch.equal(hidden.inputs[~there], TOKENS[~there])
    assert (there.sum(1) >= TOKENS.shape[1] // EVERY).all()
    assert not torch.equal(there[0], there[1])


def test_a_masked_language_model_is_judged_by_the_tokens_that_are_hidden() -> None:
    model, data = bert("BertForMaskedLM"), masked(Dataset(TOKENS), 4)
    assert data.labels is not None
    there = data.labels >= 0
    logits = outputs(model, data.inputs).view(*TOKENS.shape, -1)[there]
    loss = torch.nn.functional.cross_entropy(logits, data.labels[there])
    found = compress.evaluate(model, (data.inputs, data.labels))
    assert found.perplexity == pytest.approx(float(loss.exp()), rel=1e-4)
    assert found.accuracy is None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A masked language model with a tokenizer."""
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = transformers.BertTokenizerFast(vocab_file=str(tmp_path / "vocab.txt"))
    tokenizer.save_pretrained(tmp_path / "in")
    bert("BertForMaskedLM", vocab_size=len(WORDS)).save_pretrained(tmp_path / "in")
    return tmp_path / "in"


def test_text_is_hidden_by_the_models_own_tokenizer(folder: Path, tmp_path: Path) -> None:
    pipeline = tmp_path / "p.yaml"
    pipeline.write_text(
        "calibration: {source: demo, samples: 4, length: 32}\nevaluate: {source: demo, samples: 4, length: 35}\n"
        "passes: [{gptq: {bits: 4, group_size: 16}}]\nexport: [hf]\n"
    )
    ended = compress_command("run", pipeline, folder, "-o", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert "perplexity of masked tokens on demo, 4 samples; KL on 20 of them" in " ".join(ended.out.split())
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["verified"]["max_logit_difference"] == 0
    ended = compress_command("eval", tmp_path / "out", "--against", folder, "--samples", 4, "--length", 35)
    assert ended.code == 0, ended.err
    assert f"perplexity {report['rows'][-1]['perplexity']:.3f}" in ended.out


def test_a_gate_that_would_change_nothing_is_refused(folder: Path, tmp_path: Path) -> None:
    model = bert("BertModel")
    with pytest.raises(GateError, match=r"outputs differ .* evaluate\.max_error allows 0\.1%"):
        compress.apply(model, [Rtn(bits=2, group_size=16)], evaluation=TOKENS, max_error=0.001)
    assert compress.apply(model, [Rtn(bits=8)], evaluation=TOKENS, max_error=0.5).report.rows
    with pytest.raises(ConfigError, match="its gate is max_drop or max_error"):
        compress.apply(model, [Rtn()], evaluation=TOKENS, max_increase=0.1)
    with pytest.raises(DataError, match=r"the evaluation data has no labels.* its gate is max_error"):
        compress.apply(model, [Rtn()], evaluation=TOKENS, max_drop=0.1)
    with pytest.raises(ConfigError, match="judged by its perplexity of masked tokens"):
        compress.run({"evaluate": {"source": "demo", "max_drop": 0.1}, "passes": ["rtn"]}, folder, tmp_path / "out")


def test_without_labels_or_an_original_there_is_nothing_to_measure() -> None:
    with pytest.raises(DataError, match="nothing says what is right of the outputs of a BertModel"):
        compress.evaluate(bert("BertModel"), TOKENS)


@pytest.mark.parametrize(
    "cls", only(["T5ForConditionalGeneration"], ["BartForConditionalGeneration", "T5ForConditionalGeneration"])
)
def test_both_halves_of_an_encoder_decoder_are_worked_on_one_after_the_other(cls: str) -> None:
    made = getattr(transformers, cls)
    size = {"vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "d_kv": 8, "d_ff": 64,
            "num_layers": 2, "num_heads": 4}  # fmt: skip
    known = made.config_class().to_dict()
    torch.manual_seed(0)
    model = made(made.config_class(**{k: v for k, v in size.items() if k in known})).eval()
    rounded, learned = (
        compress.apply(model, [p], calibration=TOKENS, evaluation=TOKENS).report.rows[-1].relative_error or 0.0
        for p in (Rtn(bits=3, group_size=16), Gptq(bits=3, group_size=16))
    )
    assert learned < rounded
    flex = compress.apply(
        model, [compress.FlexRound(bits=3, group_size=16, steps=30)], calibration=TOKENS, evaluation=TOKENS
    )
    names = {name.split(".layer")[0].split(".block")[0].rpartition(".")[2] for name in flex.weights}
    assert {"encoder", "decoder"} <= names
