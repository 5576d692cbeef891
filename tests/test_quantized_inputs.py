"""Layers that round their inputs: the same in memory, while compressing, on disk and after loading."""

import copy
import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import compress_command
from selection import only
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
)

import compress
from compress import ActivationSparsity, FlexRound, Gptq, Olive, Override, PowerQuant, Rtn
from compress.checkpoint import opening
from compress.config.pipeline import Calibration, Pipeline
from compress.encodings import InputForm, Weight, fit_inputs, pack
from compress.encodings.inputs import TensorSteps
from compress.errors import ConfigError
from compress.passes import PASSES, ModelPass, Pass
from compress.passes.base import Block
from compress.passes.quantize.activations import ActivationOptions
from compress.runtime.conv import PackedConvolution
from compress.runtime.packed import PackedModule

pytestmark = pytest.mark.usefixtures("one_thread")

TOKEN = {"activation_bits": 8}
TENSOR: dict[str, Any] = {"activation_bits": 8, "activation_scale": "tensor"}
PAIRS: dict[str, Any] = {"activation_bits": 4, "activation_scale": "tensor", "activation_grid": "olive"}
QUANTIZERS = [cls for cls in PASSES if issubclass(cls, ActivationOptions)]
WAYS: dict[str, list[Pass]] = {
    "rtn, per token": [Rtn(bits=8, **TOKEN)],
    "rtn, per tensor": [Rtn(bits=8, **TENSOR)],
    "gptq, 4 bits per token": [Gptq(bits=4, activation_bits=4)],
    "gptq, per tensor": [Gptq(bits=4, group_size=32, **TENSOR)],
    "olive": [Olive(normal="int4", lower=1.0, upper=1.4, step=0.2, **PAIRS)],
    "power": [PowerQuant(bits=4, **PAIRS | {"activation_grid": "power"})],
    "flexround": [FlexRound(bits=4, steps=3, **TENSOR)],
    "skipped": [ActivationSparsity()],
    "codes, skipped": [Gptq(bits=4, group_size=32), ActivationSparsity(criterion="teal")],
    "different for some": [Rtn(bits=8, **TENSOR, overrides=(Override("*1.*", TOKEN | {"activation_scale": "token"}),))],
}
EVERYWHERE = [
    *(("Llama", way) for way in WAYS),
    *(("GPT-2", way) for way in ("rtn, per token", "rtn, per tensor", "olive")),
]
QUICK = [("Llama", "rtn, per token"), ("Llama", "codes, skipped"), ("GPT-2", "rtn, per tensor")]


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(tokens).logits
    return found


def make_gpt2() -> PreTrainedModel:
    config = GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


def steps(passes: list[Pass]) -> Pipeline:
    return Pipeline(passes=tuple((p,) for p in passes))


def written(model: PreTrainedModel, passes: list[Pass], folder: Path, **data: Tensor) -> compress.Report:
    model.save_pretrained(folder / "model")
    return compress.run(steps(passes), folder / "model", folder / "out", **data)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def grids(result: compress.Result) -> dict[str, str]:
    return {name: str(w.inputs.form) for name, w in result.weights.items() if w.inputs is not None}


# --- packed and in memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "way"), only(QUICK, EVERYWHERE))
def test_a_written_model_computes_bit_for_bit_what_the_one_in_memory_does(
    kind: str,
    way: str,
    tiny_llama: PreTrainedModel,
    tmp_path: Path,
    tokens: Tensor,
    evaluation_tokens: Tensor,
) -> None:
    model, passes = tiny_llama if kind == "Llama" else make_gpt2(), WAYS[way]
    report = written(model, passes, tmp_path, calibration=tokens, evaluation=evaluation_tokens)
    assert report.verified["max_logit_difference"] == 0
    result = compress.apply(model, passes, calibration=tokens, evaluation=evaluation_tokens)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded, tokens), logits(result.model, tokens))
    assert [row.perplexity for row in report.rows] == [row.perplexity for row in result.report.rows]
    assert len(grids(result)) == len(result.weights)
    for name, weight in result.weights.items():
        module = loaded.get_submodule(name)
        assert isinstance(module, PackedModule)
        assert weight.inputs is not None
        x = 3 * torch.randn(5, module.spec.shape[1])
        assert torch.equal(module.rounded(x), weight.inputs.apply(x)), name
        assert not torch.equal(module.rounded(x), x)


