"""OUT/onnx: onnxruntime computes what the packed folder does, for every family, encoding and width."""

import json
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from families import DECODERS, FAMILIES, RECIPES, ROUNDED, compressed, inputs_of, make, rounds
from safetensors import safe_open
from selection import only

import compress
from compress import ActivationSparsity, Codebook, Genai, Magnitude, Olive, Onnx, Perp, Pipeline, PowerQuant, Rtn
from compress.api.export import refuse_exports, write_all
from compress.calibration.data import Dataset
from compress.config.reading import parse
from compress.errors import CompressError, ConfigError
from compress.export.onnx import build, exporter, trace
from compress.export.onnx.exporter import DATA, MODEL
from compress.export.onnx.session import Runner, at_level, open_session
from compress.export.packed import open_packed
from compress.models import graph as graphs
from compress.models.loading import load_model
from compress.passes import Pass
from compress.planning import plan
from compress.progress import Bars

pytestmark = pytest.mark.usefixtures("traced_once")


def exported(out: Path, family: str, to: Onnx) -> dict[str, Any]:
    made, data = open_packed(out), inputs_of(family)
    refuse_exports(made, [to])
    return write_all(made, [to], {to.key: out / to.key}, out, Dataset(*data), Bars())[to.key]


def packed(family: str, folder: Path, *passes: Pass) -> Path:
    """OUT of a family, every block worked on."""
    make(family).save_pretrained(folder / "model")
    pipeline = Pipeline(passes=tuple((p,) for p in passes))
    compress.run(pipeline, folder / "model", folder / "out", calibration=inputs_of(family)[0])
    return folder / "out"


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


@pytest.mark.parametrize(
    ("family", "style"),
    only([("llama", "kernels")], [*((f, "kernels") for f in FAMILIES), ("llama", "qdq"), ("gpt2", "qdq")]),
)
def test_every_encoding_and_width_computes_the_same_logits(family: str, style: Any, tmp_path: Path) -> None:
    seen: set[str] = set()
    for chosen in rounds(family, RECIPES):
        out = compressed(family, chosen, RECIPES, tmp_path)
        assert exported(out, family, Onnx(style=style))["max_logit_difference"] <= 1e-4, chosen
        seen |= set(chosen.values())
    assert len(seen) >= (30 if family != "resnet" else 12)


@pytest.mark.parametrize("family", only(["resnet"], sorted(set(FAMILIES) - {"llama"})))
def test_every_family_computes_the_same_logits(family: str, tmp_path: Path) -> None:
    chosen = next(rounds(family, RECIPES))
    assert exported(compressed(family, chosen, RECIPES, tmp_path), family, Onnx())["max_logit_difference"] <= 1e-4


@pytest.mark.parametrize("family", only(["vit"], ["llama", "gpt2", "resnet", "vit"]))
def test_inputs_are_rounded_to_the_same_grid(family: str, tmp_path: Path) -> None:
    for chosen in rounds(family, ROUNDED):
        found = exported(compressed(family, chosen, ROUNDED, tmp_path), family, Onnx())
        # An input half-way between two steps may go to either.
        assert found["max_logit_difference"] <= 0.02, chosen
        assert found["kl"] < 1e-4


@pytest.mark.parametrize("first", only([[Rtn(bits=4, group_size=32)]], [[], [Rtn(bits=4, group_size=32)]]), ids=len)
def test_inputs_are_skipped_by_the_same_thresholds(first: list[Pass], tmp_path: Path) -> None:
    out = packed("vit", tmp_path, *first, ActivationSparsity(skip=0.5))
    assert exported(out, "vit", Onnx(accuracy_level=1))["max_logit_difference"] <= 1e-3
    assert "input_threshold" in str(onnx.load(out / "onnx" / MODEL, load_external_data=False))


