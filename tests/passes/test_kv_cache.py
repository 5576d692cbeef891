"""The rounding of key-value caches: what is rounded and how, that the cache holds it, and where it is kept."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import compress_command
from conftest import make_llama
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import compress
from compress import KvCache, LayerDrop, Rtn
from compress.api import run as running
from compress.config.options import errors_in
from compress.encodings.cache import CacheForm, CacheGrid, Per
from compress.errors import ConfigError, NonFiniteError
from compress.export.packed import open_packed
from compress.report.report import caption
from compress.runtime.cache import cached_layers, change_cache
from compress.runtime.register import CompressConfig

pytestmark = pytest.mark.usefixtures("one_thread")

GPT2: dict[str, Any] = {"vocab_size": 256, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
NEOX: dict[str, Any] = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
BOTH: tuple[dict[str, Any], ...] = ({}, {"grid": "int", "per": "head"})  # options that have nothing in common


def states(heads: int = 2, tokens: int = 40, seed: int = 3) -> Tensor:
    return torch.randn(2, heads, tokens, 8, generator=torch.Generator().manual_seed(seed))


def largest(x: Tensor) -> Tensor:
    return x.abs().amax((0, 2, 3))


def kept_by(model: nn.Module, inputs: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """What attention layers put into the cache, before it is rounded where it is."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        def see(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            found[name] = keys, values
            return keys, values

        return see

    watched = copy.deepcopy(model)
    for name, layer in cached_layers(watched).items():
        change_cache(layer, watch(name))
    with torch.no_grad():
        watched(inputs)
    return found


def pipeline(**options: Any) -> dict[str, Any]:
    return {"products": "float32", "passes": [{"rtn": {"bits": 4, "symmetric": True}}, {"kv_cache": options}]}


def test_fp8_is_what_torch_casts_to_with_the_largest_number_at_448() -> None:
    keys, values = states(), states(seed=4) * 9
    grid = CacheGrid.fit(largest(keys), largest(values), 8, "fp8", "tensor")
    for before, after in zip((keys, values), grid.apply(keys, values), strict=True):
        scale = before.abs().max() / 448
        assert torch.equal(after, (before / scale).to(torch.float8_e4m3fn).float() * scale)


