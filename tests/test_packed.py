"""A written folder: one line loads it, it stays packed in memory, and it computes what the model in memory computes."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from selection import only
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)
from transformers.core_model_loading import Concatenate, WeightConverter, WeightRenaming
from transformers.quantizers import auto

import compress
from compress import Gptq, Magnitude, Override, Rtn, SparseGpt, Wanda
from compress.config.pipeline import Pipeline
from compress.passes import Pass
from compress.runtime.linear import PackedLinear, Quick

FILE = "compress.safetensors"


def load(folder: Path, **options: Any) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **options)
    return model


def stored(name: str, layer: PackedLinear) -> list[tuple[str, Tensor]]:
    return [(f"{name}.{leaf}", value) for leaf, value in layer.stored().items()]


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(tokens).logits
    return found


def packed_modules(model: nn.Module) -> dict[str, PackedLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear)}


def both_ways(
    model: PreTrainedModel, passes: list[Pass], folder: Path, calibration: Tensor | None = None
) -> compress.Result:
    """Compress in memory, and on disk into folder / "out"."""
    model.save_pretrained(folder / "model")
    stages = tuple((p,) for p in passes)
    compress.run(Pipeline(passes=stages), folder / "model", folder / "out", calibration=calibration)
    return compress.apply(model, passes, calibration)


def assert_same(result: compress.Result, folder: Path, tokens: Tensor) -> None:
    """Every packed weight, and the logits, bit for bit."""
    written = load(folder)
    modules = packed_modules(written)
    assert modules.keys() == result.weights.keys()
    for name, module in modules.items():
        assert torch.equal(module.dequantize(), result.weights[name].dequantize()), name
    assert torch.equal(logits(written, tokens), logits(result.model, tokens))


@pytest.fixture(scope="module")
def written(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama in 4 bits by group, half of its MLP gone; to be read only."""
    out = tmp_path_factory.mktemp("packed") / "out"
    passes = (Magnitude(sparsity="2:4", include=("*.mlp.*",)), Rtn(bits=4, group_size=32))
    compress.run(Pipeline(passes=tuple((p,) for p in passes)), tiny_folder, out)
    return out


# --- the same numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("bits", only([3], range(2, 9)))
def test_a_written_llama_computes_bit_for_bit_what_the_one_in_memory_does(
    bits: int, granularity: Any, tiny_llama: PreTrainedModel, tmp_path: Path, tokens: Tensor
) -> None:
    # Dense and sparse, affine and symmetric, in one model; every layer is compared on its own.
    group = 32 if granularity == "group" else None
    symmetric = tuple(Override(f"*.{leaf}", {"symmetric": True}) for leaf in ("v_proj", "o_proj", "down_proj"))
    quantizer = Rtn(bits=bits, granularity=granularity, group_size=group, overrides=symmetric)
    result = both_ways(tiny_llama, [Magnitude(sparsity=0.4, include=("*.mlp.*",)), quantizer], tmp_path)
    kinds = {(w.kind, w.encoding.symmetric) for w in result.weights.values() if w.encoding}
    assert kinds == {(kind, s) for kind in ("quantized", "sparse-quantized") for s in (False, True)}
    assert_same(result, tmp_path / "out", tokens)


CALIBRATED: dict[str, list[Pass]] = {
    "gptq": [Gptq(bits=3, group_size=32)],
    "gptq, act order": [Gptq(bits=4, group_size=16, act_order=True, symmetric=True)],
    "sparsegpt": [SparseGpt(sparsity=0.5)],
    "wanda and gptq": [Wanda(sparsity="2:4"), Gptq(bits=4)],
}


@pytest.mark.parametrize("name", only(["gptq, act order", "wanda and gptq"], CALIBRATED))
def test_calibrated_passes_give_the_same_numbers_on_disk_and_in_memory(
    name: str, tiny_llama: PreTrainedModel, tmp_path: Path, tokens: Tensor
) -> None:
    assert_same(both_ways(tiny_llama, CALIBRATED[name], tmp_path, tokens), tmp_path / "out", tokens)


def make_gpt2() -> PreTrainedModel:
    config = GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


def make_opt() -> PreTrainedModel:
    config = OPTConfig(
        vocab_size=256, hidden_size=64, word_embed_proj_dim=64, ffn_dim=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=128,
    )  # fmt: skip
    return OPTForCausalLM(config).eval()


