"""GGUF, the files of llama.cpp: one folder for what its architectures, tensors, keys and tokenizers are."""

from __future__ import annotations

from compress.export.gguf.exporter import Gguf

__all__ = ["Gguf"]
