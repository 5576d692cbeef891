"""Containers for finished weights. An exporter chooses bytes; it neither rounds nor rescales."""

from __future__ import annotations

from compress.export.awq import AwqFormat
from compress.export.base import Exporter, PackedFolder
from compress.export.compressed_tensors import CompressedTensors
from compress.export.entropy import Entropy
from compress.export.gguf import Gguf
from compress.export.gptq import GptqFormat
from compress.export.hf import Hf
from compress.export.mlx import Mlx
from compress.export.onnx.exporter import Onnx
from compress.export.onnx.genai import Genai
from compress.export.peft import Peft

EXPORTERS: tuple[type[Exporter], ...] = (
    Entropy,
    Hf,
    Peft,
    CompressedTensors,
    GptqFormat,
    AwqFormat,
    Mlx,
    Gguf,
    Onnx,
    Genai,
)

__all__ = [
    "EXPORTERS",
    "AwqFormat",
    "CompressedTensors",
    "Entropy",
    "Exporter",
    "Genai",
    "Gguf",
    "GptqFormat",
    "Hf",
    "Mlx",
    "Onnx",
    "PackedFolder",
    "Peft",
]
