"""How long a window a model has positions for, and what is computed from positions."""

from pathlib import Path

import pytest
import torch
from selection import only
from transformers import (
    BertConfig,
    BertLMHeadModel,
    CodeGenConfig,
    CodeGenForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    MptConfig,
    MptForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForCausalLM,
)

import compress
from compress import Rtn
from compress.models import loading
from compress.models.positions import longest_window

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL = {"vocab_size": 64, "d_model": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ROTARY = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 48,
          "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
LONGEST: dict[str, tuple[PreTrainedModel, int | None]] = {
    "gpt2": (GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=48)), 48),
    "mpt": (MptForCausalLM(MptConfig(vocab_size=64, d_model=32, n_layers=1, n_heads=2, max_seq_len=24)), 24),
    "bert": (BertLMHeadModel(BertConfig(**SIZES, max_position_embeddings=20, is_decoder=True)), 20),
    "roberta": (RobertaForCausalLM(RobertaConfig(**SIZES, max_position_embeddings=20, is_decoder=True)), 18),
    "whisper": (WhisperForCausalLM(WhisperConfig(**SMALL, decoder_layers=1, encoder_layers=1, max_target_positions=16,
                                                 decoder_attention_heads=2, decoder_ffn_dim=32)), 16),
    "t5": (T5ForConditionalGeneration(T5Config(**SMALL, d_kv=16, d_ff=32, num_layers=1, num_heads=2)), None),
}  # fmt: skip


@pytest.mark.parametrize("name", LONGEST)
def test_the_longest_window_is_what_the_model_can_be_called_with(name: str) -> None:
    model, longest = LONGEST[name]
    assert longest_window(model) == longest
    if longest is None:
        return
    with torch.no_grad():
        model(torch.full((1, longest), 5))
        if name != "mpt":  # whose biases are cut to length, and only too short
            with pytest.raises((IndexError, RuntimeError)):
                model(torch.full((1, longest + 1), 5))


@pytest.mark.parametrize("name", ["mpt", "roberta", "whisper"])
def test_without_evaluation_data_an_export_is_compared_on_windows_that_fit(name: str, tmp_path: Path) -> None:
    LONGEST[name][0].save_pretrained(tmp_path / "model")
    compress.run({"passes": [{"rtn": {"bits": 4, "group_size": 16}}]}, tmp_path / "model", tmp_path / "out")
    assert compress.export_to(tmp_path / "out", [compress.Hf()])["hf"]["max_logit_difference"] == 0


def test_windows_that_are_too_long_are_refused_where_positions_are_counted_from_the_padding(tmp_path: Path) -> None:
    model = LONGEST["roberta"][0]
    compress.evaluate(model, torch.full((1, 18), 5))
    with pytest.raises(compress.DataError, match="windows of 19 tokens are longer than the model's 18 positions"):
        compress.evaluate(model, torch.full((1, 19), 5))


@pytest.mark.parametrize("dtype", only([torch.bfloat16], [torch.float16, torch.bfloat16]), ids=str)
@pytest.mark.parametrize(
    "model",
    [GPTJForCausalLM(GPTJConfig(**ROTARY)), CodeGenForCausalLM(CodeGenConfig(**ROTARY))],
    ids=["gptj", "codegen"],
)
def test_constants_of_a_model_in_half_precision_are_those_that_transformers_computes(
    model: PreTrainedModel, dtype: torch.dtype, tmp_path: Path
) -> None:
    type(model)(model.config).to(dtype).save_pretrained(tmp_path / "model")
    theirs = dict(type(model).from_pretrained(tmp_path / "model").named_buffers())
    ours = dict(loading.build(loading.read_config(tmp_path / "model")).named_buffers())
    assert ours.keys() == theirs.keys() != set()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value)
    data = torch.arange(80).view(2, 40) % 64
    steps = {"passes": [{Rtn.key: {"bits": 4, "group_size": 16}}]}
    report = compress.run(steps, tmp_path / "model", tmp_path / "out", evaluation=data)
    assert report.verified["max_logit_difference"] == 0
