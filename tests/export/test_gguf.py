"""OUT/gguf: the very weights in blocks of GGML, and everything readers want to know beside them."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_models import make_mixture
from gguf_written import TOKENS, W4, field, save, small, values
from once import Folders
from selection import only
from torch import nn
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)
from written import data_for, logits, write

from compress import Codebook, ConfigError, Eora, Gptq, LowRank, Magnitude, Olive, Override, PowerQuant, Rtn
from compress.config.reading import parse
from compress.encodings.super_blocks import KINDS
from compress.errors import CompressError
from compress.export.gguf import exporter
from compress.models import graph as graphs
from compress.models.loading import load_model
from compress.passes import Pass
from compress.planning import plan

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.usefixtures("one_thread")

W4_AND_8 = Rtn(bits=4, group_size=32, symmetric=True, embeddings={"bits": 8})
FACTORS: list[Pass] = [
    LowRank(ratio=0.7, steps=2, include=("*.mlp.*",)),
    Rtn(bits=4, symmetric=True, exclude=("*.mlp.*",)),
]


def ternary() -> PreTrainedModel:
    """Weights that two symmetric bits keep in three of their four levels."""
    model = small(hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    for name, weight in model.named_parameters():
        if "proj" in name:
            weight.data = torch.tensor([-0.09, 0.0, 0.1])[torch.randint(3, weight.shape)]
            weight.data[:, 0] = 0.1
    return model


def mistral() -> PreTrainedModel:
    config = {k: v for k, v in small().config.to_dict().items() if k in ("vocab_size", "hidden_size", "head_dim",
              "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")}  # fmt: skip
    return MistralForCausalLM(MistralConfig(**config, **TOKENS, sliding_window=None, initializer_range=0.1)).eval()


def wide() -> PreTrainedModel:
    return small(hidden_size=256, intermediate_size=512, num_hidden_layers=1)


def super_blocks(kind: str, **options: Any) -> dict[str, Any]:
    return {"grid": kind, "bits": KINDS[kind].bits, "group_size": KINDS[kind].columns, **options}  # type: ignore[index]


def mixed() -> Rtn:
    overrides = (Override("*.v_proj", super_blocks("q6_k")), Override("*.o_proj", super_blocks("q3_k")))
    return Rtn(**super_blocks("q4_k", scale_search="mse", embeddings=super_blocks("q6_k"), overrides=overrides))


Case = tuple[Callable[[], PreTrainedModel], list[Pass], dict[str, int]]
CASES: dict[str, Case] = {
    "two": (small, [Rtn(bits=2, group_size=32)], {"Q4_0": 14, "F32": 7}),
    "three": (small, [Rtn(bits=3, group_size=64)], {"Q4_0": 14, "F32": 7}),
    "four": (small, [W4], {"Q4_0": 14, "F32": 7}),
    "four_rows": (small, [Rtn(bits=4, symmetric=True)], {"Q4_0": 14, "F32": 7}),
    "four_tensor": (small, [Rtn(bits=4, granularity="tensor", symmetric=True)], {"Q4_0": 14, "F32": 7}),
    "four_asymmetric": (small, [Rtn(bits=4, group_size=32)], {"Q5_0": 14, "F32": 7}),
    "five": (small, [Rtn(bits=5, group_size=32, symmetric=True)], {"Q5_0": 14, "F32": 7}),
    "six": (small, [Rtn(bits=6, group_size=32)], {"Q8_0": 14, "F32": 7}),
    "eight": (small, [Rtn(bits=8, group_size=32, symmetric=True)], {"Q8_0": 14, "F32": 7}),
    "ternary": (ternary, [Rtn(bits=2, symmetric=True)], {"TQ2_0": 7, "F32": 5}),
    "sparse": (small, [Magnitude(sparsity="2:4"), Rtn(bits=4, group_size=32)], {"Q5_0": 14, "F32": 7}),
    "some": (small, [Magnitude(sparsity=0.5), Rtn(bits=4, symmetric=True, exclude=("*.mlp.*",))],
             {"Q4_0": 8, "F32": 13}),
    "factors": (lambda: small().bfloat16(), FACTORS, {"Q4_0": 8, "F32": 11, "BF16": 2}),
    "tied": (lambda: small(tie_word_embeddings=True), [W4], {"Q4_0": 14, "F32": 6}),
    "embeddings": (lambda: small(tie_word_embeddings=True), [W4_AND_8], {"Q4_0": 14, "Q8_0": 1, "F32": 5}),
    "bfloat16": (lambda: small(rope_theta=5e5).bfloat16(), [W4], {"Q4_0": 14, "F32": 5, "BF16": 2}),
    "wide_heads": (lambda: small(head_dim=32, num_key_value_heads=1, rms_norm_eps=1e-3), [W4], {"Q4_0": 14, "F32": 7}),
    "super_blocks": (wide, [mixed()], {"Q4_K": 5, "F32": 3, "Q6_K": 3, "Q3_K": 1}),
    "mistral": (mistral, [W4], {"Q4_0": 14, "F32": 7}),
}  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Every case, in a folder of its own."""

    def make_folder(name: str, folder: Path) -> None:
        make, passes, _ = CASES[name]
        save(make(), folder / "model")
        write("llama", folder, passes, "gguf")

    return Folders(tmp_path_factory.mktemp("gguf"), make_folder)


