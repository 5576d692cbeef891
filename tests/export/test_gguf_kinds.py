"""GGUF for every kind of model: names, keys and layouts here; what llama.cpp computes, where there is one."""

import re
from pathlib import Path
from typing import Any

import gguf_models as small
import pytest
import torch
from gguf_models import VARIANTS, config_of, kind_of, structure
from gguf_written import W4, asked, needs_llama_cpp, saved
from selection import only
from torch import Tensor
from written import write

import compress
from compress import Codebook, ConfigError, Magnitude, Rtn
from compress.export.gguf.architectures import KINDS, UNWRITTEN
from compress.export.gguf.keys import keys
from compress.export.gguf.rope import rope_tensors, unfit_rope
from compress.export.gguf.tensors import Layout
from compress.export.gguf.unfit import unfit
from compress.models import graph as graphs
from compress.models.loading import load_model

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.usefixtures("one_thread")


def layout_of(variant: str) -> Any:
    return Layout(graphs.find(structure(config_of(variant))), KINDS[kind_of(variant)])


def test_every_kind_is_tried_and_none_is_both_written_and_refused() -> None:
    assert {kind_of(variant) for variant in VARIANTS} == set(KINDS)
    assert not set(KINDS) & set(UNWRITTEN)
    known = set(gguf.MODEL_ARCH_NAMES.values())
    assert {architecture.name for architecture in KINDS.values()} <= known


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_of_a_kind_has_a_place_of_its_own_and_nothing_is_refused(variant: str) -> None:
    config, layout = config_of(variant), layout_of(variant)
    assert [*unfit(config, layout.architecture), *unfit_rope(config, layout.architecture)] == []
    assert layout.nameless() == []
    names = [piece.name for piece in layout.pieces()]
    assert len(names) == len(set(names))
    shapes = dict(layout.graph.tensors())
    for piece in layout.pieces():
        value = shapes[piece.parameter]
        if piece.rows is not None and not piece.experts:
            assert sorted(piece.rows.tolist()) == list(range(len(piece.rows))), piece.name
        if piece.experts:
            assert value.dim() == 3
    said = keys(config, layout.architecture)
    assert {type(value) for value in said.values()} <= {int, float, bool, str, list}
    assert said["embedding_length"] == config.hidden_size
    assert said["block_count"] == len({name.split(".")[1] for name in names if name.startswith("blk.")})


KEYS: dict[str, dict[str, Any]] = {
    "gemma2": {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "attention.sliding_window": 16},
    "gemma3_text, linear": {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0, "rope.freq_base": 1e6,
                            "rope.freq_base_swa": 1e4},
    "qwen2, yarn": {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
                    "rope.scaling.original_context_length": 32},
    "qwen2_moe": {"expert_count": 8, "expert_used_count": 2, "expert_feed_forward_length": 32,
                  "expert_shared_feed_forward_length": 64},
    "granite": {"attention.scale": 0.2, "embedding_scale": 3.0, "residual_scale": 0.5, "logit_scale": 2.0},
    "stablelm": {"rope.dimension_count": 4, "attention.layer_norm_epsilon": 1e-5, "use_parallel_residual": False},
    "falcon, new": {"attention.head_count_kv": 2, "tensor_data_layout": "jploski"},
    "falcon": {"attention.head_count_kv": 1},
    "mpt": {"attention.max_alibi_bias": 8.0, "feed_forward_length": 256},
    "olmo3": {"attention.sliding_window_pattern": [True, True, True, False]},
    "bert": {"attention.causal": False},
    "qwen3": {"attention.key_length": 16, "attention.value_length": 16},
    "minimax_m2": {"expert_gating_func": 2},
}  # fmt: skip


@pytest.mark.parametrize("variant", KEYS)
def test_keys_say_what_the_configuration_does(variant: str) -> None:
    said = keys(config_of(variant), KINDS[kind_of(variant)])
    assert {key: said.get(key) for key in KEYS[variant]} == KEYS[variant]


