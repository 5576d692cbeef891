"""What the files of an ONNX export are called."""

from __future__ import annotations

MODEL, DATA, EXACT = "model.onnx", "model.onnx.data", "exact.onnx"