def test_even_steps_are_those_that_torch_rounds_to() -> None:
    keys, values = states(), states(seed=4)
    for bits in (4, 8):
        grid = CacheGrid.fit(largest(keys), largest(values), bits, "int", "tensor")
        scale = float(keys.abs().max() / (2 ** (bits - 1) - 1))
        after = torch.fake_quantize_per_tensor_affine(keys, scale, 0, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        assert torch.allclose(grid.apply(keys, values)[0], after, atol=1e-6)


def test_what_was_rounded_stays_as_it_is_in_every_type() -> None:
    """A cache is read many times: reading must not move what was stored."""
    for dtype in (torch.float32, torch.bfloat16):
        keys, values = states().to(dtype), states(seed=4).to(dtype)
        for grid, bits in (("fp8", 8), ("int", 8), ("int", 4)):
            made = CacheGrid.fit(largest(keys), largest(values), bits, grid, "head")  # type: ignore[arg-type]
            once = made.apply(keys, values)
            assert once[0].dtype == dtype
            assert all(torch.equal(a, b) for a, b in zip(once, made.apply(*once), strict=True))


def test_a_scale_for_each_head_loses_less_where_heads_differ() -> None:
    keys, values = states() * torch.tensor([1.0, 50.0])[:, None, None], states(seed=4)

    def error(per: Per) -> float:
        after, _ = CacheGrid.fit(largest(keys), largest(values), 8, "int", per).apply(keys, values)
        return float((after[:, 0] - keys[:, 0]).square().mean())

    assert error("head") < error("tensor") / 100


def test_zeros_alone_stay_zeros_and_larger_numbers_are_cut() -> None:
    nothing = torch.zeros(1, 1, 2, 4)
    grid = CacheGrid.fit(torch.zeros(1), torch.ones(1), 8, "fp8", "tensor")
    keys, values = grid.apply(nothing, nothing + 5)
    assert torch.equal(keys, nothing)
    assert torch.equal(values, nothing + 1)


def test_gradients_pass_as_if_nothing_were_rounded() -> None:
    keys = states().requires_grad_()
    grid = CacheGrid.fit(largest(keys.detach()), torch.ones(2), 4, "int", "tensor")
    made, _ = grid.apply(keys, states(seed=4))
    made.sum().backward()
    assert keys.grad is not None
    assert torch.equal(keys.grad, torch.ones_like(keys))
    assert torch.equal(made.detach(), grid.apply(keys.detach(), states(seed=4))[0])


def test_scales_are_those_of_the_largest_keys_behind_the_rotary_embedding(tiny_llama: PreTrainedModel) -> None:
    data = torch.randint(256, (4, 24))
    result = compress.apply(tiny_llama, [KvCache(per="head")], calibration=data, products="float32")
    seen = kept_by(tiny_llama, data)
    layers = result.report.caches[0]["layers"]
    assert layers.keys() == seen.keys()
    for name, (keys, values) in seen.items():
        for leaf, x in (("k_scale", keys), ("v_scale", values)):
            assert torch.allclose(torch.tensor(layers[name][leaf]), largest(x) / 448, rtol=1e-6)
    before = tiny_llama.get_submodule("model.layers.0.self_attn.k_proj")
    plain = largest(before(tiny_llama.model.embed_tokens(data)).view(4, 24, -1, 16).transpose(1, 2))
    assert not torch.allclose(largest(seen["model.layers.0.self_attn"][0]), plain)  # they are turned by then


def test_the_cache_holds_rounded_numbers_and_the_model_computes_the_same_without_it(
    tiny_llama: PreTrainedModel,
) -> None:
    data = torch.randint(256, (4, 24))
    model = compress.apply(tiny_llama, [KvCache(grid="int", bits=4)], calibration=data).model
    scales = model_scales(model)
    with torch.no_grad():
        whole = model(data).logits
        first = model(data[:, :10], use_cache=True)
        rest = model(data[:, 10:], past_key_values=first.past_key_values)
        assert torch.allclose(whole[:, 10:], rest.logits, atol=1e-5)
        assert float((whole - tiny_llama(data).logits).abs().max()) > 1e-3
    for layer, (k_scale, v_scale) in zip(rest.past_key_values.layers, scales, strict=True):
        for x, scale in ((layer.keys, k_scale), (layer.values, v_scale)):
            codes = x / scale
            assert torch.allclose(codes, codes.round(), atol=1e-4)
            assert 7 <= int(codes.abs().max().round()) <= 8


def model_scales(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    grids = [hook.change.__self__ for layer in cached_layers(model).values()
             for hook in layer._forward_pre_hooks.values()]  # fmt: skip
    return [(grid.k_scale, grid.v_scale) for grid in grids]


def test_the_result_is_measured_with_the_rounded_cache_and_the_original_without(tiny_llama: PreTrainedModel) -> None:
    data = torch.randint(256, (4, 24))
    options: dict[str, Any] = {"calibration": data, "evaluation": data, "products": "float32"}
    row = compress.apply(tiny_llama, [KvCache(grid="int", bits=4)], **options).report.rows
    assert row[0].perplexity == compress.apply(tiny_llama, [Rtn(bits=8)], **options).report.rows[0].perplexity
    assert row[1].kl is not None
    assert row[1].kl > 1e-5
    fine = compress.apply(tiny_llama, [KvCache(grid="int")], **options).report.rows[1].kl
    assert fine is not None
    assert fine < row[1].kl / 20


def test_a_quantizer_behind_it_sees_what_the_rounded_cache_makes(tiny_llama: PreTrainedModel) -> None:
    data, quantizer = torch.randint(256, (4, 24)), compress.Gptq(bits=3, include=("*.1.*",))
    coarse = KvCache(grid="int", bits=4)
    alone = compress.apply(tiny_llama, [quantizer], calibration=data).weights
    behind = compress.apply(tiny_llama, [coarse, quantizer], calibration=data).weights
    name = "model.layers.1.self_attn.q_proj"
    assert not torch.equal(alone[name].dequantize(), behind[name].dequantize())


@pytest.mark.parametrize("options", BOTH, ids=str)
def test_the_folder_loads_with_its_scales_and_computes_what_was_measured(
    options: dict[str, Any], tiny_folder: Path, tmp_path: Path
) -> None:
    data = torch.randint(256, (4, 24))
    report = compress.run(pipeline(**options), tiny_folder, tmp_path / "out", calibration=data, evaluation=data)
    assert report.verified["max_logit_difference"] == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["caches"] == report.caches
    stored = load_file(tmp_path / "out" / "compress.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, scales in report.caches[0]["layers"].items():
        for leaf, value in scales.items():
            assert stored[f"{name}.{leaf}"].tolist() == value == model.get_buffer(f"{name}.{leaf}").tolist()
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(model(data).logits, again(data).logits)
        assert torch.equal(model(data).logits, copy.deepcopy(model)(data).logits)


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = torch.randint(256, (4, 24))
    compress.run(pipeline(), tiny_folder, tmp_path / "whole", calibration=data)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(running, "_export", stop)
        with pytest.raises(KeyboardInterrupt):
            compress.run(pipeline(), tiny_folder, tmp_path / "out", calibration=data)
    with monkeypatch.context() as patched:  # what is finished is not measured again
        patched.setattr("compress.engine.cache_stage._seen", stop)
        compress.run(pipeline(), tiny_folder, tmp_path / "out", calibration=data)
    first, second = (tmp_path / name / "compress.safetensors" for name in ("whole", "out"))
    assert first.read_bytes() == second.read_bytes()


def test_include_and_exclude_choose_attention_layers(tiny_llama: PreTrainedModel) -> None:
    data = torch.randint(256, (4, 24))
    result = compress.apply(tiny_llama, [KvCache(exclude=("*.0.*",))], calibration=data)
    assert list(result.report.caches[0]["layers"]) == ["model.layers.1.self_attn"]
    with pytest.raises(ConfigError, match=r"include: '\*\.mlp' matches no attention layer"):
        compress.apply(tiny_llama, [KvCache(include=("*.mlp",))], calibration=data)
    with pytest.raises(ConfigError, match="leave no attention layer whose cache could be rounded"):
        compress.apply(tiny_llama, [KvCache(exclude=("*",))], calibration=data)


@pytest.mark.parametrize(
    ("make", "layer"),
    [
        (lambda: GPT2LMHeadModel(GPT2Config(**GPT2)), "transformer.h.0.attn"),  # no rotary embedding
        (lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**NEOX)), "gpt_neox.layers.0.attention"),  # another name of the cache
    ],
    ids=("gpt2", "gpt_neox"),
)
def test_other_families_have_caches_too(make: Callable[[], PreTrainedModel], layer: str) -> None:
    torch.manual_seed(1)
    model, data = make().eval(), torch.randint(256, (4, 24))
    result = compress.apply(model, [KvCache()], calibration=data, products="float32")
    keys, _ = kept_by(model, data)[layer]
    (scale,) = result.report.caches[0]["layers"][layer]["k_scale"]
    assert scale == pytest.approx(float(keys.abs().max()) / 448, rel=1e-6)
    with torch.no_grad():
        first = result.model(data[:, :10], use_cache=True)
        rest = result.model(data[:, 10:], past_key_values=first.past_key_values).logits
        assert torch.allclose(result.model(data).logits[:, 10:], rest, atol=1e-5)


def latent() -> PreTrainedModel:
    small: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "vocab_size": 64}
    ranks: dict[str, Any] = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2, "v_head_dim": 4}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**small, **ranks, **heads, num_hidden_layers=1)).eval()