def test_a_window_that_the_code_does_not_know_limits_the_context_that_is_stated() -> None:
    config = config_of("mistral", sliding_window=48)
    assert keys(config, KINDS["mistral"])["context_length"] == 48
    assert keys(config_of("mistral"), KINDS["mistral"])["context_length"] == 128


def test_frequencies_of_llama_3_are_divided_by_what_the_file_has() -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = config_of("llama, llama3")
    (factors,) = rope_tensors(config).values()
    plain = LlamaRotaryEmbedding(config_of("llama", head_dim=32)).inv_freq
    torch.testing.assert_close(plain / factors, LlamaRotaryEmbedding(config).inv_freq)
    assert float(factors[0]) == 1
    assert float(factors[-1]) == pytest.approx(8)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "biases": ("qwen3", {"attention_bias": True}, "attention_bias, True"),
    "act": ("llama", {"hidden_act": "gelu"}, "hidden_act, gelu"),
    "windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window, True"),
    "order of windows": ("gemma2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types, "),
    "scale": ("gemma2", {"query_pre_attn_scalar": 32}, "query_pre_attn_scalar, 32"),
    "some dense": ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers, \[0\]"),
    "weights of experts": ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob, False"),
    "norms of few layers": ("cohere", {"use_qk_norm": True}, "use_qk_norm, True"),
    "few windows": ("exaone4, windows", {"num_hidden_layers": 4, "layer_types": None}, "sliding_window, 16"),
    "alibi": ("falcon", {"alibi": True}, "alibi, True"),
    "windows unknown there": ("dots1", {"layer_types": [small.SLIDING] * 2, "sliding_window": 8}, "layer_types, "),
    "rotated layers": ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}, "no_rope_layers, "),
    "last of the mixtures": ("ernie4_5_moe", {"moe_layer_end_index": 0}, "moe_layer_end_index, 0"),
    "dynamic": ("llama", small.rope("dynamic", factor=2.0), "rope_type, dynamic"),
    "yarn": ("llama", small.rope("yarn", factor=4.0, original_max_position_embeddings=32, attention_factor=3.0),
             "attention_factor of YaRN, 3.0"),
    "slow turns": ("llama", small.rope("yarn", factor=4.0, original_max_position_embeddings=32, beta_slow=4.0),
                   "beta_slow of YaRN, 4.0"),
    "fast turns": ("llama", small.rope("yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=16.0),
                   "beta_fast of YaRN, 16.0"),
    "factors": ("qwen2", small.LLAMA3, "rope_type, llama3"),
    "factors of layers that are not turned": ("smollm3", small.LLAMA3, "rope_type, llama3"),
    **{f"part of a head, {kind}": (kind, small.rope("default", partial_rotary_factor=0.5), "partial_rotary_factor, 0.5")
       for kind in ("llama", "qwen2", "gemma", "falcon", "cohere", "olmo2", "exaone4", "dots1")},
    **{f"heads, {kind}": (kind, {"head_dim": 32}, "head_dim, 32")
       for kind in ("granite", "granitemoe", "cohere2", "nemotron", "glm", "exaone4")},
    **{f"{option}, {kind}": (kind, {option: True}, f"{option}, True")
       for option in ("attention_bias", "mlp_bias") for kind in ("smollm3", "arcee")},
    "best of groups": ("deepseek_v2", {"topk_method": "group_limited_greedy"}, "topk_method, group_limited_greedy"),
    "queries of no latent layer": ("deepseek_v3", {"q_lora_rank": None}, "q_lora_rank, None"),
    "queries of a latent layer": ("deepseek_v2, lite", {"q_lora_rank": 16}, "q_lora_rank, 16"),
    "halves that turn": ("deepseek_v3", {"rope_interleave": False}, "rope_interleave, False"),
    "yarn that scales no queries": ("deepseek_v3", small.YARN, "mscale of YaRN, None"),
    "order of mixtures": ("exaone_moe", {"mlp_layer_types": ["sparse"] * 4}, "mlp_layer_types, "),
    "no layer of a mixture with a window": ("exaone_moe", {"layer_types": [small.FULL] * 4}, "layer_types, "),
    "no biases": ("jais2", {"mlp_bias": False}, "mlp_bias, False"),
    "all positions": ("mpt", {"attn_config": {"alibi": False}}, "alibi, False"),
    "other slopes": ("mpt", {"attn_config": {"alibi_bias_max": 16}}, "alibi_bias_max, 16"),
    "no layer with a window": ("exaone4", {"sliding_window": 16}, "sliding_window, 16"),
    "no window in many layers": ("exaone4, windows", {"sliding_window": None, "layer_types": [small.FULL] * 64},
                                 "sliding_window, None"),
    "a window in none of many layers": ("exaone4, windows", {"layer_types": [small.FULL] * 64}, "layer_types, "),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_takes_for_granted_and_a_model_has_not_is_refused(name: str) -> None:
    variant, changes, message = REFUSED[name]
    config, architecture = config_of(variant, **changes), KINDS[kind_of(variant)]
    found = [*unfit(config, architecture), *unfit_rope(config, architecture)]
    assert len(found) == 1
    assert re.search(f"this model's {message}.* cannot be said in a GGUF file", found[0])


# --- read by transformers ---------------------------------------------------------------------------------------------

READ = ("llama", "mistral", "qwen2", "qwen3, wide", "bloom", "falcon",  "starcoder2", "stablelm",
        "stablelm, tied", "nemotron", "minimax_m2")  # fmt: skip


def test_every_kind_that_transformers_reads_is_read() -> None:
    assert {kind_of(variant) for variant in READ} == {
        kind for kind, known in KINDS.items() if known.read_by_transformers
    }


@pytest.mark.parametrize("variant", only(["llama", "qwen3, wide", "bloom"], READ))
def test_transformers_computes_the_same_logits_from_the_file(variant: str, tmp_path: Path) -> None:
    saved(variant, tmp_path)
    assert write("llama", tmp_path, [W4], "gguf").verified["gguf"]["max_logit_difference"] == 0


@pytest.mark.parametrize("variant", only(["bloom, untied"], ["bloom, untied", "falcon, untied"]))
def test_a_head_that_transformers_would_tie_is_written_and_not_compared_with_it(variant: str, tmp_path: Path) -> None:
    saved(variant, tmp_path)
    found = write("llama", tmp_path, [W4], "gguf").verified["gguf"]
    assert "max_logit_difference" not in found
    head = load_model(tmp_path / "out", torch.float32).lm_head.weight
    there = contents(tmp_path)
    assert torch.equal(there["output.weight"][1], head)
    assert not torch.equal(head, there["token_embd.weight"][1])


def test_a_tied_head_that_llama_cpp_looks_for_is_the_embedding_once_more(tmp_path: Path) -> None:
    saved("olmo2, tied", tmp_path)
    write("llama", tmp_path, [Rtn(bits=4, group_size=32, symmetric=True, embeddings={"bits": 8})], "gguf")
    there = contents(tmp_path)
    assert there["output.weight"][0] == there["token_embd.weight"][0] == "Q8_0"
    assert torch.equal(there["output.weight"][1], load_model(tmp_path / "out").lm_head.dequantize())


# --- experts ----------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, tuple[str, Tensor]]:
    reader = gguf.GGUFReader(folder / "out" / "gguf" / "model.gguf")
    found = {}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        found[tensor.name] = tensor.tensor_type.name, torch.from_numpy(values.copy())
    return found


def test_codes_of_all_experts_are_one_tensor_for_gate_up_and_down(tmp_path: Path) -> None:
    saved("qwen3_moe", tmp_path)
    write("llama", tmp_path, [Rtn(bits=4, group_size=32, symmetric=True)], "gguf")
    there, model = contents(tmp_path), load_model(tmp_path / "out", torch.float32)
    for i, layer in enumerate(model.model.layers):
        experts = layer.mlp.experts
        both = torch.stack([experts.gate_up_proj[e] for e in range(8)])
        down = torch.stack([experts.down_proj[e] for e in range(8)])
        meant = {"gate": both[:, :32], "up": both[:, 32:], "down": down}
        for part, values in meant.items():
            kind, found = there[f"blk.{i}.ffn_{part}_exps.weight"]
            assert kind == "Q4_0"
            assert torch.equal(found, values)
        assert there[f"blk.{i}.ffn_gate_inp.weight"][0] == "F32"


def test_experts_with_a_codebook_beside_others_with_steps_are_refused_before_any_work(tmp_path: Path) -> None:
    saved("qwen3_moe", tmp_path)
    book = Codebook(bits=4, scale="row", include=("*experts.*.[0-3]",))
    steps = Rtn(bits=4, group_size=32, symmetric=True, include=("*experts.*.[4-7]",))
    message = r"gate_up_proj\.0 has a codebook, .*gate_up_proj\.4 uniform codes \(4 such tensors\); quantize them alike"
    with pytest.raises(ConfigError, match=message):
        write("llama", tmp_path, [book, steps], "gguf")
    assert not (tmp_path / "out.work").exists()


def test_experts_that_need_different_types_get_the_widest_and_one_without_codes_makes_all_plain(tmp_path: Path) -> None:
    saved("qwen3_moe", tmp_path)
    four, eight = Rtn(bits=4, group_size=32, symmetric=True), Rtn(bits=8, group_size=32, symmetric=True)
    wide, narrow = ("*experts.*.3",), ("*layers.0*experts.*.[0-2]", "*layers.0*experts.*.[4-7]")
    passes = [Rtn(**{**vars(eight), "include": wide}), Rtn(**{**vars(four), "include": narrow})]
    write("llama", tmp_path, [*passes], "gguf")
    there = contents(tmp_path)
    assert there["blk.0.ffn_gate_exps.weight"][0] == "Q8_0"
    assert there["blk.1.ffn_gate_exps.weight"][0] == "F32"


# --- llama.cpp -------------------------------------------------------------------------------------------------------


# llama.cpp looks GELU up in a table of float16, and its embeddings of texts come through float16 too.
ROUNDED = ("bert", "bloom", "falcon", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_bigcode", "gpt_neox", "mpt", "phi",
           "starcoder2")  # fmt: skip


@pytest.mark.real
@needs_llama_cpp
@pytest.mark.parametrize("variant", VARIANTS)
def test_llama_cpp_computes_what_the_model_does(variant: str, tmp_path: Path) -> None:
    saved(variant, tmp_path)
    write("llama", tmp_path, [Magnitude(sparsity=0.05)], "gguf")
    lengths = (80, 100) if variant == "phi3, longrope" else (5, 40, 60)  # llama.cpp takes the long factors throughout
    prompts = [torch.randint(256, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths]
    embed = kind_of(variant) == "bert"
    found = asked(tmp_path, prompts, [], embed, 256)["found"]
    model = load_model(tmp_path / "out", torch.float32)
    for prompt, answer in zip(prompts, found, strict=True):
        with torch.no_grad():
            made = model(torch.tensor([prompt]))
        meant = made.last_hidden_state[0].mean(0) if embed else made.logits[0, -1].log_softmax(-1)
        worst = float((torch.tensor(answer) - meant).abs().max())
        assert worst < (3e-3 if kind_of(variant) in ROUNDED else 5e-5)  # as docs/exports.md says


@pytest.mark.real
@needs_llama_cpp
def test_llama_cpp_computes_with_super_blocks_what_the_packed_model_does(tmp_path: Path) -> None:
    rtn = {"scheme": "q4_k", "scale_search": "mse", "overrides": [{"match": "*.v_proj", "scheme": "q6_k"}]}
    compress.run({"passes": [{"rtn": rtn}], "export": ["gguf"]}, "demo", tmp_path / "out")
    prompts = [torch.randint(10, 4000, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 24, 60)]
    found = torch.tensor(asked(tmp_path, prompts, [], embed=False, words=4096)["found"])
    with torch.no_grad():
        model = load_model(tmp_path / "out", torch.float32)
        meant = torch.stack([model(torch.tensor([p])).logits[0, -1].log_softmax(-1) for p in prompts])
    assert found.argmax(-1).tolist() == meant.argmax(-1).tolist()
    # llama.cpp rounds what it multiplies super-blocks with to 8 bits.
    assert (meant.exp() * (meant - found)).sum(-1).max() < 0.01