@pytest.mark.parametrize("family", only(["llama"], DECODERS))
def test_a_decoder_goes_on_from_what_it_kept(family: str, tmp_path: Path) -> None:
    out = packed(family, tmp_path, Rtn(bits=4, group_size=32))
    exported(out, family, Onnx(accuracy_level=1))
    runner, tokens = Runner(open_session(out / "onnx" / MODEL)), inputs_of(family)[0]
    with torch.no_grad():
        whole = load_model(out, torch.float32)(tokens).logits
    first, kept = runner.step(tokens[:, :7], None)
    second, kept = runner.step(tokens[:, 7:8], kept)  # one token, as when generating
    third, _ = runner.step(tokens[:, 8:], kept)
    torch.testing.assert_close(torch.cat([first, second, third], dim=1), whole, rtol=1e-5, atol=1e-5)


def test_any_number_of_rows_and_tokens_is_taken(tmp_path: Path) -> None:
    out = packed("llama", tmp_path, Rtn(bits=4, group_size=32))
    exported(out, "llama", Onnx(accuracy_level=1))
    runner, model = Runner(open_session(out / "onnx" / MODEL)), load_model(out, torch.float32)
    for rows, length in ((1, 1), (1, 30), (5, 2)):
        tokens = torch.randint(256, (rows, length))
        with torch.no_grad():
            torch.testing.assert_close(runner(tokens), model(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.real
def test_padded_positions_are_left_out(tmp_path: Path) -> None:
    out = packed("gpt", tmp_path, Rtn(bits=4))
    exported(out, "gpt", Onnx(accuracy_level=1))
    session, tokens = open_session(out / "onnx" / MODEL), torch.randint(256, (2, 12))
    mask = torch.ones_like(tokens)
    mask[1, 7:] = 0
    with torch.no_grad():
        meant = load_model(out, torch.float32)(tokens, attention_mask=mask).logits
    (found,) = session.run(["logits"], {"input_ids": tokens.numpy(), "attention_mask": mask.numpy()})
    torch.testing.assert_close(torch.from_numpy(found)[1, :7], meant[1, :7], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", only(["llama"], ["llama", "llama-tied-bfloat16"]))
def test_the_file_holds_the_packed_folders_tensors_under_their_names(family: str, tmp_path: Path) -> None:
    out = packed(family, tmp_path, Magnitude(sparsity="2:4"), Rtn(bits=3, group_size=32))
    exported(out, family, Onnx())
    there = ir.load(out / "onnx" / MODEL).graph.initializers
    with safe_open(out / "compress.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118  (not a mapping)
            value = file.get_tensor(name)
            number = there[name].const_value
            assert number is not None
            assert number.tobytes() == value.contiguous().flatten().view(torch.uint8).numpy().tobytes(), name
    embeddings = {name for name in there if "embed" in name or "lm_head" in name}
    ends = {"model.embed_tokens.weight", "lm_head.weight"}
    assert embeddings == (ends if family == "llama" else {"model.embed_tokens.weight"})  # tied, so once
    config = json.loads((out / "onnx" / "config.json").read_text())
    assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], "float32")
    assert "quantization_config" not in config
    onnx.checker.check_model(str(out / "onnx" / MODEL))


@pytest.mark.parametrize(("family", "layers"), only([("vit", 12)], [("vit", 12), ("llama", 14)]))
def test_only_standard_operators_with_style_qdq(family: str, layers: int, tmp_path: Path) -> None:
    out = packed(family, tmp_path, Rtn(bits=4, group_size=32))
    exported(out, family, Onnx(style="qdq"))
    model = ir.load(out / "onnx" / MODEL)
    domains = {n.domain for nodes in (model.graph, *model.functions.values()) for n in nodes}
    assert domains <= {"", "compress.layers"}
    assert sum(n.op_type == "DequantizeLinear" for n in model.graph) == layers
    onnx.checker.check_model(str(out / "onnx" / MODEL))


def test_uniform_codes_become_one_operator_a_layer_and_stay_packed(tmp_path: Path) -> None:
    out = packed("llama", tmp_path, Rtn(bits=4, group_size=32))
    exported(out, "llama", Onnx())
    nodes = [n for n in ir.load(out / "onnx" / MODEL).graph if n.op_type == "MatMulNBits"]
    assert len(nodes) == 14
    assert {n.attributes["accuracy_level"].as_int() for n in nodes} == {4}
    assert {n.attributes["block_size"].as_int() for n in nodes} == {32}


def test_layers_that_compute_alike_share_a_function(tmp_path: Path) -> None:
    out = packed("llama", tmp_path, Rtn(bits=3, group_size=32))
    exported(out, "llama", Onnx())
    model = ir.load(out / "onnx" / MODEL)
    calls = [n for n in model.graph if n.domain == "compress.layers"]
    assert {n.name for n in calls} == set(open_packed(out).artifact.committed)
    assert len(model.functions) == 4  # as many as there are shapes


FAST: dict[str, list[Pass]] = {
    "power": [PowerQuant(bits=3, group_size=16)],
    "codebook": [Codebook(bits=4)],
    "tables of their own": [Codebook(bits=3, tables=4, scale="row")],
    "pairs": [Olive(bits=4)],
    "zeros": [Magnitude(sparsity=0.5), Codebook(bits=4)],
}


@pytest.mark.parametrize("name", only(["pairs"], FAST))
def test_fast_mode_rounds_tables_to_eight_bits_and_says_by_how_much(name: str, tmp_path: Path) -> None:
    out = packed("llama", tmp_path, *FAST[name])
    found = exported(out, "llama", Onnx(mode="fast", accuracy_level=1))
    assert "as_shipped" not in found  # nothing is rounded beyond
    assert found["kl"] < 1e-3
    nodes = ir.load(out / "onnx" / MODEL).functions.values()
    assert {n.attributes["bits"].as_int() for f in nodes for n in f if n.op_type == "MatMulNBits"} == {8}
    if name == "pairs":
        assert found["max_logit_difference"] <= 1e-4  # whole numbers below 128 lose nothing


def test_what_is_shipped_is_compared_too(tmp_path: Path) -> None:
    out = packed("llama", tmp_path, Rtn(bits=4, group_size=32))
    found = exported(out, "llama", Onnx())
    assert 1e-4 < found["as_shipped"]["max_logit_difference"] < 1
    assert not (out / "onnx" / "exact.onnx").exists()


@pytest.mark.real
def test_an_added_bias_is_exported(tmp_path: Path) -> None:
    passes = [Magnitude(sparsity=0.5), Perp(train=("bias",), new_biases=True, steps=2, learning_rate=0.01), Rtn(bits=4)]
    out = packed("llama", tmp_path, *passes)
    assert open_packed(out).artifact.graph.model.get_submodule("model.layers.0.mlp.up_proj").bias is not None
    assert exported(out, "llama", Onnx())["max_logit_difference"] <= 1e-4


def test_a_damaged_file_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.export.onnx import files

    def damaging(model: ir.Model, folder: Path, bars: Bars) -> None:
        original(model, folder, bars)
        data = bytearray((folder / DATA).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / DATA).write_bytes(data)

    out, original = packed("llama", tmp_path, Rtn(bits=4)), files.write_constants
    monkeypatch.setattr(files, "write_constants", damaging)
    with pytest.raises(CompressError, match=r"model\.onnx\.data: .* reads back differently"):
        exported(out, "llama", Onnx())


def test_other_logits_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = packed("llama", tmp_path, Rtn(bits=4))
    monkeypatch.setattr(Runner, "__call__", lambda self, inputs: self.step(inputs, None)[0] + 0.01)
    with pytest.raises(CompressError, match=r"logits of the exported onnx differ by 0\.01"):
        exported(out, "llama", Onnx())


def test_what_cannot_be_exported_is_refused_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rtn = "{bits: 4, activation_bits: 4, activation_scale: tensor, activation_grid: olive}"
    text = f"passes: [{{rtn: {rtn}}}]\nexport: [onnx]\n"
    graph = graphs.find(make("resnet"))
    dtypes = {name: tensor.dtype for name, tensor in graph.tensors()}
    with pytest.raises(ConfigError, match=r"export\.onnx: it cannot round images to .* pairs, and \d+ convolutions"):
        plan.make(parse(text), graph, dtypes)
    monkeypatch.setattr(exporter, "NEEDED", ("no_such_package",))
    out = packed("llama", tmp_path / "other", Rtn(bits=4))
    with pytest.raises(ConfigError, match=r"no_such_package is not installed; pip install 'compress-pipeline\[onnx\]'"):
        compress.export_to(out, [Onnx()])
    assert not (out / "onnx").exists()


@pytest.mark.parametrize(
    ("option", "to"),
    [
        ("mode", Onnx(style="qdq", mode="fast")),
        ("accuracy_level", Onnx(style="qdq", accuracy_level=1)),
        ("style", Onnx(style="fancy")),  # type: ignore[arg-type]
        ("accuracy_level", Onnx(accuracy_level=2)),  # type: ignore[arg-type]
    ],
)
def test_an_impossible_option_is_refused(option: str, to: Onnx, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"export\.onnx\.{option}"):
        compress.run(Pipeline(passes=((Rtn(),),), export=(to,)), tmp_path, tmp_path / "out")


def test_a_model_that_cannot_be_traced_is_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("data-dependent control flow")

    out = packed("opt", tmp_path, Rtn(bits=4, include=("*.fc1",)))
    monkeypatch.setattr(trace.torch.onnx, "export", broken)
    with pytest.raises(CompressError, match=r"OPTForCausalLM cannot be exported .*data-dependent control flow"):
        compress.export_to(out, [Onnx()])
    assert not (out / "onnx").exists()
    assert not out.with_name(f"{out.name}.work").exists()


@pytest.mark.parametrize("family", only(["llama"], ["llama", "gpt2"]))
def test_genai_generates_the_tokens_that_transformers_does(family: str, tmp_path: Path) -> None:
    out = packed(family, tmp_path, Rtn(bits=4, group_size=32))
    found = exported(out, family, Genai())
    assert found["tokens_equal"] == 24
    config = json.loads((out / "genai" / "genai_config.json").read_text())
    assert config["model"]["decoder"]["num_hidden_layers"] == 2
    assert not (out / "genai" / "exact").exists()


def test_genai_refuses_what_generates_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"export\.genai: it holds language models, and ResNet"):
        exported(packed("resnet", tmp_path, Rtn(bits=4)), "resnet", Genai())


@pytest.mark.real
def test_genai_refuses_what_keeps_no_cache(tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="OpenAIGPTLMHeadModel keeps no cache"):
        exported(packed("gpt", tmp_path, Rtn(bits=4)), "gpt", Genai())


def test_the_accuracy_level_of_a_written_file_can_be_changed(tmp_path: Path) -> None:
    out = packed("llama", tmp_path, Rtn(bits=3, group_size=32))
    exported(out, "llama", Onnx())
    at_level(out / "onnx" / MODEL, 1, out / "onnx" / "other.onnx")
    tokens = inputs_of("llama")[0]
    with torch.no_grad():
        meant = load_model(out, torch.float32)(tokens).logits
    found = Runner(open_session(out / "onnx" / "other.onnx"))(tokens)
    torch.testing.assert_close(found, meant, rtol=1e-5, atol=1e-5)


@pytest.mark.real
def test_a_graph_with_a_parameter_that_no_file_holds_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = packed("llama", tmp_path, Rtn(bits=4))
    passes = [Magnitude(sparsity=0.5), Perp(train=("bias",), new_biases=True, steps=2, learning_rate=0.01)]
    other = packed("llama", tmp_path / "other", *passes)
    wrong = open_packed(other).artifact.graph
    monkeypatch.setattr(build, "traced", lambda _, specs, opset: trace.traced(wrong, specs, opset))
    with pytest.raises(
        CompressError, match=r"the graph has model\.\S+_proj\.bias, which the packed folder does not hold"
    ):
        exported(out, "llama", Onnx())