def encoder() -> PreTrainedModel:
    size: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    return BertForMaskedLM(BertConfig(**size, num_attention_heads=2)).eval()


def both() -> PreTrainedModel:
    size: dict[str, Any] = {"vocab_size": 64, "d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**size)).eval()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (latent, "engines keep latents of model.layers.0.self_attn of DeepseekV3ForCausalLM, not keys and values"),
        (encoder, "BertForMaskedLM does not write one token after the other, so it keeps no keys and values"),
        (both, "T5ForConditionalGeneration has an encoder and a decoder"),
    ],
    ids=("latent", "encoder", "both"),
)
def test_models_without_such_a_cache_are_refused_before_the_run(make: Callable[[], PreTrainedModel], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        compress.apply(make(), [KvCache()], calibration=torch.randint(64, (2, 8)))


def test_impossible_options_and_orders_are_refused_before_the_run(tiny_llama: PreTrainedModel) -> None:
    data = torch.randint(256, (4, 24))
    assert [e.option for e in errors_in(KvCache(bits=4))] == ["bits"]
    assert not errors_in(KvCache(bits=4, grid="int"))
    with pytest.raises(ConfigError, match="is rounded already; round that of each layer once"):
        compress.apply(tiny_llama, [KvCache(), KvCache(grid="int")], calibration=data)
    with pytest.raises(ConfigError, match="kv_cache has measured them; put kv_cache behind it"):
        compress.apply(tiny_llama, [KvCache(), LayerDrop(blocks=1)], calibration=data)
    with pytest.raises(ConfigError, match="kv_cache learns from data, and `calibration:` is missing"):
        compress.apply(tiny_llama, [KvCache()])
    bad = make_llama()
    bad.model.layers[0].self_attn.v_proj.weight.data.mul_(1e38)
    with pytest.raises(NonFiniteError, match=r"keys or values of model\.layers\.1\.self_attn are NaN or infinite"):
        compress.apply(bad, [KvCache()], calibration=data)


def test_commands_say_what_becomes_of_the_cache(tiny_folder: Path, tmp_path: Path) -> None:
    steps = {**pipeline(per="head"), "calibration": {"source": "demo", "samples": 2, "length": 16}}
    (tmp_path / "steps.yaml").write_text(json.dumps(steps))
    planned = compress_command("plan", tmp_path / "steps.yaml", "demo", "--json")
    assert json.loads(planned.out)["passes"][1]["becomes"] == "keys and values of 6 layers in fp8 per head"
    report = compress.run(pipeline(), tiny_folder, tmp_path / "out", calibration=torch.randint(256, (2, 16)))
    assert "2 layers in fp8 per tensor: 128 bytes of cache for a token instead of 256 at 16 bits" in caption(report)
    assert (
        "keys and values of 2 attention layers in fp8 per tensor" in compress_command("inspect", tmp_path / "out").out
    )


def test_damaged_descriptions_say_which_layer() -> None:
    good = CacheForm(heads=2).to_json()
    assert CompressConfig(caches={"a": good}).cache_forms()["a"] == CacheForm(heads=2)
    damaged: list[Any] = [{**good, "bits": 4}, {**good, "grid": "nf4"}, {**good, "heads": 0}, {**good, "more": 1}, 3]
    for form in damaged:
        with pytest.raises(ValueError, match=r"^a: "):
            CompressConfig(caches={"a": form}).cache_forms()


def test_a_folder_without_a_scale_does_not_load(tiny_folder: Path, tmp_path: Path) -> None:
    compress.run(pipeline(), tiny_folder, tmp_path / "out", calibration=torch.randint(256, (2, 16)))
    file = tmp_path / "out" / "compress.safetensors"
    stored = load_file(file)
    del stored["model.layers.1.self_attn.v_scale"]
    save_file(stored, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.v_scale"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with pytest.raises(compress.CompressError, match=r"model\.layers\.1\.self_attn\.v_scale"):
        open_packed(tmp_path / "out")
