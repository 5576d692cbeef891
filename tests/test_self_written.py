"""Calibration text that a model writes itself."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

import compress
from compress import ConfigError, DataError
from compress.calibration.self_written import self_written

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    return compress.demo.load()


@pytest.fixture(scope="module")
def written(demo: tuple[Any, Any]) -> Tensor:
    return self_written(*demo, 6, 64, seed=0)


def loss(model: Any, tokens: Tensor) -> float:
    with torch.no_grad():
        return float(model(input_ids=tokens, labels=tokens).loss)


def test_what_a_model_writes_is_what_it_expects(demo: tuple[Any, Any], written: Tensor) -> None:
    model, tokenizer = demo
    assert written.shape == (6, 64)
    assert written.dtype == torch.int64
    shuffled = written.flatten()[torch.randperm(written.numel())].view_as(written)
    read = compress.load_tokens("demo", tokenizer, samples=6, length=64)
    assert loss(model, written) < loss(model, shuffled) - 2  # a text, and not its words
    assert loss(model, written) < loss(model, read) + 0.5  # as likely as what it was trained on
    assert loss(model, written) > 0.5  # and not the one likeliest text again and again
    assert len(written.unique(dim=0)) == 6


def test_the_seed_decides(demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    state = torch.random.get_rng_state()
    first, again, other = (self_written(model, tokenizer, 2, 24, seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_texts_end_where_the_model_ends_them_and_windows_are_full(demo: tuple[Any, Any], written: Tensor) -> None:
    ends = (written == demo[1].eos_token_id).sum()
    assert 1 <= ends < written.numel() / 16  # no text is shorter
    assert written.shape == (6, 64)


@pytest.mark.real
def test_it_calibrates_as_real_text_does(tmp_path: Path) -> None:
    def perplexity(source: str) -> float:
        pipeline = {
            "calibration": {"source": source, "samples": 24, "length": 64},
            "evaluate": {"samples": 8, "length": 128},
            "passes": [{"gptq": {"bits": 2, "group_size": 64}}],
        }
        found = compress.run(pipeline, "demo", tmp_path / source).rows[-1].perplexity
        assert found is not None
        return found

    rounded = compress.run(
        {"evaluate": {"samples": 8, "length": 128}, "passes": [{"rtn": {"bits": 2, "group_size": 64}}]},
        "demo",
        tmp_path / "rtn",
    ).rows[-1]
    real, own = perplexity("demo"), perplexity("self")
    assert rounded.perplexity is not None
    assert own < rounded.perplexity
    assert math.log(own / real) < 0.25 * math.log(rounded.perplexity / real)


@pytest.mark.real
def test_beside_other_sources(tmp_path: Path) -> None:
    pipeline = {
        "calibration": {"source": {"own": "self", "read": "demo"}, "samples": 2, "length": 32},
        "passes": [{"wanda": {"sparsity": 0.5}}],
    }
    report = compress.run(pipeline, "demo", tmp_path / "out")
    assert report.rows[-1].sparsity == pytest.approx(0.5, abs=0.01)
    again = compress.run(pipeline, "demo", tmp_path / "out")  # the same run, and so the same result
    assert again.verified == report.verified


def test_nothing_is_measured_on_it(tmp_path: Path) -> None:
    pipeline = {"evaluate": {"source": "self"}, "passes": ["rtn"]}
    with pytest.raises(ConfigError, match=r"evaluate\.source: what a model writes itself"):
        compress.run(pipeline, "demo", tmp_path / "out")
    with pytest.raises(DataError, match="`self` is text that a model writes for calibration"):
        compress.load_tokens("self", compress.demo.load()[1], samples=1, length=8)


def test_a_model_that_does_not_write(tmp_path: Path) -> None:
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForMaskedLM(BertConfig(vocab_size=4096, **settings))
    model.save_pretrained(tmp_path / "bert")
    PreTrainedTokenizerFast.from_pretrained(compress.demo.MODEL_DIR).save_pretrained(tmp_path / "bert")
    pipeline = {"calibration": {"source": "self", "samples": 2, "length": 16}, "passes": ["gptq"]}
    with pytest.raises(ConfigError, match=r"calibration\.source: a BertForMaskedLM does not write text"):
        compress.run(pipeline, tmp_path / "bert", tmp_path / "out")
    assert not (tmp_path / "out").exists()
