"""ONNX of models that are no plain decoders: encoders, caches of several shapes, states that are no keys and values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from selection import only

import compress
from compress.errors import CompressError

SIZE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
TOKENS = torch.randint(3, 60, (3, 16), generator=torch.Generator().manual_seed(1))


def exported(cls: str, folder: Path, exports: str = "onnx", **options: Any) -> dict[str, Any]:
    made = getattr(transformers, cls)
    torch.manual_seed(0)
    made(made.config_class(**{**SIZE, "pad_token_id": 0, **options})).save_pretrained(folder / "in")
    steps = {"passes": [{"rtn": {"bits": 4, "group_size": 16}}], "export": [exports], "allow_dense": True}
    report = compress.run(steps, folder / "in", folder / "out", evaluation=TOKENS)
    found: dict[str, Any] = report.verified[exports]
    return found


@pytest.mark.parametrize(
    ("cls", "output"),
    only([("BertModel", "last_hidden_state")], [("BertModel", "last_hidden_state"), ("BertForMaskedLM", "logits")]),
)
def test_an_encoder_computes_in_onnxruntime_what_it_computes_packed(cls: str, output: str, tmp_path: Path) -> None:
    import onnx

    assert exported(cls, tmp_path)["max_logit_difference"] < 1e-5
    graph = onnx.load(tmp_path / "out" / "onnx" / "model.onnx", load_external_data=False).graph
    assert [value.name for value in graph.output] == [output]
    assert {value.name for value in graph.input} == {"input_ids", "attention_mask"}


@pytest.mark.real
def test_keys_and_values_may_have_other_widths(tmp_path: Path) -> None:
    import onnx

    assert exported("MiniCPM3ForCausalLM", tmp_path, **LATENT)["max_logit_difference"] < 1e-4
    graph = onnx.load(tmp_path / "out" / "onnx" / "model.onnx", load_external_data=False).graph
    widths = {v.name: v.type.tensor_type.shape.dim[3].dim_value for v in graph.input if "past" in v.name}
    assert widths["past_key_values.0.key"] == 16
    assert widths["past_key_values.0.value"] == 8


@pytest.mark.real
def test_genai_has_no_place_for_several_widths(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    with pytest.raises(CompressError, match="keep keys and values of several shapes"):
        exported("MiniCPM3ForCausalLM", tmp_path, "genai", **LATENT)


def test_states_that_are_no_keys_and_values_are_named(tmp_path: Path) -> None:
    layers = {"layer_types": ["linear_attention", "full_attention"], "head_dim": 8, "linear_num_value_heads": 2,
              "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}  # fmt: skip
    with pytest.raises(CompressError, match="1 of its 2 layers keep states that are no keys and values"):
        exported("Qwen3_5ForCausalLM", tmp_path, num_key_value_heads=2, **layers)
