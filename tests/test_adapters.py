"""LoRA adapters: models themselves, parents of merges, and what is taken from a fine-tune.

What a merged weight must be is written here as PEFT's formulas; 16 kinds of adapters in three types were equal, to the
bit, to what `merge_and_unload` of PEFT 0.21.2 makes of them.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from commands import compress_command, make_text_model
from conftest import make_llama
from safetensors.torch import load_file, save_file
from selection import only
from torch import Tensor, nn

import compress
from compress.checkpoint.opening import load_measured, open_model
from compress.config.mergekit import convert
from compress.errors import UsageError
from compress.models.adapters import existing_parts, locate
from compress.passes.solvers.truncated import truncated

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
RANK, ALPHA = 4, 12
LAYERS = ("self_attn.q_proj", "mlp.down_proj")


def write_adapter(folder: Path, base: object, tensors: Mapping[str, Tensor], **settings: Any) -> Path:
    """A folder as PEFT's `save_pretrained` writes it."""
    folder.mkdir(parents=True)
    save_file({f"base_model.model.{n}": t.contiguous() for n, t in tensors.items()}, folder / WEIGHTS)
    said = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": RANK, "lora_alpha": ALPHA, **settings}
    (folder / CONFIG).write_text(json.dumps(said))
    return folder


def change(folder: Path, **settings: Any) -> None:
    file = folder / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def factors(layer: str, out: int, inside: int, rank: int = RANK) -> dict[str, Tensor]:
    """A and B of one layer, large enough to matter."""
    a, b = 0.3 * torch.randn(rank, inside), 0.3 * torch.randn(out, rank)
    return {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}


def of_llama(layers: tuple[str, ...] = LAYERS, rank: int = RANK) -> dict[str, Tensor]:
    """Factors for the model of `make_llama`."""
    sizes = {"self_attn.q_proj": (64, 64), "self_attn.v_proj": (32, 64), "mlp.down_proj": (64, 128)}
    found: dict[str, Tensor] = {}
    for block in range(2):
        for layer in layers:
            found |= factors(f"model.layers.{block}.{layer}", *sizes[layer], rank)
    return found