def test_a_loaded_model_is_saved_and_loaded_again_with_its_grids(
    tiny_llama: PreTrainedModel, tmp_path: Path, tokens: Tensor
) -> None:
    written(tiny_llama, WAYS["rtn, per tensor"], tmp_path, calibration=tokens)
    once = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    once.save_pretrained(tmp_path / "again")
    expected = logits(once, tokens)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again, tokens), expected)
    layer = again.model.layers[0].mlp.up_proj.half()
    assert layer.input_scale.dtype == torch.float32
    assert "inputs=int8 per tensor" in str(layer)


def test_the_model_given_back_rounds_its_inputs_and_so_does_a_copy(tiny_llama: PreTrainedModel, tokens: Tensor) -> None:
    before = hooks(tiny_llama)
    result = compress.apply(tiny_llama, [Rtn(bits=8, activation_bits=2)])
    weights_only = compress.apply(tiny_llama, [Rtn(bits=8)])
    assert hooks(tiny_llama) == hooks(weights_only.model) == before
    assert hooks(result.model) == before + len(result.weights)
    found = logits(result.model, tokens)
    assert not torch.allclose(found, logits(weights_only.model, tokens), atol=0.1)
    twin = copy.deepcopy(result.model)
    assert torch.equal(logits(twin, tokens), found)
    for module in result.model.modules():
        module._forward_pre_hooks.clear()
    assert torch.equal(logits(result.model, tokens), logits(weights_only.model, tokens))
    assert torch.equal(logits(twin, tokens), found)