@pytest.mark.parametrize(
    "passes",
    [[Rtn(bits=3, group_size=32)], [Wanda(sparsity="2:4"), Gptq(bits=5, symmetric=True)]],
    ids=["rtn", "wanda and gptq"],
)
@pytest.mark.parametrize("make", [make_gpt2, make_opt], ids=["GPT-2", "OPT"])
def test_other_architectures_are_written_and_loaded_with_the_same_numbers(
    make: Callable[[], PreTrainedModel], passes: list[Pass], tmp_path: Path, tokens: Tensor
) -> None:
    result = both_ways(make(), passes, tmp_path, tokens)
    assert_same(result, tmp_path / "out", tokens)
    biases = {n: p for n, p in load(tmp_path / "out").named_parameters() if n.endswith(".bias")}
    assert biases
    for name, value in biases.items():
        assert torch.equal(value, result.model.get_parameter(name)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [make_gpt2, make_opt], ids=["GPT-2", "OPT"])
def test_a_packed_layer_has_the_weight_of_the_layer_it_replaces(
    make: Callable[[], PreTrainedModel], dtype: torch.dtype, tmp_path: Path, tokens: Tensor
) -> None:
    result = both_ways(make(), [Rtn(bits=4, group_size=32)], tmp_path, tokens)
    model = load(tmp_path / "out", dtype=dtype)
    layers = packed_modules(model)
    assert layers
    for name, layer in layers.items():
        expected = result.model.get_submodule(name).get_parameter("weight").to(dtype)
        assert (layer.weight.dtype, layer.weight.device) == (dtype, torch.device("cpu"))
        assert torch.equal(layer.weight, expected)
        assert torch.equal(layer.double().weight, expected.double()) or dtype == torch.bfloat16
        assert not {"weight", "like"} & layer.state_dict().keys()


def test_a_pruned_model_that_is_not_quantized_is_packed_too(
    tiny_llama: PreTrainedModel, tmp_path: Path, tokens: Tensor
) -> None:
    result = both_ways(tiny_llama, [Magnitude(sparsity=0.7)], tmp_path)
    assert_same(result, tmp_path / "out", tokens)
    small, large = ((tmp_path / f).stat().st_size for f in (f"out/{FILE}", "model/model.safetensors"))
    assert small < 0.65 * large


# --- packed -----------------------------------------------------------------------------------------------------------


def data_bytes(file: Path) -> int:
    data = file.read_bytes()
    return len(data) - 8 - int.from_bytes(data[:8], "little")


