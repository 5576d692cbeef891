"""OUT/onnx of mixtures: every expert takes the tokens that it was sent."""

from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from expert_models import make_mixture

import compress
from compress import ConfigError, Genai, Magnitude, Onnx, Pipeline, Rtn
from compress.export.onnx.exporter import MODEL
from compress.export.onnx.session import Runner, at_level, open_session
from compress.models.loading import load_model
from compress.passes import Pass

pytestmark = pytest.mark.usefixtures("traced_once")

TOKENS = torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(5))
W4 = {"bits": 4, "group_size": 32, "fallback": "channel"}
KINDS = ("Mixtral",)
OTHERS = ("GptOss", "DeepseekV3", "Qwen3Moe", "Olmoe", "Qwen2Moe", "GraniteMoe", "Glm4Moe", "Phimoe")


def exported(kind: str, folder: Path, *passes: Pass, to: Onnx | None = None) -> dict[str, Any]:
    make_mixture(kind, **({"num_hidden_layers": 1} if kind == "Mixtral" else {})).save_pretrained(folder / "model")
    to = to or Onnx()
    pipeline = Pipeline(passes=tuple((p,) for p in passes), export=(to,))
    report = compress.run(pipeline, folder / "model", folder / "out", calibration=TOKENS, evaluation=TOKENS)
    found: dict[str, Any] = report.verified[to.key]
    return found


@pytest.mark.parametrize("kind", [*KINDS, *(pytest.param(kind, marks=pytest.mark.real) for kind in OTHERS)])
def test_a_mixture_computes_the_same_logits_at_once_and_token_by_token(kind: str, tmp_path: Path) -> None:
    assert exported(kind, tmp_path, Rtn(**W4))["max_logit_difference"] <= 1e-4
    file = tmp_path / "out" / "onnx" / MODEL
    at_level(file, 1, file.with_name("exact.onnx"))
    runner = Runner(open_session(file.with_name("exact.onnx")))
    with torch.no_grad():
        whole = load_model(tmp_path / "out", torch.float32)(TOKENS).logits
    first, kept = runner.step(TOKENS[:, :5], None)
    second, kept = runner.step(TOKENS[:, 5:6], kept)  # most experts are sent nothing
    third, _ = runner.step(TOKENS[:, 6:], kept)
    torch.testing.assert_close(torch.cat([first, second, third], dim=1), whole, rtol=1e-4, atol=1e-4)
    one, _ = runner.step(TOKENS[:1, :1], None)
    torch.testing.assert_close(one, whole[:1, :1], rtol=1e-4, atol=1e-4)
    onnx.checker.check_model(str(file))


def test_experts_stay_packed_and_keep_their_names(tmp_path: Path) -> None:
    exported("Mixtral", tmp_path, Rtn(**W4))
    graph = ir.load(tmp_path / "out" / "onnx" / MODEL).graph
    assert sum(node.op_type == "MatMulNBits" for node in graph) == 4 + 2 * 4
    codes = graph.initializers["model.layers.0.mlp.experts.down_proj.3.codes"].const_value
    assert codes is not None
    assert codes.nbytes == 64 * 96 // 2
    assert not any("experts" in name and not name.rpartition(".")[0][-1].isdigit() for name in graph.initializers)


@pytest.mark.real
@pytest.mark.parametrize(
    "passes",
    [
        [Magnitude(sparsity=0.5, include=("*.experts.down_proj.*",)), Rtn(bits=3, exclude=("*.experts.down_proj.*",))],
        [Rtn(bits=4, exclude=("*.experts.gate_up_proj.*",))],
        [Rtn(bits=4, exclude=("*.experts.*",))],
    ],
    ids=["pruned", "one dense", "all dense"],
)
def test_experts_in_other_forms_and_dense_ones_are_held(passes: list[Pass], tmp_path: Path) -> None:
    assert exported("Mixtral", tmp_path, *passes)["max_logit_difference"] <= 1e-4


@pytest.mark.real
def test_style_qdq_holds_a_mixture_in_standard_operators(tmp_path: Path) -> None:
    found = exported("GptOss", tmp_path, Rtn(**W4), to=Onnx(style="qdq"))
    assert found["max_logit_difference"] <= 1e-4
    model = ir.load(tmp_path / "out" / "onnx" / MODEL)
    assert {n.domain for nodes in (model.graph, *model.functions.values()) for n in nodes} <= {"", "compress.layers"}


@pytest.mark.real
def test_genai_generates_the_tokens_that_transformers_does(tmp_path: Path) -> None:
    assert exported("Mixtral", tmp_path, Rtn(**W4), to=Genai())["tokens_equal"] == 24


@pytest.mark.parametrize("kind", ["Llama4", "Dbrx", "JetMoe", "LongcatFlash"])
def test_experts_that_compute_in_their_own_way_are_refused_before_any_work(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"export\.onnx: it has graphs for experts .* is a \w+, which does it in"):
        exported(kind, tmp_path, Rtn(bits=4))
    assert not (tmp_path / "out").exists()


def test_some_experts_packed_beside_dense_ones_in_one_tensor_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"export\.onnx: .* 1 are not packed beside others .*gate_up_proj\.2"):
        exported("Mixtral", tmp_path, Rtn(bits=4, exclude=("*.0.*.gate_up_proj.2",)))