def test_a_run_that_was_cut_short_ends_with_the_same_files(
    tiny_folder: Path, tmp_path: Path, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[Pass] = [
        Gptq(bits=4, include=("*.mlp.*",), **TENSOR),
        Rtn(bits=4, include=("*.self_attn.*",), **PAIRS),
    ]
    files = ("compress.safetensors", "config.json")
    compress.run(steps(passes), tiny_folder, tmp_path / "whole", calibration=tokens)
    from compress.engine import ledger
    from compress.io import atomic

    publish = atomic.publish
    for allowed in (1, 2, 4):
        left = allowed

        def counted(temporary: Path, final: Path) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            publish(temporary, final)

        with monkeypatch.context() as patch:
            for module in (atomic, ledger):
                patch.setattr(module, "publish", counted)
            with pytest.raises(KeyboardInterrupt):
                compress.run(steps(passes), tiny_folder, tmp_path / "cut", calibration=tokens)
    compress.run(steps(passes), tiny_folder, tmp_path / "cut", calibration=tokens)
    for name in files:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# --- while compressing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [TOKEN, TENSOR], ids=["per token", "per tensor"])
def test_measuring_rounds_inputs_after_the_pass_and_never_those_of_the_original(
    options: dict[str, Any], tiny_llama: PreTrainedModel, tokens: Tensor, evaluation_tokens: Tensor
) -> None:
    result = compress.apply(tiny_llama, [Rtn(bits=8, **options)], calibration=tokens, evaluation=evaluation_tokens)
    original, after = (row.perplexity for row in result.report.rows)
    quality = compress.evaluate(result.model, evaluation_tokens, against=tiny_llama)
    assert original == compress.evaluate(tiny_llama, evaluation_tokens).perplexity
    assert after == quality.perplexity
    assert result.report.rows[1].kl == quality.kl


@pytest.mark.parametrize("pass_", [Gptq(bits=3), FlexRound(bits=3, steps=5)], ids=lambda p: p.key)
def test_a_block_learns_as_without_rounded_inputs_from_what_blocks_that_round_theirs_put_out(
    pass_: Gptq | FlexRound, tiny_llama: PreTrainedModel, tokens: Tensor
) -> None:
    plain, rounded = (
        compress.apply(tiny_llama, [replace(pass_, activation_bits=bits)], calibration=tokens).weights
        for bits in (None, 2)
    )
    same = {n: bool((plain[n].dequantize() == rounded[n].dequantize()).all()) for n in plain}
    assert {n for n in same if same[n]} == {n for n in same if n.startswith("model.layers.0.")}


@pytest.mark.parametrize("fused", [False, True], ids=["in turn", "fused"])
def test_a_block_is_learned_with_its_other_layers_rounding_from_outputs_of_an_original_that_never_does(
    fused: bool, tiny_llama: PreTrainedModel, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, made = [], []
    run = FlexRound.run

    def spy(self: FlexRound, block: Block) -> Any:
        numbers, data = torch.arange(len(tokens)), block.data
        wanted.append(data.outputs.take(numbers))
        made.append(data.call({n: t.weight for n, t in block.targets.items()}, data.inputs.take(numbers), numbers))
        return run(self, block)

    monkeypatch.setattr(FlexRound, "run", spy)
    others = Rtn(bits=8, activation_bits=2, include=("*.mlp.*",))
    learned = FlexRound(bits=8, steps=1, include=("*.self_attn.*",))
    passes: list[Any] = [[others, learned]] if fused else [others, learned]
    compress.apply(tiny_llama, passes, calibration=tokens, products="float32")
    with torch.no_grad():
        plain = tiny_llama(tokens, output_hidden_states=True).hidden_states[1]
        compress.apply(tiny_llama, [others], inplace=True)
        rounded = tiny_llama(tokens, output_hidden_states=True).hidden_states[1]
    assert torch.allclose(wanted[0], plain, atol=1e-5)
    assert torch.allclose(made[0], rounded, atol=1e-5)
    assert float((plain - rounded).norm() / plain.norm()) > 0.1


def test_the_range_of_a_static_grid_is_that_of_the_inputs_that_arrive(
    tiny_llama: PreTrainedModel, tokens: Tensor
) -> None:
    seen: dict[str, list[Tensor]] = {}
    names = [f"model.layers.0.{leaf}" for leaf in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")]
    handles = [
        tiny_llama.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, []).append(args[0].flatten(0, -2))
        )
        for name in names
    ]
    logits(tiny_llama, tokens)
    for handle in handles:
        handle.remove()
    result = compress.apply(tiny_llama, [Rtn(bits=8, **TENSOR)], calibration=tokens, products="float32")
    for name, parts in seen.items():
        x = torch.cat(parts)
        expected = fit_inputs(
            InputForm(**dict.fromkeys(("bits",), 8), scale="tensor"), float(x.min()), float(x.max()), x
        )
        inputs = result.weights[name].inputs
        assert isinstance(inputs, TensorSteps)
        assert isinstance(expected, TensorSteps)
        assert torch.allclose(inputs.scale, expected.scale, rtol=1e-4)
        assert int(inputs.zero_point) == int(expected.zero_point)
    q, k = (result.weights[f"model.layers.0.self_attn.{leaf}"].inputs for leaf in ("q_proj", "k_proj"))
    assert q is k, "fed by one tensor: one range, one grid"


@pytest.mark.parametrize("cls", QUANTIZERS, ids=lambda cls: cls.key)
@pytest.mark.parametrize("scale", only(["tensor"], ["token", "tensor"]))
def test_every_quantizer_carries_it(cls: type[ActivationOptions], scale: Any) -> None:
    if scale == "tensor" and issubclass(cls, ModelPass):
        pytest.skip("reads no data")
    torch.manual_seed(6)
    model, x = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), torch.randn(64, 16)
    short: dict[str, Any] = {"steps": 2} if "steps" in {f.name for f in fields(cls)} else {}
    plain = cls(**short)
    made = compress.apply(model, [replace(plain, activation_bits=8, activation_scale=scale)], calibration=x)
    weights = compress.apply(model, [plain], calibration=x).weights
    assert grids(made) == dict.fromkeys(weights, f"int8 per {scale}")
    assert torch.equal(made.weights["0"].dequantize(), weights["0"].dequantize())
    assert {notes[cls.key]["inputs"] for notes in made.report.layers.values()} == {f"int8 per {scale}"}
    assert not made.report.fallbacks