def held(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds, tied tensors once."""
    kept = model.state_dict().keys()
    return {**dict(model.named_parameters()), **{n: b for n, b in model.named_buffers() if n in kept}}


def memory(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in held(model).values())


def test_the_loaded_model_holds_exactly_the_bytes_of_the_file(written: Path, tokens: Tensor) -> None:
    model = load(written)
    assert memory(model) == data_bytes(written / FILE)
    logits(model, tokens)
    assert memory(model) == data_bytes(written / FILE), "nothing was unpacked for good"


def test_no_float_copy_of_a_packed_weight_is_kept(written: Path, tokens: Tensor) -> None:
    model = load(written)
    logits(model, tokens)
    modules = packed_modules(model)
    assert len(modules) == 14
    for name, module in modules.items():
        kept = {**dict(module.named_parameters()), **dict(module.named_buffers()), **module.__dict__}
        large = [
            n for n, v in kept.items() if isinstance(v, Tensor) and v.is_floating_point() and n != "scale" and len(v)
        ]
        assert not large, name
        assert module.scale.numel() * 32 == module.in_features * module.out_features


@pytest.mark.parametrize(("hidden", "intermediate"), [(64, 128), (72, 100), (40, 75)])
def test_a_row_of_three_bit_codes_costs_three_bits_a_column_rounded_up_to_a_byte(
    hidden: int, intermediate: int, llama_maker: Callable[..., PreTrainedModel], tmp_path: Path, tokens: Tensor
) -> None:
    model = llama_maker(hidden_size=hidden, intermediate_size=intermediate, head_dim=hidden // 4)
    result = both_ways(model, [Rtn(bits=3)], tmp_path)
    stored = load_file(tmp_path / "out" / FILE)
    codes = {n.removesuffix(".codes"): v for n, v in stored.items() if n.endswith(".codes")}
    assert codes.keys() == result.weights.keys()
    for name, value in codes.items():
        columns = intermediate if name.endswith("down_proj") else hidden
        assert value.dtype == torch.uint8
        assert value.shape[1] == -(-3 * columns // 8), name
    assert_same(result, tmp_path / "out", tokens)


@pytest.mark.parametrize("make", [make_gpt2, "llama"], ids=["GPT-2", "Llama"])
def test_tied_embeddings_are_stored_once(
    make: Any, llama_maker: Callable[..., PreTrainedModel], tmp_path: Path, tokens: Tensor
) -> None:
    model = llama_maker(tie_word_embeddings=True) if make == "llama" else make()
    result = both_ways(model, [Rtn(bits=4)], tmp_path)
    stored = load_file(tmp_path / "out" / FILE)
    assert not [name for name in stored if "lm_head" in name]
    assert len([name for name, v in stored.items() if v.shape == (256, 64)]) == 1
    loaded = load(tmp_path / "out")
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert memory(loaded) == data_bytes(tmp_path / "out" / FILE)
    assert_same(result, tmp_path / "out", tokens)


def test_a_head_that_is_not_tied_can_be_packed(tiny_llama: PreTrainedModel, tmp_path: Path, tokens: Tensor) -> None:
    result = both_ways(tiny_llama, [Rtn(bits=8, group_size=32, include=("*",))], tmp_path)
    assert "lm_head" in result.weights
    assert_same(result, tmp_path / "out", tokens)


# --- what people do with a model --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", ["llama", make_gpt2, make_opt], ids=["Llama", "GPT-2", "OPT"])
def test_the_loaded_model_generates_what_the_one_in_memory_does(
    make: Any, llama_maker: Callable[..., PreTrainedModel], tmp_path: Path, tokens: Tensor
) -> None:
    result = both_ways(llama_maker() if make == "llama" else make(), [Rtn(bits=4, group_size=32)], tmp_path)
    start = tokens[:2, :8].clamp(min=3)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    said = [
        model.generate(start, attention_mask=torch.ones_like(start), **options)
        for model in (load(tmp_path / "out"), result.model)
    ]
    assert said[0].shape == (2, 14)
    assert torch.equal(*said)


def test_saving_again_keeps_every_tensor_and_the_numbers(written: Path, tmp_path: Path, tokens: Tensor) -> None:
    model = load(written)
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    before, after = held(model), held(again)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype, name
        assert torch.equal(value, after[name]), name
    assert torch.equal(logits(model, tokens), logits(again, tokens))
    configs = [
        json.loads((f / "config.json").read_text())["quantization_config"] for f in (written, tmp_path / "again")
    ]
    assert configs[0]["modules"] == configs[1]["modules"]


# transformers refuses `half()` and `float()` on a quantized model by itself, but not on a module that holds one.
CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half()": lambda m: nn.ModuleList([m]).half()[0],
    "bfloat16()": lambda m: m.bfloat16(),
    "to(bfloat16)": lambda m: m.to(torch.bfloat16),
    "to(float64)": lambda m: m.to(torch.float64),
    "half().float()": lambda m: nn.ModuleList([m]).half().float()[0],
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
def test_casting_a_model_never_rounds_its_scales(
    cast: Callable[[nn.Module], nn.Module], written: Path, tokens: Tensor
) -> None:
    model: nn.Module = load(written)
    before = {n: m.dequantize() for n, m in packed_modules(model).items()}
    expected = logits(model, tokens)
    types = {n: v.dtype for m, p in packed_modules(model).items() for n, v in stored(m, p)}
    assert torch.float16 in types.values()
    model = cast(model)
    for name, dtype in types.items():
        assert model.get_buffer(name).dtype == dtype, name
    for name, module in packed_modules(model).items():
        assert torch.equal(module.dequantize(), before[name]), name
    assert torch.allclose(logits(model, tokens).float(), expected, atol=0.05 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_in_another_type_never_rounds_the_scales(dtype: torch.dtype, written: Path, tokens: Tensor) -> None:
    wide, narrow = packed_modules(load(written)), packed_modules(load(written, dtype=dtype))
    for name, module in wide.items():
        assert torch.equal(module.dequantize(), narrow[name].dequantize()), name
    found = logits(load(written, dtype=dtype), tokens)
    assert found.dtype == dtype
    assert torch.isfinite(found).all()


def test_a_scale_too_small_for_half_precision_survives(
    tiny_llama: PreTrainedModel, tmp_path: Path, tokens: Tensor
) -> None:
    with torch.no_grad():
        tiny_llama.get_parameter("model.layers.0.mlp.up_proj.weight").mul_(1e-7)
    result = both_ways(tiny_llama, [Rtn(bits=4)], tmp_path)
    assert load(tmp_path / "out").get_buffer("model.layers.0.mlp.up_proj.scale").dtype == torch.float32
    assert_same(result, tmp_path / "out", tokens)


def test_a_copy_of_a_loaded_model_computes_the_same(written: Path, tokens: Tensor) -> None:
    model = load(written)
    assert torch.equal(logits(copy.deepcopy(model), tokens), logits(model, tokens))


def test_codes_are_not_trained(written: Path) -> None:
    packed = [t for m in packed_modules(load(written)).values() for t in held(m).values()]
    assert packed
    assert not any(t.requires_grad for t in packed)


def test_a_model_may_be_compiled_for_a_static_cache_where_every_layer_has_a_kernel(written: Path) -> None:
    """`generate` asks for it; what unpacks its weights anew in every step is not worth compiling."""
    model = AutoModelForCausalLM.from_pretrained(written)
    quantizer = model.hf_quantizer
    assert not quantizer.is_compileable
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    for layer in layers:
        layer.kernel = Quick(lambda x: x, torch.device("cpu"))
    quantizer._process_model_after_weight_loading(model)
    assert quantizer.is_compileable
    layers[-1].use(None)
    quantizer._process_model_after_weight_loading(model)
    assert not quantizer.is_compileable


def test_older_versions_of_transformers_convert_without_naming_the_model(written: Path) -> None:
    """5.17 gives the conversions alone."""
    quantizer = AutoModelForCausalLM.from_pretrained(written).hf_quantizer
    renamed = WeightRenaming("old", "new")
    merged = WeightConverter(["a", "b"], "ab", operations=[Concatenate()])
    assert quantizer.update_weight_conversions([renamed, merged]) == [renamed]


def test_a_loaded_model_shows_what_it_is_made_of(written: Path) -> None:
    assert "encoding=uniform, bits=4, groups=2, pattern=2:4, kept=0.5" in str(load(written))


# --- what must not pass for a model -----------------------------------------------------------------------------------

FOREIGN = """
import sys
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except OSError as error:
    assert "compress" not in sys.modules
    print("refused:", error)
"""


def test_a_loader_that_does_not_know_the_plug_in_stops_instead_of_running_on_random_weights(
    written: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for known in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        monkeypatch.delitem(known, "compress")
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(written)
    assert "newly initialized" not in caplog.text


@pytest.mark.real
def test_a_process_without_the_plug_in_stops_too(written: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", FOREIGN, written], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("refused: ")
    assert "newly initialized" not in ended.stderr


@pytest.fixture
def damaged(written: Path, tmp_path: Path) -> Path:
    """A copy of the folder, to be damaged."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in written.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("leaf", ["codes", "scale", "zero_point", "pattern"])
def test_a_file_without_one_of_its_tensors_is_not_loaded(leaf: str, damaged: Path) -> None:
    tensors = load_file(damaged / FILE)
    del tensors[f"model.layers.1.mlp.up_proj.{leaf}"]
    save_file(tensors, damaged / FILE, metadata={"format": "pt"})
    with pytest.raises(Exception, match=r"up_proj"):
        load(damaged)


def test_a_tensor_of_another_shape_is_not_loaded(damaged: Path) -> None:
    tensors = load_file(damaged / FILE)
    tensors["model.layers.1.mlp.up_proj.codes"] = torch.zeros(7, dtype=torch.uint8)
    save_file(tensors, damaged / FILE, metadata={"format": "pt"})
    with pytest.raises(Exception, match=r"up_proj|mismatch"):
        load(damaged)


def test_a_truncated_file_is_not_loaded(damaged: Path) -> None:
    data = (damaged / FILE).read_bytes()
    (damaged / FILE).write_bytes(data[: len(data) // 2])
    with pytest.raises(Exception, match=r"[Ee]rror|incomplete|truncated"):
        load(damaged)


@pytest.mark.parametrize("change", [{"layout": "compress-99"}, {"twist": 3}], ids=["layout", "field"])
def test_a_folder_of_a_newer_version_is_not_loaded(change: dict[str, Any], damaged: Path) -> None:
    config = json.loads((damaged / "config.json").read_text())
    config["quantization_config"]["modules"]["model.layers.0.mlp.up_proj"].update(change)
    (damaged / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="not known to this version"):
        load(damaged)
