"""Results in Python: saved as a run's folder, shown as a table, made of lists of texts."""

import importlib.util
from pathlib import Path

import pytest
import torch
from commands import compress_command, make_text_model, write_text
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import compress
from compress import DataError, UsageError

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_result_is_saved_packed_and_loads_as_what_it_is(
    tmp_path: Path, tokens: Tensor, evaluation_tokens: Tensor, tiny_llama: LlamaForCausalLM
) -> None:
    passes = [compress.Wanda(sparsity="2:4", include=("*.mlp.*",)), compress.Rtn(bits=3, group_size=32)]
    made = compress.apply(tiny_llama, passes, tokens, evaluation=evaluation_tokens)
    made.save(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.allclose(loaded(tokens).logits, made.model(tokens).logits, atol=1e-4)
    assert (tmp_path / "out" / "compress.safetensors").stat().st_size < made.report.rows[-1].bytes + 20_000
    assert not (tmp_path / "out.work").exists()
    ended = compress_command("inspect", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert ended.out.count("uniform") == 14
    assert compress_command("compare", tmp_path / "out").code == 0
    before = (tmp_path / "out" / "report.json").read_bytes()
    with pytest.raises(UsageError, match="out exists; give another folder"):
        made.save(tmp_path / "out")
    assert (tmp_path / "out" / "report.json").read_bytes() == before


def test_a_tokenizer_is_saved_beside_and_what_is_no_model_of_transformers_is_refused(tmp_path: Path) -> None:
    folder = make_text_model(tmp_path / "model", num_hidden_layers=1)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    made = compress.apply(model, [compress.Rtn(bits=4)])
    with pytest.raises(UsageError, match="tokenizer must be one of transformers; got str"):
        made.save(tmp_path / "out", "words")
    assert not (tmp_path / "out").exists()
    made.save(tmp_path / "out", tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").vocab_size == tokenizer.vocab_size
    plain = compress.apply(nn.Sequential(nn.Linear(32, 32)), [compress.Rtn(bits=4)])
    with pytest.raises(UsageError, match="Sequential is no model of transformers"):
        plain.save(tmp_path / "plain")


def test_a_report_is_a_table_in_notebooks(evaluation_tokens: Tensor, tiny_llama: LlamaForCausalLM) -> None:
    data = {"<maths>": evaluation_tokens[:2], "code": evaluation_tokens[2:]}
    made = compress.apply(tiny_llama, [compress.Rtn(bits=4)], evaluation=data)
    shown = made._repr_html_()
    assert shown == made.report._repr_html_()
    assert shown.count("<tr>") == 3
    assert "&lt;maths&gt;" in shown
    assert "<maths>" not in shown
    if importlib.util.find_spec("pandas") is None:
        with pytest.raises(UsageError, match=r"pandas is not installed; pip install 'compress-pipeline\[pandas\]'"):
            made.report.to_pandas()
        return
    found = made.report.to_pandas()
    assert list(found.index) == ["original", "rtn"]
    row = made.report.rows[-1]
    assert found.loc["rtn", "bytes"] == row.bytes
    assert found.loc["rtn", "perplexity of code"] == row.sources["code"]["perplexity"]


def test_texts_are_data_too(tmp_path: Path) -> None:
    folder = make_text_model(tmp_path / "model", num_hidden_layers=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = write_text(tmp_path / "words.txt", words=400).read_text()
    texts = [text[:900], text[900:]]
    found = compress.load_tokens(texts, tokenizer, samples=3, length=16)
    assert found.shape == (3, 16)
    whole = compress.load_tokens(str(tmp_path / "words.txt"), tokenizer, samples=3, length=16)
    assert torch.equal(compress.load_tokens([text], tokenizer, samples=3, length=16), whole)

    steps = {
        "calibration": {"samples": 3, "length": 16}, "evaluate": {"samples": 2, "length": 16},
        "passes": [{"wanda": {}}],
    }  # fmt: skip
    report = compress.run(steps, folder, tmp_path / "of-texts", calibration=texts, evaluation={"a": [text], "b": texts})
    compress.run(steps, folder, tmp_path / "of-tokens", calibration=found)
    first, second = ((tmp_path / name / "compress.safetensors").read_bytes() for name in ("of-texts", "of-tokens"))
    assert first == second
    assert set(report.rows[-1].sources) == {"a", "b"}


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["a word", 3], "text 1 of the list is of type int; give texts alone"),
        (["", ""], "the list of texts holds no text"),
        (["a word"], "the list of 1 texts holds 3 tokens, 0 windows of 16; 3 were asked for"),
    ],
)
def test_texts_that_are_none_or_too_few_are_refused(texts: list[object], said: str) -> None:
    tokenizer = compress.demo.load()[1]
    with pytest.raises(DataError, match=said):
        compress.load_tokens(texts, tokenizer, samples=3, length=16)