def test_a_layer_that_passes_leave_alone_keeps_its_inputs(tiny_llama: PreTrainedModel) -> None:
    passes: list[Pass] = [
        Rtn(
            bits=8,
            include=("*.mlp.*",),
            activation_bits=4,
            overrides=(Override("*.up_proj", {"activation_bits": None}),),
        ),
        Rtn(bits=4, include=("*.self_attn.*",)),
    ]
    result = compress.apply(tiny_llama, passes)
    assert set(grids(result)) == {n for n in result.weights if n.endswith(("gate_proj", "down_proj"))}


def test_layers_outside_the_blocks_may_round_their_inputs_as_they_come_or_by_what_reached_them(
    llama_maker: Callable[..., PreTrainedModel], tokens: Tensor, tmp_path: Path
) -> None:
    model = llama_maker(tie_word_embeddings=False)
    head = Rtn(bits=8, include=("lm_head",), activation_bits=4)
    report = written(model, [head], tmp_path, evaluation=tokens)
    assert report.verified["max_logit_difference"] == 0
    assert report.inputs() == {"int4 per token": 1}
    fixed = compress.apply(model, [replace(head, activation_scale="tensor")], calibration=tokens)
    assert grids(fixed) == {"lm_head": "int4 per tensor"}


def test_blocks_that_are_single_layers_are_still_a_chain_once_they_round_their_inputs() -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    x = torch.randn(32, 16)
    first = Rtn(bits=8, activation_bits=4, include=("0", "1"))
    result = compress.apply(model, [first, FlexRound(bits=3, steps=3, include=("2",))], calibration=x)
    assert grids(result) == {"0": "int4 per token", "1": "int4 per token"}
    hidden = x
    for name in ("0", "1"):
        layer, grid = result.model.get_submodule(name), result.weights[name].inputs
        assert grid is not None
        hidden = nn.functional.linear(grid.apply(hidden), layer.weight, layer.bias)
    assert torch.equal(result.model(x), result.model[2](hidden))


# --- convolutions -----------------------------------------------------------------------------------------------------


def net() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(72, 5),
    )


@pytest.mark.parametrize("options", [TENSOR, PAIRS], ids=["int", "olive"])
def test_a_convolution_rounds_its_input_packed_as_in_memory(options: dict[str, Any]) -> None:
    model, images = net(), torch.randn(6, 3, 8, 8)
    result = compress.apply(model, [Rtn(bits=8, **options)], calibration=images)
    assert set(grids(result)) == {"0", "2", "5"}
    for name in ("0", "2"):
        spec, tensors = pack(result.weights[name])
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Conv2d)
        packed = PackedConvolution(spec, layer)
        packed.load_state_dict({**tensors, "bias": layer.bias})
        x = torch.randn(2, layer.in_channels, 9, 9)
        with torch.no_grad():
            assert torch.equal(packed(x), result.model.get_submodule(name)(x))
            assert not torch.equal(packed(x), layer(x))