def report_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / "report.json").read_text())
    return found["verified"]["gguf"]  # type: ignore[no-any-return]


QUICK = ("three", "four_rows", "four_asymmetric", "eight", "ternary", "sparse", "factors", "embeddings", "bfloat16")


@pytest.mark.parametrize("name", only(QUICK, CASES))
def test_every_weight_is_in_the_smallest_type_that_holds_it_and_logits_are_the_packed_models(
    name: str, written: Folders
) -> None:
    found = report_of(written / name)
    assert found["types"] == CASES[name][2]
    assert found["tensors_equal"] == sum(CASES[name][2].values())
    assert found["max_logit_difference"] == 0


@pytest.mark.parametrize("name", only(QUICK, CASES))
def test_values_are_the_packed_models_bit_for_bit_with_rows_of_queries_and_keys_in_pairs(
    name: str, written: Folders
) -> None:
    there, model = values(written / name), load_model(written / name / "out", torch.float32)
    heads = {"q": model.config.num_attention_heads, "k": model.config.num_key_value_heads}
    for i, layer in enumerate(model.model.layers):
        for leaf, module in [*layer.self_attn.named_children(), *layer.mlp.named_children()]:
            if not leaf.endswith("_proj"):
                continue
            short = leaf.removesuffix("_proj")
            kind = {"o": "attn_output"}.get(short, f"attn_{short}" if short in "qkv" else f"ffn_{short}")
            found, meant = there[f"blk.{i}.{kind}.weight"], module.dequantize()
            if short in heads:
                assert not torch.equal(found, meant)
                pairs = found.view(heads[short], -1, 2, found.shape[1])  # (head, pair, which of it, columns)
                found = torch.cat([pairs[:, :, 0], pairs[:, :, 1]], dim=1).view(meant.shape)
            assert torch.equal(found.view(torch.int32), meant.view(torch.int32)), (i, leaf)
        assert torch.equal(there[f"blk.{i}.attn_norm.weight"], layer.input_layernorm.weight)
        assert torch.equal(there[f"blk.{i}.ffn_norm.weight"], layer.post_attention_layernorm.weight)
    assert torch.equal(there["token_embd.weight"], model.model.embed_tokens.weight)
    assert torch.equal(there["output_norm.weight"], model.model.norm.weight)
    assert ("output.weight" in there) == (name not in ("tied", "embeddings"))


def test_the_head_is_packed_too_where_a_pass_took_it(tmp_path: Path) -> None:
    save(small(), tmp_path / "model")
    write("llama", tmp_path, [Rtn(bits=4, group_size=32, symmetric=True, include=("lm_head",))], "gguf")
    assert torch.equal(values(tmp_path)["output.weight"], load_model(tmp_path / "out").lm_head.dequantize())
    assert report_of(tmp_path)["max_logit_difference"] == 0


@pytest.mark.parametrize("name", ["bfloat16", "wide_heads", "tied"])
def test_the_file_says_what_the_model_is(name: str, written: Folders) -> None:
    folder, config = written / name, json.loads((written / name / "out" / "config.json").read_text())
    meant = {
        "general.architecture": "llama",
        "llama.context_length": 128,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 128,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.key_length": config["head_dim"],
        "llama.attention.value_length": config["head_dim"],
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(config["rms_norm_eps"]),
        "llama.rope.freq_base": config["rope_parameters"]["rope_theta"],
        "llama.rope.dimension_count": config["head_dim"],
        "llama.vocab_size": 256,
        "general.file_type": gguf.LlamaFileType.MOSTLY_Q4_0,
    }
    assert {key: field(folder, key) for key in meant} == meant


# --- refused ----------------------------------------------------------------------------------------------------------


