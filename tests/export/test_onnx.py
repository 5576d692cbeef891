"""OUT/onnx: onnxruntime computes what the packed folder does, for every family, encoding and width."""

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from families import FAMILIES, RECIPES, compressed, inputs_of, rounds

from compress import Onnx
from compress.export.onnx import build
from compress.export.packed import open_packed
from compress.exporting import refuse, write_all
from compress.hub import load
from compress.progress import Bars

TRACED: dict[tuple[object, ...], ir.Model] = {}


@pytest.fixture(autouse=True)
def _traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing takes seconds; what it gives does not depend on how a layer is packed."""
    original = build.traced

    def cached(graph: Any, specs: Any, opset: int) -> ir.Model:
        rounded = frozenset(name for name, spec in specs.items() if spec.inputs)
        key = (type(graph.model), str(graph.model.config), frozenset(specs), rounded, opset)
        if key not in TRACED:
            TRACED[key] = original(graph, specs, opset)
        return TRACED[key].clone()

    monkeypatch.setattr(build, "traced", cached)


def exported(out: Path, family: str, exporter: Onnx) -> dict[str, Any]:
    made, data = open_packed(out), inputs_of(family)
    refuse(made, [exporter])
    return write_all(made, [exporter], out, data, Bars())[exporter.key]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_encoding_and_width_computes_the_same_logits(family: str, tmp_path: Path) -> None:
    seen: set[str] = set()
    for chosen in rounds(family, RECIPES):
        out = compressed(family, chosen, RECIPES, tmp_path)
        for exporter in (Onnx(), Onnx(style="qdq")):
            found = exported(out, family, exporter)
            largest = float(load(out, torch.float32)(inputs_of(family)[0]).logits.abs().max())
            assert found["max_logit_difference"] <= 1e-4 * max(1.0, largest), (chosen, exporter)
        seen |= set(chosen.values())
    assert len(seen) >= (30 if family != "resnet" else 12)