def test_an_image_classifier_rounds_its_inputs_from_its_folder_too(tmp_path: Path) -> None:
    config = ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=4
    )
    ResNetForImageClassification(config).eval().save_pretrained(tmp_path / "model")
    images, labels = torch.randn(6, 1, 16, 16), torch.arange(6) % 4
    report = compress.run(
        steps([Rtn(bits=8, **TENSOR)]),
        tmp_path / "model",
        tmp_path / "out",
        calibration=images,
        evaluation=(images, labels),
    )
    assert report.verified["max_logit_difference"] == 0
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    packed = [m for m in loaded.modules() if isinstance(m, PackedConvolution)]
    assert packed
    assert all(m.spec.inputs == InputForm(bits=8, scale="tensor") for m in packed)


def test_a_scale_a_token_is_refused_for_convolutions() -> None:
    with pytest.raises(ConfigError, match=r"0, 2: a convolution has no tokens.*activation_scale: tensor"):
        compress.apply(net(), [Rtn(bits=8, **TOKEN)])
    assert set(grids(compress.apply(net(), [Rtn(bits=8, **TOKEN, include=("5",))]))) == {"5"}


# --- said -------------------------------------------------------------------------------------------------------------


def test_the_report_the_card_the_plan_and_inspect_say_how_inputs_are_rounded(
    tiny_folder: Path, tmp_path: Path, tokens: Tensor
) -> None:
    pipeline = tmp_path / "p.yaml"
    rtn = "{bits: 8, activation_bits: 8, overrides: [{match: '*.down_proj', activation_bits: 4}]}"
    pipeline.write_text(f"passes: [{{rtn: {rtn}}}]\n")
    report = compress.run(pipeline, tiny_folder, tmp_path / "out")
    assert report.inputs() == {"int8 per token": 12, "int4 per token": 2}
    assert report.layers["model.layers.0.mlp.up_proj"]["rtn"]["inputs"] == "int8 per token"
    saved = json.loads((tmp_path / "out" / "report.json").read_text())
    assert saved["layers"]["model.layers.1.mlp.down_proj"]["rtn"]["inputs"] == "int4 per token"
    assert "inputs of 12 layers in int8 per token" in (tmp_path / "out" / "README.md").read_text()
    told = compress_command("inspect", tmp_path / "out", "--json")
    assert {row["layer"]: row["inputs"] for row in json.loads(told.out)}[
        "model.layers.0.mlp.down_proj"
    ] == "int4 per token"
    table = compress_command("inspect", tmp_path / "out").out
    assert "inputs" in table
    assert "per token" in table
    assert "inputs int8 per token" in compress_command("plan", pipeline, tiny_folder, "--json").out


def test_nothing_is_said_of_inputs_that_are_left_alone(tiny_folder: Path, tmp_path: Path) -> None:
    report = compress.run(steps([Rtn(bits=8)]), tiny_folder, tmp_path / "out")
    assert report.inputs() == {}
    assert "inputs" not in (tmp_path / "out" / "README.md").read_text().split("## Pipeline")[0]
    assert "inputs" not in compress_command("inspect", tmp_path / "out").out


def test_the_plan_knows_the_size_of_static_grids(tiny_folder: Path, tmp_path: Path, tokens: Tensor) -> None:
    from compress.planning import plan

    opened = opening.open_model(tiny_folder)
    pipeline = replace(steps([Rtn(bits=8, **TENSOR)]), calibration=Calibration())
    made = plan.make(
        replace(pipeline, calibration=replace(pipeline.calibration, length=32)), opened.artifact.graph, opened.dtypes
    )
    report = compress.run(pipeline, tiny_folder, tmp_path / "out", calibration=tokens)
    assert report.rows[-1].bytes == made.final_bytes


def test_a_later_weight_keeps_the_grid_that_an_earlier_pass_gave() -> None:
    from compress.engine.validate import observed
    from compress.models.site import Site, TensorRef
    from compress.passes.base import Edit

    grid = InputForm(bits=8).input_grid({})
    w = torch.randn(4, 8)
    after, _ = observed(
        Site("a", (4, 8), TensorRef("a.weight"), 0), Rtn(), Weight(w, inputs=grid), w, Edit(weight=w), torch.float32
    )
    assert after.inputs is grid