def saved(model: transformers.PreTrainedModel, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def values(model: object) -> dict[str, Tensor]:
    """Parameters and buffers as passes start from them."""
    artifact = open_model(model).artifact
    return {name: artifact.tensor(name) for name, _ in artifact.graph.tensors()}


def product(tensors: Mapping[str, Tensor], layer: str, scale: float) -> Tensor:
    return (tensors[f"{layer}.lora_B.weight"].float() @ tensors[f"{layer}.lora_A.weight"].float()) * scale


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in bfloat16, in several files: to be read only."""
    folder = tmp_path_factory.mktemp("adapters") / "base"
    saved(make_llama().bfloat16(), folder, max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", base, of_llama())


@pytest.fixture
def merged(adapter: Path, tmp_path: Path) -> Path:
    """The same model as a plain folder."""
    model = transformers.AutoModelForCausalLM.from_pretrained(adapter_base(adapter))
    for name, value in values(adapter).items():
        model.get_parameter(name).data.copy_(value)
    return saved(model, tmp_path / "merged")


def adapter_base(adapter: Path) -> Path:
    return Path(json.loads((adapter / CONFIG).read_text())["base_model_name_or_path"])


# --- what an adapter makes of its base --------------------------------------------------------------------------------


def rounded(weight: Tensor, delta: Tensor) -> Tensor:
    return (weight.float() + delta).to(weight.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_product_is_added_in_float32_and_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    before = saved(make_llama().to(dtype), tmp_path / "base", max_shard_size="50KB")
    tensors = {name: value.bfloat16() for name, value in of_llama().items()}  # as trainers may save them
    for rooted in (False, True):
        folder = write_adapter(tmp_path / f"adapter-{rooted}", before, tensors, use_rslora=rooted)
        scale = ALPHA / (math.sqrt(RANK) if rooted else RANK)
        old, new = values(before), values(folder)
        changed = {f"model.layers.{block}.{layer}.weight" for block in (0, 1) for layer in LAYERS}
        for name, value in new.items():
            assert value.dtype == dtype
            layer = name.removesuffix(".weight")
            wanted = rounded(old[name], product(tensors, layer, scale)) if name in changed else old[name]
            assert torch.equal(value, wanted), name
            assert torch.equal(value, old[name]) == (name not in changed)


def test_pieces_are_those_of_the_whole(adapter: Path) -> None:
    source = open_model(adapter).artifact.source
    for name in source.names():
        whole = source.read(name)
        assert whole.shape == source.shape(name)
        assert whole.dtype == source.dtype(name)
        for start, stop in ((0, 1), (5, 37), (0, whole.numel())):
            assert torch.equal(source.piece(name, start, stop), whole.flatten()[start:stop])
    whole = source.read("model.layers.0.mlp.down_proj.weight")
    whole.zero_()  # is the reader's own
    assert source.read("model.layers.0.mlp.down_proj.weight").any()


def test_the_first_pattern_that_names_a_layer_says_its_rank_and_its_scale(base: Path, tmp_path: Path) -> None:
    tensors = of_llama(("self_attn.q_proj",)) | of_llama(("mlp.down_proj",), rank=2)
    tensors |= factors("model.layers.1.mlp.down_proj", 64, 128, rank=3)
    settings = {
        "rank_pattern": {r"layers\.1.*down_proj": 3, "down_proj": 2},
        "alpha_pattern": {"model.layers.0.self_attn.q_proj": 5, "proj": 7},
    }
    new, old = values(write_adapter(tmp_path / "adapter", base, tensors, **settings)), values(base)
    scales = {
        "model.layers.0.self_attn.q_proj": 5 / 4,
        "model.layers.1.self_attn.q_proj": 12 / 4,
        "model.layers.0.mlp.down_proj": 12 / 2,
        "model.layers.1.mlp.down_proj": 12 / 3,
    }  # `proj` is the end of no name: it would have to be a whole part of it
    for layer, scale in scales.items():
        assert torch.equal(new[f"{layer}.weight"], rounded(old[f"{layer}.weight"], product(tensors, layer, scale)))


def test_weights_that_lie_turned_get_the_product_turned(tmp_path: Path) -> None:
    size = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32, "vocab_size": 64}
    before = saved(transformers.GPT2LMHeadModel(transformers.GPT2Config(**size)), tmp_path / "base")
    tensors = factors("transformer.h.0.attn.c_attn", 96, 32) | factors("transformer.h.0.attn.c_proj", 32, 32)
    for said in (True, False):  # PEFT turns it by the kind of layer, whatever is said
        folder = write_adapter(tmp_path / f"{said}", before, tensors, fan_in_fan_out=said)
        old, new = values(before), values(folder)
        for layer in ("transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj"):
            name = f"{layer}.weight"
            assert torch.equal(new[name], old[name] + product(tensors, layer, 3).T)


def test_embeddings_and_heads_of_their_own(base: Path, tmp_path: Path) -> None:
    tensors = factors("lm_head", 256, 64)
    a, b = torch.randn(RANK, 256), torch.randn(64, RANK)
    tensors |= {"model.embed_tokens.lora_embedding_A": a, "model.embed_tokens.lora_embedding_B": b}
    folder = write_adapter(tmp_path / "adapter", base, tensors)
    old, new = values(base), values(folder)
    assert torch.equal(new["lm_head.weight"], rounded(old["lm_head.weight"], product(tensors, "lm_head", 3)))
    delta = ((b @ a).T * 3).bfloat16()  # which PEFT rounds first, here alone
    assert torch.equal(new["model.embed_tokens.weight"], old["model.embed_tokens.weight"] + delta)


def test_convolutions(tmp_path: Path) -> None:
    size = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": 4}
    before = saved(transformers.ResNetForImageClassification(transformers.ResNetConfig(**size)), tmp_path / "base")
    old = values(before)
    tensors: dict[str, Tensor] = {}
    layers = [n.removesuffix(".weight") for n in old if n.endswith("convolution.weight")]
    for layer in layers:
        out, inside, *window = old[f"{layer}.weight"].shape
        tensors[f"{layer}.lora_A.weight"] = torch.randn(RANK, inside, *window)
        tensors[f"{layer}.lora_B.weight"] = torch.randn(out, RANK, 1, 1)
    new = values(write_adapter(tmp_path / "adapter", before, tensors))
    windows = set()
    for layer in layers:
        weight = old[f"{layer}.weight"]
        a, b = (tensors[f"{layer}.lora_{part}.weight"].flatten(1) for part in "AB")
        torch.testing.assert_close(new[f"{layer}.weight"], weight + 3 * (b @ a).view(weight.shape))
        windows.add(weight.shape[2])
    assert {1, 3} <= windows


def test_rows_get_the_lengths_that_were_learned(base: Path, tmp_path: Path) -> None:
    layer = "model.layers.0.self_attn.q_proj"
    tensors = factors(layer, 64, 64) | {f"{layer}.lora_magnitude_vector": torch.rand(64) + 1}
    old, new = values(base), values(write_adapter(tmp_path / "adapter", base, tensors, use_dora=True))
    total = old[f"{layer}.weight"].float() + product(tensors, layer, 3)
    wanted = total * (tensors[f"{layer}.lora_magnitude_vector"] / total.norm(dim=1))[:, None]
    torch.testing.assert_close(new[f"{layer}.weight"].float(), wanted, rtol=2**-7, atol=1e-6)
    assert not torch.equal(new[f"{layer}.weight"], total.bfloat16())


def test_what_was_trained_whole_takes_the_place_of_the_base_s(tmp_path: Path) -> None:
    before = saved(make_llama(attention_bias=True).bfloat16(), tmp_path / "base")
    layer = "model.layers.0.self_attn.q_proj"
    whole = {
        "model.norm.weight": torch.randn(64),  # modules_to_save
        "lm_head.modules_to_save.weight": torch.randn(256, 64),
        f"{layer}.base_layer.bias": torch.randn(64),  # bias: all
        "model.layers.1.self_attn.v_proj.bias": torch.randn(32),
    }
    learned = torch.randn(64)
    layers = {**factors(layer, 64, 64), **factors("model.layers.1.self_attn.q_proj", 64, 64)}
    layers["model.layers.1.self_attn.q_proj.lora_B.bias"] = learned  # lora_bias
    old, new = values(before), values(write_adapter(tmp_path / "adapter", before, layers | whole))
    assert torch.equal(new["model.norm.weight"], whole["model.norm.weight"].bfloat16())
    assert torch.equal(new["lm_head.weight"], whole["lm_head.modules_to_save.weight"].bfloat16())
    assert torch.equal(new[f"{layer}.bias"], whole[f"{layer}.base_layer.bias"].bfloat16())
    assert torch.equal(
        new["model.layers.1.self_attn.v_proj.bias"], whole["model.layers.1.self_attn.v_proj.bias"].bfloat16()
    )
    name = "model.layers.1.self_attn.q_proj.bias"
    assert torch.equal(new[name], rounded(old[name], learned * 3))


def test_an_expert_is_found_by_the_name_that_it_has_in_the_files(tmp_path: Path) -> None:
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.MixtralConfig(vocab_size=64, num_key_value_heads=2, num_local_experts=3, **size)
    before = saved(transformers.MixtralForCausalLM(config), tmp_path / "base")
    layer = "model.layers.0.block_sparse_moe.experts.2.w1"
    assert f"{layer}.weight" in load_file(before / "model.safetensors")
    tensors = factors(layer, 48, 32)
    old, new = values(before), values(write_adapter(tmp_path / "adapter", before, tensors))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    wanted = old[name].clone()
    wanted[2, :48] += product(tensors, layer, 3)
    assert torch.equal(new[name], wanted)


def test_names_without_the_part_that_a_task_adds_are_found(base: Path, tmp_path: Path) -> None:
    tensors = factors("layers.0.self_attn.q_proj", 64, 64)  # trained as AutoModel
    old, new = values(base), values(write_adapter(tmp_path / "adapter", base, tensors, task_type="FEATURE_EXTRACTION"))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(new[name], rounded(old[name], product(tensors, "layers.0.self_attn.q_proj", 3)))


def adapted(config: Mapping[str, Any], before: Path, folder: Path, kind: Any) -> Any:
    """An adapter that PEFT itself has made and saved, and the model that it merges it into."""
    peft = pytest.importorskip("peft")
    made = peft.get_peft_model(kind.from_pretrained(before), peft.LoraConfig(**config))
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3)
    made.save_pretrained(folder)
    return peft.PeftModel.from_pretrained(kind.from_pretrained(before), folder).merge_and_unload()


SOME = ["q_proj", "v_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": SOME},
    "rooted": {"target_modules": SOME, "use_rslora": True},
    "patterns": {"target_modules": SOME, "rank_pattern": {r"layers\.1.*down_proj": 5}, "alpha_pattern": {"v_proj": 7}},
    "dora": {"target_modules": SOME, "use_dora": True},
    "biases": {"target_modules": SOME, "bias": "all"},
    "biases of layers": {"target_modules": SOME, "bias": "lora_only"},
    "biases of B": {"target_modules": SOME, "lora_bias": True},
    "embeddings": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "whole": {"target_modules": SOME, "modules_to_save": ["lm_head", "embed_tokens"]},
}


@pytest.mark.filterwarnings("ignore")  # PEFT's and its use of transformers
@pytest.mark.parametrize("name", ADAPTERS)
def test_peft_s_own_adapters_are_merged_to_its_own_bits(name: str, tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        folder = tmp_path / str(dtype)
        before = saved(make_llama(attention_bias=True, mlp_bias=True).to(dtype), folder / "base")
        wanted = adapted({"r": 8, **ADAPTERS[name]}, before, folder / "adapter", transformers.LlamaForCausalLM)
        found, old = values(folder / "adapter"), values(before)
        assert all(torch.equal(value, wanted.get_parameter(key)) for key, value in found.items())
        assert any(not torch.equal(value, old[key]) for key, value in found.items())


@pytest.mark.filterwarnings("ignore")
def test_peft_merges_what_was_extracted_to_the_same_bits(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    before = saved(make_llama(attention_bias=True), tmp_path / "base")
    after = tuned(before, tmp_path / "tuned", lambda name, value: value + 0.05 * torch.randn_like(value))
    for options in ({"rank": 4}, {"energy": 0.9}):
        compress.extract_lora(before, after, tmp_path / "out", overwrite=True, **options)
        loaded = transformers.LlamaForCausalLM.from_pretrained(before)
        wanted = peft.PeftModel.from_pretrained(loaded, tmp_path / "out").merge_and_unload()
        assert all(torch.equal(v, wanted.get_parameter(name)) for name, v in values(tmp_path / "out").items())


# --- where the base is ------------------------------------------------------------------------------------------------


def test_the_base_is_looked_for_beside_the_adapter_then_here(
    base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert locate(adapter).folders == [base, adapter]
    shutil.copytree(base, tmp_path / "near")
    change(adapter, base_model_name_or_path="../near")
    assert locate(adapter).folder.resolve() == tmp_path / "near"
    (tmp_path / "here" / "other").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    change(adapter, base_model_name_or_path="other")
    assert locate(adapter).folder.resolve() == tmp_path / "here" / "other"


def test_base_and_adapter_are_named_together(base: Path, adapter: Path, tmp_path: Path) -> None:
    wanted = values(adapter)
    change(adapter, base_model_name_or_path="./nowhere")
    both = f"{base}+{adapter}"
    assert values(both).keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in values(both).items())
    assert existing_parts(both) == [base, adapter]
    plus = tmp_path / "a+b"
    adapter.rename(plus)
    assert locate(f"{base}+{plus}").folders == [base, plus]
    change(plus, base_model_name_or_path=str(base))
    assert locate(plus).folders == [base, plus], "a folder of that name is meant before anything else"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (None, ("names no base", "BASE+")),
        ("", ("names no base", "BASE+")),
        ("./nowhere", ("the base of the adapter", "./nowhere", "BASE+")),
    ],
)
def test_a_base_that_is_not_there_is_asked_for(name: str | None, said: tuple[str, ...], adapter: Path) -> None:
    change(adapter, base_model_name_or_path=name)
    refused(adapter, *said)


def test_what_is_no_adapter_is_not_taken_for_one(base: Path, adapter: Path, tmp_path: Path) -> None:
    refused(f"{base}+{base}", "with the adapter", "holds a model's weights")
    (tmp_path / "empty").mkdir()
    refused(f"{base}+{tmp_path / 'empty'}", f"holds no {WEIGHTS}")
    second = write_adapter(tmp_path / "second", adapter, of_llama())
    refused(second, "is an adapter", "no base of another one")


# --- what is refused before any work ----------------------------------------------------------------------------------


def refused(model: object, *words: str) -> None:
    """Everything that takes a model says the same."""
    said = []
    for opening in (open_model, load_measured):
        with pytest.raises(UsageError) as caught:
            opening(model)
        said.append(str(caught.value))
    assert said[0] == said[1]
    for word in words:
        assert word in said[0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"peft_type": "IA3"}, "type 'IA3'"),
        ({"peft_type": None}, "type None"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "fused parameters"),
        ({"trainable_token_indices": [1, 2]}, "rows of the embedding"),
        ({"layer_replication": [[0, 2]]}, "blocks of the base repeated"),
        ({"alora_invocation_tokens": [5]}, "some tokens only"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is pissa_niter_4"),
        ({"r": 0}, "r is 0"),
        ({"r": "8"}, "r is '8'"),
        ({"r": True}, "r is True"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"lora_alpha": 1e999}, "lora_alpha is inf"),
        ({"rank_pattern": [4]}, "rank_pattern must map"),
        ({"rank_pattern": {"q_proj": 0.5}}, "rank_pattern: q_proj is 0.5"),
        ({"rank_pattern": {"(": 4}}, "cannot be used as a pattern"),
        ({"alpha_pattern": {"(a+)+b": 4}}, "it repeats too much"),
        ({"r": 8}, "it must be (8, "),
    ],
)
def test_a_configuration_that_means_something_else_is_refused(
    settings: dict[str, Any], said: str, adapter: Path
) -> None:
    change(adapter, **settings)
    refused(adapter, said, str(adapter))


Q = "model.layers.0.self_attn.q_proj"
HALF = {f"{Q}.lora_A.weight": torch.ones(RANK, 64)}


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (HALF, "lora_A of model.layers.0.self_attn.q_proj, and not just lora_A and lora_B"),
        (factors("model.layers.9.self_attn.q_proj", 64, 64), "the base, a LlamaForCausalLM, has none"),
        (
            factors(Q, 64, 32),
            "has shape (4, 32), and for model.layers.0.self_attn.q_proj.weight of the base it",
        ),
        (factors(Q, 32, 64), "has shape (32, 4)"),
        (factors("model.norm", 64, 64), "linear layers, embeddings and convolutions"),
        (factors("model.embed_tokens", 256, 64), "linear layers, embeddings and convolutions"),
        (factors(Q, 64, 64) | {f"{Q}.lora_B.bias": torch.ones(64)}, "changes model.layers.0.self_attn.q_proj.bias"),
        (factors(Q, 64, 64) | {"model.embed_tokens.weight": torch.ones(260, 64)}, "vocabulary of another size"),
        (factors(Q, 64, 64) | {f"{Q}.lora_E": torch.ones(4)}, "lora_E, which is no part of a plain LoRA"),
        (factors(Q, 64, 64) | {"score.weight": torch.ones(2, 64)}, "changes score.weight"),
        ({n: t.to(torch.int8) for n, t in factors(Q, 64, 64).items()}, "is int8, not numbers"),
        ({}, "holds no tensor"),
    ],
)
def test_tensors_that_do_not_fit_the_base_are_refused_by_name(
    tensors: dict[str, Tensor], said: str, base: Path, tmp_path: Path
) -> None:
    refused(write_adapter(tmp_path / "adapter", base, tensors), said, str(tmp_path / "adapter"))


def test_a_pickle_and_a_lost_configuration(adapter: Path) -> None:
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    refused(adapter, f"no {WEIGHTS}", "adapter_model.bin is a pickle, which is never loaded")
    (adapter / "adapter_model.bin").rename(adapter / WEIGHTS)
    (adapter / CONFIG).write_text("{")
    refused(adapter, CONFIG, "not JSON")
    (adapter / CONFIG).unlink()
    refused(adapter, f"without {CONFIG}")


def test_tied_tensors_do_not_change_together(tmp_path: Path) -> None:
    before = saved(make_llama(tie_word_embeddings=True), tmp_path / "base")
    refused(
        write_adapter(tmp_path / "head", before, factors("lm_head", 256, 64)), "lm_head alone", "ties to model.embed"
    )
    table = {"lora_embedding_A": torch.ones(RANK, 256), "lora_embedding_B": torch.ones(64, RANK)}
    named = {f"model.embed_tokens.{part}": value for part, value in table.items()}
    refused(write_adapter(tmp_path / "table", before, named), "model.embed_tokens alone", "ties to lm_head")
    one, other = torch.randn(256, 64), torch.randn(256, 64)
    both = {"lm_head.weight": one, "model.embed_tokens.weight": other}
    refused(write_adapter(tmp_path / "both", before, both), "which differ", "tie_word_embeddings")
    same = write_adapter(tmp_path / "same", before, {"lm_head.weight": one, "model.embed_tokens.weight": one.clone()})
    assert torch.equal(values(same)["model.embed_tokens.weight"], one)


# --- a run on an adapter ----------------------------------------------------------------------------------------------


def result(folder: Path) -> bytes:
    return (folder / "compress.safetensors").read_bytes()


def test_a_run_on_an_adapter_is_one_on_the_merged_model(
    base: Path, adapter: Path, merged: Path, tmp_path: Path
) -> None:
    steps = {"passes": [{"magnitude": {"sparsity": 0.5}}, {"rtn": {"bits": 4, "group_size": 32}}]}
    report = compress.run(steps, adapter, tmp_path / "a")
    compress.run(steps, merged, tmp_path / "b")
    compress.run(steps, base, tmp_path / "c")
    assert result(tmp_path / "a") == result(tmp_path / "b") != result(tmp_path / "c")
    assert any(str(adapter) in note and "merged" in note for note in report.notes)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert compress.run(steps, adapter, tmp_path / "a") == report, "it is this run's result"
    tensors = load_file(adapter / WEIGHTS)
    save_file({name: 2 * value for name, value in tensors.items()}, adapter / WEIGHTS)
    with pytest.raises(UsageError, match="is not the result of this run"):
        compress.run(steps, adapter, tmp_path / "a")
    with pytest.raises(UsageError, match="the model"):
        compress.run(steps, adapter, adapter / "out")


def test_the_fingerprint_is_that_of_base_and_adapter(base: Path, adapter: Path, tmp_path: Path) -> None:
    def fingerprint() -> str:
        return open_model(f"{copy}+{adapter}").artifact.source.fingerprint()

    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    seen = [fingerprint()]
    assert fingerprint() == seen[0]
    change(adapter, lora_alpha=13)
    seen.append(fingerprint())
    save_file({n: t + 1 for n, t in load_file(adapter / WEIGHTS).items()}, adapter / WEIGHTS)
    seen.append(fingerprint())
    file = sorted(copy.glob("*.safetensors"))[0]
    save_file({n: t * 2 for n, t in load_file(file).items()}, file, {"format": "pt"})
    seen.append(fingerprint())
    assert len(set(seen)) == 4
    files = open_model(f"{copy}+{adapter}").artifact.source.files()
    assert {adapter / WEIGHTS, adapter / CONFIG, *copy.glob("*.safetensors")} == set(files)


def test_check_plan_and_eval_take_adapters(tmp_path: Path) -> None:
    before = make_text_model(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", "../base", of_llama(("self_attn.q_proj",)))
    (tmp_path / "p.yaml").write_text("passes: [{rtn: {bits: 4, group_size: 32}}]\n")
    for command in ("check", "plan"):
        ended = compress_command(command, tmp_path / "p.yaml", adapter)
        assert ended.code == 0, ended.err
    options = ("--samples", 2, "--length", 32, "--json")
    found = {}
    for model in (before, adapter, f"{before}+{adapter}"):
        ended = compress_command("eval", model, "--against", adapter, *options)
        assert ended.code == 0, ended.err
        found[str(model)] = json.loads(ended.out)
    alone, direct, both = found.values()
    assert direct["kl"] == both["kl"] == 0
    assert alone["kl"] > 1e-3
    assert direct["perplexity"] == both["perplexity"] != alone["perplexity"]
    assert direct["bytes"] == alone["bytes"] + (adapter / WEIGHTS).stat().st_size


def test_an_adapter_s_own_tokenizer_travels_with_the_result(tmp_path: Path) -> None:
    before = make_text_model(tmp_path / "base")
    (before / "chat_template.jinja").write_text("the base's")
    (before / "generation_config.json").write_text('{"max_length": 7}')
    adapter = write_adapter(tmp_path / "adapter", before, of_llama(("self_attn.q_proj",)))
    steps = {"passes": [{"rtn": {"bits": 8}}]}
    compress.run(steps, adapter, tmp_path / "without")
    assert (tmp_path / "without" / "chat_template.jinja").read_text() == "the base's"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(before / name, adapter)
    settings = json.loads((adapter / "tokenizer_config.json").read_text())
    (adapter / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "{{ messages }}"}))
    compress.run(steps, adapter, tmp_path / "with")
    assert json.loads((tmp_path / "with" / "tokenizer_config.json").read_text())["chat_template"] == "{{ messages }}"
    assert not (tmp_path / "with" / "chat_template.jinja").exists(), "it would go before the adapter's"
    assert json.loads((tmp_path / "with" / "generation_config.json").read_text())["max_length"] == 7


# --- adapters in merges -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry",
    only(
        [{"ties": {"density": 0.3}}],
        [
            {"ties": {"density": 0.3}},
            {"task_arithmetic": {"scale": 0.5}},
            {"average": {}},
            {"slerp": {"t": 0.5}},
            {"compeft": {}},
        ],
    ),
    ids=lambda entry: next(iter(entry)),
)
def test_an_adapter_is_merged_as_the_model_that_it_makes(
    entry: dict[str, dict[str, Any]], base: Path, adapter: Path, merged: Path, tmp_path: Path
) -> None:
    ((method, options),) = entry.items()
    made = {}
    for name, parent in {"adapter": adapter, "both": f"{base}+{adapter}", "merged": merged}.items():
        steps = {"passes": [{method: {**options, "models": [str(parent)]}}]}
        compress.run(steps, base, tmp_path / "out" / name)
        made[name] = result(tmp_path / "out" / name)
    assert made["adapter"] == made["both"] == made["merged"]


def test_several_adapters_of_one_base_are_merged(base: Path, tmp_path: Path) -> None:
    parents = []
    for name in "ab":
        parents.append(str(write_adapter(tmp_path / name, base, of_llama())))
    compress.run({"passes": [{"task_arithmetic": {"models": parents, "scale": 1.0}}]}, base, tmp_path / "out")
    found, old = load_file(tmp_path / "out" / "compress.safetensors"), values(base)
    both = [values(parent) for parent in parents]
    name = "model.layers.0.mlp.down_proj.weight"
    wanted = old[name].float() + sum(each[name].float() - old[name].float() for each in both)
    torch.testing.assert_close(found[name], wanted.bfloat16())
    refusing = {"passes": [{"average": {"models": [parents[0]]}}]}
    with pytest.raises(UsageError, match="has 2 blocks and the base 3"):
        compress.run(refusing, saved(make_llama(num_hidden_layers=3), tmp_path / "deep"), tmp_path / "no")


@pytest.mark.parametrize("spelled", ["text", "mapping"])
def test_a_mergekit_file_with_adapters_runs(spelled: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    model: Any = f"{base}+{adapter}"
    if spelled == "mapping":
        model = {"model": {"path": str(base)}, "lora": {"path": str(adapter)}}
    entry = {"model": model, "parameters": {"weight": 1.0}}
    said = {"merge_method": "task_arithmetic", "base_model": str(base), "models": [entry]}
    (tmp_path / "merge.yaml").write_text(json.dumps(said))
    assert convert(tmp_path / "merge.yaml").model == str(base)
    ended = compress_command("init", tmp_path / "p.yaml", "--from-mergekit", tmp_path / "merge.yaml")
    assert ended.code == 0, ended.err
    ended = compress_command("run", tmp_path / "p.yaml", base, "-o", tmp_path / "out")
    assert ended.code == 0, ended.err
    name = "model.layers.0.mlp.down_proj.weight"
    torch.testing.assert_close(load_file(tmp_path / "out" / "compress.safetensors")[name], values(adapter)[name])
    head = {"merge_method": "linear", "models": [entry, {"model": str(base), "parameters": {"weight": 1.0}}]}
    (tmp_path / "linear.yaml").write_text(json.dumps(head))
    assert convert(tmp_path / "linear.yaml").model == f"{base}+{adapter}"


# --- what is taken from a fine-tune -----------------------------------------------------------------------------------


def tuned(base: Path, folder: Path, alter: Callable[[str, Tensor], Tensor]) -> Path:
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    for name, parameter in model.named_parameters():
        parameter.data = alter(name, parameter.data)
    return saved(model, folder)


def test_the_nearest_matrix_of_a_rank() -> None:
    for shape in ((20, 30), (30, 20)):
        matrix = torch.randn(shape)
        u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
        for rank in (1, 5, 20, 99):
            found = truncated(matrix, rank, None)
            best = (u[:, :rank] * s[:rank]) @ v[:rank]
            torch.testing.assert_close((found.b @ found.a).double(), best, rtol=1e-4, atol=1e-5)
            assert found.a.shape == (min(rank, 20), shape[1])
            torch.testing.assert_close(found.a.norm(), found.b.norm())
            assert found.kept == pytest.approx(float((s[:rank] ** 2).sum() / (s**2).sum()))
        shares = (s**2).cumsum(0) / (s**2).sum()
        for energy in (0.1, 0.5, 0.9, 0.999):
            rank = len(truncated(matrix, None, energy).a)
            assert shares[rank - 1] >= energy
            assert rank == 1 or shares[rank - 2] < energy
        assert len(truncated(matrix, 3, 0.999).a) == 3
    low = torch.randn(30, 2) @ torch.randn(2, 30)
    assert len(truncated(low, None, 1 - 1e-9).a) == 2


def test_an_adapter_that_was_merged_comes_back(base: Path, adapter: Path, merged: Path, tmp_path: Path) -> None:
    found = compress.extract_lora(base, merged, tmp_path / "out", rank=RANK)
    assert set(found["layers"]) == {f"model.layers.{block}.{layer}" for block in (0, 1) for layer in LAYERS}
    assert {each["rank"] for each in found["layers"].values()} == {RANK}
    assert found["error"] < 0.02, "bfloat16 has eight bits"
    assert found["whole"] == found["left_out"] == []
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["base_model_name_or_path"] == str(base)
    for name, value in values(tmp_path / "out").items():
        torch.testing.assert_close(value, values(adapter)[name], rtol=0.05, atol=0.05)
    again = compress.extract_lora(base, adapter, tmp_path / "again", rank=RANK)
    assert again == found, "from the adapter itself, too"
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()


def test_energy_gives_each_matrix_its_rank_and_the_error_is_the_reloaded_one(tmp_path: Path) -> None:
    before = saved(make_llama(attention_bias=True), tmp_path / "base")
    generator = torch.Generator().manual_seed(5)

    def alter(name: str, value: Tensor) -> Tensor:
        rank = 2 if "q_proj" in name else 30
        if value.dim() < 2:
            return value + torch.randn(value.shape, generator=generator)
        a, b = (torch.randn(size, generator=generator) for size in ((rank, value.shape[1]), (len(value), rank)))
        return value + b @ a

    after = tuned(before, tmp_path / "tuned", alter)
    found = compress.extract_lora(before, after, tmp_path / "out", energy=0.9)
    ranks = {name: each["rank"] for name, each in found["layers"].items()}
    assert max(rank for name, rank in ranks.items() if "q_proj" in name) <= 2
    assert min(rank for name, rank in ranks.items() if "q_proj" not in name) > 4
    assert found["left_out"] == []
    assert "model.norm.weight" in found["whole"]
    assert "model.layers.0.self_attn.q_proj.bias" in found["whole"]
    old, new, made = values(before), values(after), values(tmp_path / "out")
    for name, each in found["layers"].items():
        delta = new[f"{name}.weight"] - old[f"{name}.weight"]
        error = float((made[f"{name}.weight"] - new[f"{name}.weight"]).norm() / delta.norm())
        assert each["error"] == pytest.approx(error, abs=1e-4)
        assert error**2 <= 0.1 + 1e-4
    for name in found["whole"]:
        assert torch.equal(made[name], new[name])
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["modules_to_save"] == sorted(n.removesuffix(".weight") for n in found["whole"] if "norm" in n)
    assert config["bias"] == "all"
    full = compress.extract_lora(before, after, tmp_path / "full", rank=999)
    assert full["error"] < 1e-5


def test_what_an_adapter_has_no_place_for_is_listed(tmp_path: Path) -> None:
    before = saved(make_llama(tie_word_embeddings=True), tmp_path / "base")
    after = tuned(before, tmp_path / "tuned", lambda name, value: value * 1.1)
    found = compress.extract_lora(before, after, tmp_path / "out", rank=4)
    assert found["left_out"] == ["model.embed_tokens.weight"]
    assert found["error"] > 0.5
    ended = compress_command("extract-lora", before, after, "-o", tmp_path / "said", "--rank", 4)
    assert ended.code == 0, ended.err
    assert "model.layers.0.self_attn.q_proj: rank 4, error 0." in ended.out
    assert "left out, for no adapter holds them: model.embed_tokens.weight" in ended.out
    only = tuned(before, tmp_path / "only", lambda name, value: value * 1.1 if "embed" in name else value)
    norms = tuned(before, tmp_path / "norms", lambda name, value: value * 1.1 if value.dim() < 2 else value)
    for fine_tune, name in ((only, "embed_tokens.weight"), (norms, "layernorm.weight")):
        with pytest.raises(UsageError, match=f"{name}, and in no matrix that has factors"):
            compress.extract_lora(before, fine_tune, tmp_path / "no", rank=4)


def test_batch_norms_are_kept_with_their_statistics(tmp_path: Path) -> None:
    size = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": 4}
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(**size))
    before = saved(model, tmp_path / "base")
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data += 0.1 * torch.randn_like(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = module.running_mean + 1  # type: ignore[assignment]
    after = saved(model, tmp_path / "tuned")
    found = compress.extract_lora(before, after, tmp_path / "out", rank=999)
    assert found["error"] < 1e-5
    assert found["left_out"] == []
    assert any(name.endswith("num_batches_tracked") for name in found["whole"]), "PEFT asks for all of a module"
    for name, value in values(tmp_path / "out").items():
        torch.testing.assert_close(value, values(after)[name])


def test_an_extraction_that_cannot_be_is_refused_before_it(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    other = tuned(base, tmp_path / "other", lambda name, value: value * 1.1)
    deep = saved(make_llama(num_hidden_layers=3), tmp_path / "deep")
    settings = json.loads((other / "config.json").read_text())
    turned = tmp_path / "turned"
    shutil.copytree(other, turned)
    settings["rope_parameters"]["rope_theta"] = 5.0
    (turned / "config.json").write_text(json.dumps(settings))
    cases: list[tuple[object, object, dict[str, Any], str]] = [
        (base, other, {}, "say how much is kept"),
        (base, other, {"rank": 0}, "must be at least 1"),
        (base, other, {"energy": 1.5}, "above 0 and at most 1"),
        (base, base, {"rank": 4}, "the models are equal"),
        (base, deep, {"rank": 4}, "3 blocks"),
        (base, turned, {"rank": 4}, "rope_theta"),
        (adapter, other, {"rank": 4}, "is an adapter; an adapter belongs to a model"),
        (base, tmp_path / "nowhere", {"rank": 4}, "no such folder"),
    ]
    for before, after, options, said in cases:
        with pytest.raises(UsageError) as caught:
            compress.extract_lora(before, after, out, **options)
        assert said in str(caught.value)
        assert not out.exists()
    compress.extract_lora(base, other, out, rank=2)
    with pytest.raises(UsageError, match="exists; choose another"):
        compress.extract_lora(base, other, out, rank=4)
    compress.extract_lora(base, other, out, rank=4, overwrite=True)
    with pytest.raises(UsageError, match="fine-tune"):
        compress.extract_lora(base, other, other / "inside", rank=4)
