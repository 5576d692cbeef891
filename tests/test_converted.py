"""What files hold and what models hold: tensors put together while loading, codes read as numbers, nothing dropped."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from selection import only
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import compress
from compress.checkpoint.opening import open_folder
from compress.encodings.format import WEIGHTS
from compress.errors import CheckpointError
from compress.models import loading

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
MIXTURE = {
    **SIZE, "intermediate_size": 48, "moe_intermediate_size": 48, "num_experts_per_tok": 2, "pad_token_id": 0,
}  # fmt: skip
RTN = {"passes": [{"rtn": {"bits": 4, "group_size": 16}}]}


def saved(cls: str, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> transformers.PreTrainedModel:
    made: Any = getattr(transformers, cls)
    torch.manual_seed(3)
    model: transformers.PreTrainedModel = made(made.config_class(**options)).eval().to(dtype)
    model.save_pretrained(folder)
    return model


def values(model: transformers.PreTrainedModel) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


MIXTURES = [
    ("MixtralForCausalLM", {"num_local_experts": 4}),
    ("Qwen3MoeForCausalLM", {"num_experts": 4}),
    ("OlmoeForCausalLM", {"num_experts": 4}),
    ("Qwen2MoeForCausalLM", {"num_experts": 4, "shared_expert_intermediate_size": 48}),
    ("DeepseekV3ForCausalLM", {
        "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
        "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
        "num_key_value_heads": 4,
    }),
    ("GptOssForCausalLM", {"num_local_experts": 4, "head_dim": 8}),
    ("Qwen3VLMoeTextModel", {"num_experts": 4, "head_dim": 8}),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "options"), MIXTURES, ids=[cls for cls, _ in MIXTURES])
def test_parameters_and_every_piece_of_them_are_those_that_transformers_loads(
    cls: str, options: dict[str, Any], tmp_path: Path
) -> None:
    meant = values(saved(cls, tmp_path, **{**MIXTURE, **options}))
    artifact = open_folder(tmp_path).artifact
    source = artifact.source
    fused = 0
    for name, _ in artifact.graph.tensors():
        assert torch.equal(artifact.tensor(name), meant[name]), name
        stored = artifact.name_in_source(name)
        flat = meant[name].flatten()
        start, stop = len(flat) // 3, len(flat) // 2 + 1
        assert torch.equal(source.piece(stored, start, stop), flat[start:stop]), name
        assert (source.shape(stored), source.dtype(stored)) == (tuple(meant[name].shape), meant[name].dtype)
        fused += meant[name].dim() == 3
    assert fused >= 2


@pytest.mark.parametrize(
    ("cls", "options"), only(MIXTURES[:1] + MIXTURES[-3:-1], MIXTURES), ids=[cls for cls, _ in MIXTURES]
)
def test_plain_weights_are_exported_under_the_names_of_the_hub(
    cls: str, options: dict[str, Any], tmp_path: Path
) -> None:
    saved(cls, tmp_path / "in", **{**MIXTURE, **options})
    report = compress.run({**RTN, "export": ["hf"]}, tmp_path / "in", tmp_path / "out")
    names = [set(load_file(folder / "model.safetensors")) for folder in (tmp_path / "in", tmp_path / "out" / "hf")]
    assert names[0] == names[1]
    assert report.verified["hf"]["tensors_equal"] == len(names[0])
    made = getattr(transformers, cls)
    one_by_one = {"experts_implementation": "eager"}  # as packed experts run; other products sum up in another order
    packed, plain = (made.from_pretrained(tmp_path / "out" / where, **one_by_one) for where in ("", "hf"))
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(packed(tokens)[0], plain(tokens)[0])


def test_one_expert_is_read_without_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved("MixtralForCausalLM", tmp_path, **MIXTURE, num_local_experts=4)
    source: Any = open_folder(tmp_path).artifact.source
    read: list[str] = []
    before = source.before.read

    def noted(name: str) -> Tensor:
        read.append(name)
        value: Tensor = before(name)
        return value

    monkeypatch.setattr(source.before, "read", noted)
    size = 96 * 32
    source.piece("model.layers.1.mlp.experts.gate_up_proj", 2 * size, 3 * size)
    prefix = "model.layers.1.block_sparse_moe.experts.2"
    assert sorted(read) == [f"{prefix}.w1.weight", f"{prefix}.w3.weight"]


def test_a_model_is_built_without_the_memory_of_its_largest_parameter() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config = transformers.DeepseekV3Config(num_hidden_layers=4)  # 256 experts of 2048 x 7168 in the last: 22 billion
    config.architectures = ["DeepseekV3ForCausalLM"]
    model = loading.build(config)
    assert sum(p.numel() for p in model.parameters()) > 10**10
    assert all(p.is_meta for p in model.parameters())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # kilobytes


# --- nothing is dropped -----------------------------------------------------------------------------------------------


def add_tensors(folder: Path, **tensors: Tensor) -> None:
    save_file({**load_file(folder / "model.safetensors"), **tensors}, folder / "model.safetensors", {"format": "pt"})


def test_tensors_that_transformers_declares_to_leave_out_are_carried_along(tmp_path: Path) -> None:
    text = {**SIZE, "intermediate_size": 48, "layer_types": ["full_attention"] * 2, "head_dim": 8}
    saved("Qwen3_5ForCausalLM", tmp_path / "in", **text)
    more = {"mtp.fc.weight": torch.randn(32, 64), "mtp.layers.0.mlp.up_proj.weight": torch.randn(48, 32)}
    add_tensors(tmp_path / "in", **more)
    report = compress.run({**RTN, "export": ["hf"]}, tmp_path / "in", tmp_path / "out")
    assert any("mtp.fc.weight" in note and "as they are" in note for note in report.notes)
    assert report.dense["tensors that transformers makes no use of"] == sum(t.nbytes for t in more.values())
    for file in (tmp_path / "out" / WEIGHTS, tmp_path / "out" / "hf" / "model.safetensors"):
        there = load_file(file)
        assert all(torch.equal(there[name], value) for name, value in more.items())
    for folder in (tmp_path / "out", tmp_path / "out" / "hf"):
        found: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        loaded, info = found
        assert type(loaded).__name__ == "Qwen3_5ForCausalLM"
        assert not info["missing_keys"]
    assert compress.verify(tmp_path / "out") > 0


def test_a_merge_carries_them_along_too(tmp_path: Path) -> None:
    text = {**SIZE, "intermediate_size": 48, "layer_types": ["full_attention"] * 2, "head_dim": 8}
    for name in ("a", "b"):
        saved("Qwen3_5ForCausalLM", tmp_path / name, **text)
    more = {"mtp.fc.weight": torch.randn(32, 64)}
    add_tensors(tmp_path / "a", **more)
    steps = {"passes": [{"average": {"models": [str(tmp_path / "b")]}}, *RTN["passes"]]}
    compress.run(steps, tmp_path / "a", tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / WEIGHTS)["mtp.fc.weight"], more["mtp.fc.weight"])


def test_a_tensor_that_nobody_declares_is_still_an_error(tmp_path: Path) -> None:
    saved("LlamaForCausalLM", tmp_path, **SIZE, intermediate_size=48)
    add_tensors(tmp_path, **{"mtp.fc.weight": torch.randn(32, 64)})
    with pytest.raises(CheckpointError, match=r"no place for mtp\.fc\.weight"):
        open_folder(tmp_path)


# --- codes that are read as numbers -----------------------------------------------------------------------------------


def configure(folder: Path, **settings: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def in_blocks(weight: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales, and what both mean: the last blocks may be smaller."""
    down, across = (-(-n // size) for n in weight.shape)
    scales = torch.empty(down, across)
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    meant = torch.empty(weight.shape)
    for i in range(down):
        for j in range(across):
            block = (slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size))
            scales[i, j] = weight[block].abs().max() / 448
            codes[block] = (weight[block] / scales[i, j]).to(torch.float8_e4m3fn)
            meant[block] = codes[block].float() * scales[i, j]
    return codes, scales, meant


def test_float8_with_a_scale_for_each_block_is_read_as_numbers(tmp_path: Path) -> None:
    size = {**MIXTURE, "hidden_size": 256, "moe_intermediate_size": 192, "intermediate_size": 192}
    saved("DeepseekV3ForCausalLM", tmp_path / "in", torch.bfloat16, **{**size, **MIXTURES[4][1]})
    stored = load_file(tmp_path / "in" / "model.safetensors")
    meant = {}
    for name, value in list(stored.items()):
        if value.dim() == 2 and "proj" in name:
            codes, scales, numbers = in_blocks(value.float(), 128)
            stored |= {name: codes, f"{name}_scale_inv": scales}
            meant[name] = numbers.to(torch.bfloat16)
    save_file(stored, tmp_path / "in" / "model.safetensors", {"format": "pt"})
    section = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    configure(tmp_path / "in", quantization_config=section)
    opened = open_folder(tmp_path / "in")
    artifact = opened.artifact
    for expert in range(4):
        prefix = f"model.layers.1.mlp.experts.{expert}"
        both = torch.cat([meant[f"{prefix}.gate_proj.weight"], meant[f"{prefix}.up_proj.weight"]])
        assert torch.equal(artifact.tensor("model.layers.1.mlp.experts.gate_up_proj")[expert], both)
    for name in ("kv_a_proj_with_mqa", "o_proj"):
        full = f"model.layers.0.self_attn.{name}.weight"
        assert torch.equal(artifact.tensor(full), meant[full])
        assert torch.equal(artifact.source.piece(full, 300, 1500), meant[full].flatten()[300:1500])
    assert any("stored as fp8" in note for note in opened.notes)
    compress.run({**RTN, "export": ["hf"]}, tmp_path / "in", tmp_path / "out")
    for folder in (tmp_path / "out", tmp_path / "out" / "hf"):
        found: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        _, info = found
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]


