"""Fixtures for everything that is exported."""

from typing import Any

import onnx_ir as ir
import pytest

from compress.export.onnx import build

TRACED: dict[tuple[object, ...], ir.Model] = {}


@pytest.fixture
def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing takes seconds; what it gives does not depend on how a layer is packed."""
    original = build.traced

    def cached(graph: Any, specs: Any, opset: int) -> ir.Model:
        rounded = frozenset(name for name, spec in specs.items() if spec.inputs)
        tied = getattr(graph.model.config, "tie_word_embeddings", False)
        key = (type(graph.model), tied, frozenset(specs), rounded, opset)
        if key not in TRACED:
            TRACED[key] = original(graph, specs, opset)
        return TRACED[key].clone()

    monkeypatch.setattr(build, "traced", cached)
