"""NaN in an exported graph is traced to the constant or the node that it comes from."""

from collections.abc import Callable
from pathlib import Path
from shutil import copyfile
from typing import Any

import numpy
import onnx_ir as ir
import pytest
import torch
from families import inputs_of, make

import compress
from compress import Onnx, Pipeline, Rtn
from compress.errors import CompressError, NonFiniteError
from compress.export.onnx import build
from compress.export.onnx.exporter import MODEL
from compress.export.onnx.nan import first_nan, refuse_nan
from compress.export.onnx.session import Runner

TOKENS = inputs_of("llama")[0]
ROTARY = "model.model.rotary_emb.inv_freq"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed folder with its export; to be read only."""
    folder = tmp_path_factory.mktemp("finite")
    make("llama").save_pretrained(folder / "model")
    pipeline = Pipeline(passes=((Rtn(bits=4, group_size=32),),), export=(Onnx(),))
    compress.run(pipeline, folder / "model", folder / "out", calibration=TOKENS, evaluation=TOKENS)
    return folder / "out"


def with_frequencies(change: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """The model that is traced computes other rotary frequencies than any other."""
    opened = build.open_packed

    def open_changed(*given: Any) -> Any:
        made = opened(*given)
        rotary: Any = made.artifact.graph.model.model.rotary_emb
        rotary.inv_freq = change(rotary.inv_freq.clone())
        return made

    monkeypatch.setattr(build, "open_packed", open_changed)


@pytest.mark.real
def test_a_computed_constant_with_nan_is_named_and_nothing_is_written(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_frequencies(lambda old: torch.where(old == old[0], torch.nan, old), monkeypatch)
    with pytest.raises(NonFiniteError, match=rf"constant {ROTARY}, .* has 1 NaN among its 8 numbers"):
        build_and_check(out, tmp_path)


@pytest.mark.real
def test_a_computed_constant_is_compared_with_what_another_model_computes(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_frequencies(lambda old: old * 2, monkeypatch)
    with pytest.raises(CompressError, match=rf"{ROTARY} reads back differently"):
        build_and_check(out, tmp_path)


def build_and_check(out: Path, folder: Path) -> None:
    from compress.export.packed import open_packed
    from compress.progress import Bars

    made, to = open_packed(out), Onnx()
    to.write(made, folder, folder, Bars())
    to.verify(made, folder, Bars())


def damaged(out: Path, folder: Path, number: float) -> Path:
    """The export with a number in the place of the first rotary frequency."""
    model = ir.load(out / "onnx" / MODEL)
    value = model.graph.initializers[ROTARY]
    assert value.const_value is not None
    numbers = value.const_value.numpy().copy()
    numbers[0] = number
    value.const_value = ir.tensor(numbers, name=ROTARY)
    ir.save(model, folder / MODEL)
    copyfile(out / "onnx" / f"{MODEL}.data", folder / f"{MODEL}.data")
    return folder


def scaled(folder: Path, *numbers: float) -> Path:
    """A graph that multiplies two numbers with constants, then with zero."""
    tokens, mask = (
        ir.Value(name=name, shape=ir.Shape([1, 2]), type=ir.TensorType(ir.DataType.INT64))
        for name in ("input_ids", "attention_mask")
    )
    scale, zero = (
        ir.Value(name=name, const_value=ir.tensor(torch.tensor(each), name=name))
        for name, each in (("scale", numbers), ("zero", (0.0, 0.0)))
    )
    cast = ir.node("Cast", [tokens], {"to": ir.DataType.FLOAT.value})
    large = ir.node("Mul", [cast.outputs[0], scale])
    nothing = ir.node("Mul", [large.outputs[0], zero])
    for name, node in (("number", cast), ("large", large), ("logits", nothing)):
        node.outputs[0].name, node.outputs[0].type = name, ir.TensorType(ir.DataType.FLOAT)
    nodes, constants = [cast, large, nothing], [scale, zero]
    graph = ir.Graph([tokens, mask], nothing.outputs, nodes=nodes, initializers=constants, opset_imports={"": 21})
    ir.save(ir.Model(graph, ir_version=10), folder / MODEL)
    return folder


def test_the_constant_or_the_node_that_nan_comes_from_is_said(tmp_path: Path) -> None:
    tokens = torch.tensor([[3, 4]])
    assert first_nan(scaled(tmp_path, 1.0, numpy.nan), tokens) == "of its constants, 1 hold NaN: scale"
    made = "none of its constants holds NaN; the first node that makes one is a Mul of ['large', 'zero']"
    assert first_nan(scaled(tmp_path, 1.0, numpy.inf), tokens) == made  # infinity is no mistake by itself
    assert first_nan(scaled(tmp_path, 1.0, 2.0), tokens).startswith("none of its constants holds NaN, nor does what")
    assert [file.name for file in tmp_path.iterdir()] == [MODEL]


@pytest.mark.real
def test_the_constant_or_the_node_of_a_model_that_nan_comes_from_is_said(out: Path, tmp_path: Path) -> None:
    assert first_nan(damaged(out, tmp_path, numpy.nan), TOKENS) == f"of its constants, 1 hold NaN: {ROTARY}"
    found = first_nan(damaged(out, tmp_path, numpy.inf), TOKENS)
    assert "none of its constants holds NaN; the first node that makes one is a " in found
    assert "could not be looked at" not in found
    assert "nor does what its nodes make" in first_nan(out / "onnx", TOKENS)
    assert not list(tmp_path.glob("looked_at*"))


@pytest.mark.real
def test_logits_that_are_nan_are_an_error_that_says_where_from(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = tmp_path / "out"
    packed.mkdir()
    for file in out.iterdir():
        if file.is_file() and file.name != "manifest.json":
            (packed / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(Runner, "__call__", lambda self, inputs: self.step(inputs, None)[0] * torch.nan)
    with pytest.raises(NonFiniteError, match=r"exported onnx gives logits that are NaN .*: none of its constants h"):
        compress.export_to(packed, [Onnx()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_nan_is_seen_in_constants_of_every_type_and_infinity_is_left(dtype: torch.dtype) -> None:
    for bad in (torch.nan, torch.inf):
        numbers = torch.tensor([1.0, bad]).to(dtype)
        value = ir.Value(name="some", const_value=ir.tensor(numbers, name="some"))
        if numbers.float().isnan().any():
            with pytest.raises(NonFiniteError, match=r"constant some, .* has 1 NaN among its 2 numbers"):
                refuse_nan([value])
        else:
            refuse_nan([value])


def test_constants_that_are_no_floating_point_numbers_hold_none() -> None:
    for numbers in (torch.tensor([1, 2]), torch.tensor([True])):
        refuse_nan([ir.Value(name="some", const_value=ir.tensor(numbers, name="some"))])
