"""State-space models: they multiply with `layer.weight` themselves, and change weights in place."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from selection import only
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    RwkvConfig,
    RwkvForCausalLM,
)

import compress
from compress.api.reloaded import ANOTHER_WAY

SIZES = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2}  # fmt: skip
MAKE: dict[str, Callable[[], PreTrainedModel]] = {
    "mamba": lambda: MambaForCausalLM(MambaConfig(**SIZES, state_size=8, time_step_rank=8)),
    "falcon_mamba": lambda: FalconMambaForCausalLM(FalconMambaConfig(**SIZES, state_size=8, time_step_rank=8)),
    "jamba": lambda: JambaForCausalLM(JambaConfig(**SIZES, intermediate_size=32, num_attention_heads=2, mamba_dt_rank=8,
                                                  num_key_value_heads=1, attn_layer_period=2, attn_layer_offset=1,
                                                  num_experts=1, num_experts_per_tok=1, use_mamba_kernels=False)),
    "rwkv": lambda: RwkvForCausalLM(RwkvConfig(**{**SIZES, "num_hidden_layers": 4}, rescale_every=1)),
}  # fmt: skip
METHODS = {
    "rtn": {"bits": 4, "group_size": 8},
    "gptq": {"bits": 4, "group_size": 8},
    "wanda": {"sparsity": 0.5},
    "flexround": {"bits": 4, "group_size": 8, "steps": 2},
}


@pytest.mark.parametrize("dtype", only([torch.bfloat16], [torch.float32, torch.bfloat16]), ids=str)
@pytest.mark.parametrize("method", only(["gptq"], METHODS))
@pytest.mark.parametrize("name", only(["jamba"], MAKE))
def test_what_is_written_computes_and_generates_what_was_measured(
    name: str, method: str, dtype: torch.dtype, tmp_path: Path, tokens: Tensor, evaluation_tokens: Tensor
) -> None:
    torch.manual_seed(3)
    MAKE[name]().to(dtype).save_pretrained(tmp_path / "model")
    steps = {"passes": [{method: METHODS[method]}], "export": ["hf"]}
    report = compress.run(steps, tmp_path / "model", tmp_path / "out", calibration=tokens, evaluation=evaluation_tokens)
    assert report.verified["max_logit_difference"] == 0
    exact = name not in ANOTHER_WAY
    assert report.verified["hf"]["max_logit_difference"] <= (0 if exact else 0.05)
    if not exact:
        return
    packed, dense = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "out", tmp_path / "out/hf"))
    prompt = {"input_ids": tokens[:1, :4], "attention_mask": torch.ones(1, 4)}
    written = [model.generate(**prompt, max_new_tokens=6, min_new_tokens=6) for model in (packed, dense)]
    assert torch.equal(*written)


@pytest.mark.parametrize("name", ANOTHER_WAY)
def test_a_layer_whose_weight_the_model_reads_is_calibrated_like_any_other(
    name: str, tmp_path: Path, tokens: Tensor
) -> None:
    torch.manual_seed(3)
    MAKE[name]().save_pretrained(tmp_path / "model")
    steps = {"passes": [{"gptq": METHODS["gptq"]}]}
    report = compress.run(steps, tmp_path / "model", tmp_path / "out", calibration=tokens)
    assert any("dt_proj" in site for site in report.layers)
    assert not report.fallbacks


def test_blocks_of_rwkv_are_not_rescaled_and_predict_the_same(tmp_path: Path, evaluation_tokens: Tensor) -> None:
    torch.manual_seed(3)
    model = MAKE["rwkv"]().eval()
    model.head.weight.data.mul_(10)
    model.save_pretrained(tmp_path / "model")
    compress.run({"passes": [{"rtn": {"bits": 8, "group_size": 8}}]}, tmp_path / "model", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rescale_every"] == 0
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        rescaled, plain = model(evaluation_tokens).logits, packed(evaluation_tokens).logits
    assert model.config.rescale_every == 1
    assert float((plain - rescaled).norm() / rescaled.norm()) < 0.02