def opt() -> PreTrainedModel:
    sizes = {"vocab_size": 256, "hidden_size": 64, "word_embed_proj_dim": 64, "num_attention_heads": 4, "ffn_dim": 64}
    return OPTForCausalLM(OPTConfig(**sizes, num_hidden_layers=1, max_position_embeddings=64))


def phimoe() -> PreTrainedModel:
    return make_mixture("Phimoe")


REFUSED: dict[str, tuple[Callable[[], PreTrainedModel], list[Pass], str]] = {
    "another model": (opt, [W4], "a OPTForCausalLM is not written as GGUF; known are .*llama, .*export hf, which"),
    "a known one": (phimoe, [W4], "not written as GGUF: its router weighs each of two experts by a softmax"),
    "narrow groups": (small, [Rtn(bits=4, group_size=16)],
                      "14 layers, such as .*q_proj, have groups of 16 weights; group_size: 32 would fit"),
    "pruned super-blocks": (wide, [Magnitude(sparsity="2:4"), Rtn(**super_blocks("q4_k"))],
                            "pruned weights in super-blocks that have offsets, so that no code is zero; q3_k and q6_k"),
    "odd rows": (lambda: small(intermediate_size=100), [Rtn(bits=4)],
                 "2 layers, such as .*down_proj, have rows of 100 weights, which are no whole blocks of 32"),
    "eight asymmetric bits": (small, [Rtn(bits=8)], "with symmetric: true they fit Q8_0"),
    "codebook": (small, [Codebook(bits=4)], "have a codebook, and only that of IQ4_NL is known; use a uniform"),
    "power": (small, [PowerQuant(bits=4)], "have power codes; use a uniform quantizer"),
    "outliers": (small, [Olive(bits=4)], "have outlier_victim codes; use a uniform quantizer"),
    "corrections": (small, [W4, Eora(rank=2)], "no place for low-rank corrections, and 14 layers have one"),
    "inputs": (small, [Gptq(bits=4, activation_bits=8)], "leave activation_bits out"),
    "rope": (lambda: small(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), [W4],
             "this model's rope_type, dynamic, cannot be said"),
    "activation": (lambda: small(hidden_act="gelu"), [W4], "this model's hidden_act, gelu, cannot be said"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_hold_is_refused_before_any_work(name: str, tmp_path: Path) -> None:
    make, passes, message = REFUSED[name]
    save(make(), tmp_path / "model")
    with pytest.raises(ConfigError, match=f"export\\.gguf: .*{message}"):
        write("llama", tmp_path, passes, "gguf")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.work").exists()


def test_scales_that_are_not_float16_are_noticed_when_they_are_there_and_the_work_is_kept(tmp_path: Path) -> None:
    model = small()
    model.model.layers[0].mlp.up_proj.weight.data.mul_(1e-6)
    save(model, tmp_path / "model")
    with pytest.raises(CompressError, match=r"up_proj\.weight fits no type .* scales that are not float16.*is kept"):
        write("llama", tmp_path, [W4], "gguf")
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / "out.work").glob("*.safetensors"))


def test_without_the_library_it_is_refused_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    model = nn.Sequential(nn.Linear(32, 32))
    pipeline = parse("passes: [{rtn: {bits: 4}}]\nexport: [gguf]")
    with pytest.raises(ConfigError, match=r"pip install 'compress-pipeline\[gguf\]'"):
        plan.make(pipeline, graphs.find(model), {name: p.dtype for name, p in model.named_parameters()})


def test_a_damaged_tensor_is_noticed_and_nothing_gets_the_final_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_whole = exporter.Gguf.write

    def damaging(self: exporter.Gguf, made: Any, folder: Path, final: Path, bars: Any) -> None:
        write_whole(self, made, folder, final, bars)
        data = bytearray((folder / "model.gguf").read_bytes())
        data[-40] ^= 16
        (folder / "model.gguf").write_bytes(data)

    monkeypatch.setattr(exporter.Gguf, "write", damaging)
    save(small(), tmp_path / "model")
    with pytest.raises(CompressError, match=r"model\.gguf: .* reads back differently"):
        write("llama", tmp_path, [W4], "gguf")
    assert not (tmp_path / "out").exists()


# --- with more of transformers' own -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["four", "tied", "ternary"])
def test_from_pretrained_computes_what_the_packed_model_does(name: str, written: Folders) -> None:
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM

    tokens, _ = data_for("llama")
    model = AutoModelForCausalLM.from_pretrained(written / name / "out" / "gguf", gguf_file="model.gguf")
    assert torch.equal(logits(model, tokens), logits(load_model(written / name / "out", torch.float32), tokens))