def test_mxfp4_as_gpt_oss_ships_it_is_read_as_numbers(tmp_path: Path) -> None:
    size = {**MIXTURE, "hidden_size": 64, "intermediate_size": 64, "num_local_experts": 4, "head_dim": 8}
    saved("GptOssForCausalLM", tmp_path / "in", torch.bfloat16, **size)
    stored = load_file(tmp_path / "in" / "model.safetensors")
    meant = {}
    for name in [n for n in stored if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = stored.pop(name).shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        scales = torch.randint(120, 130, (experts, rows, columns // 32), dtype=torch.uint8)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        meant[name] = convert_moe_packed_tensors(blocks, scales)
    save_file(stored, tmp_path / "in" / "model.safetensors", {"format": "pt"})
    configure(tmp_path / "in", quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": []})
    artifact = open_folder(tmp_path / "in").artifact
    for name, value in meant.items():
        assert torch.equal(artifact.tensor(name), value)
        assert torch.equal(artifact.source.piece(name, 5000, 9000), value.flatten()[5000:9000])
    compress.run(RTN, tmp_path / "in", tmp_path / "out")
    assert "quant_method" in json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]


def test_blocks_that_do_not_divide_a_weight_are_damage(tmp_path: Path) -> None:
    saved("LlamaForCausalLM", tmp_path, **SIZE, intermediate_size=48)
    stored = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    stored |= {name: stored[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(5, 1)}
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    configure(tmp_path, quantization_config={"quant_method": "fp8"})
    with pytest.raises(CheckpointError, match="the blocks do not divide it"):
        open_folder(tmp_path)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors"])
def test_other_codes_are_refused_in_one_sentence(method: str, tmp_path: Path) -> None:
    saved("LlamaForCausalLM", tmp_path, **SIZE, intermediate_size=48)
    configure(tmp_path, quantization_config={"quant_method": method, "format": "pack-quantized"})
    with pytest.raises(CheckpointError, match=f"already quantized \\({method}"):
        open_folder(tmp_path)


def test_sinusoids_that_are_in_no_file_are_computed_and_weights_never_are(tmp_path: Path) -> None:
    sides = {f"{side}_{what}": n for side in ("encoder", "decoder")
             for what, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))}  # fmt: skip
    tokens = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    size = {"vocab_size": 64, "d_model": 16, "max_position_embeddings": 32}
    meant = values(saved("MarianMTModel", tmp_path, **sides, **tokens, **size))
    stored = load_file(tmp_path / "model.safetensors")
    name = "model.encoder.embed_positions.weight"
    assert name not in stored
    assert torch.equal(open_folder(tmp_path).artifact.tensor(name), meant[name])
    del stored["model.encoder.layers.0.fc1.weight"]
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 parameters .* such as model\.encoder\.layers\.0\.fc1\.weight"):
        open_folder(tmp_path)
