"""Models saved with a tokenizer, what stands in their files, and what llama.cpp makes of those."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import gguf_models
import pytest
import torch
from conftest import make_llama
from gguf_tokenizers import bytes_of_words
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from compress import Rtn

gguf = pytest.importorskip("gguf")

PYTHON = Path(os.environ.get("LLAMA_PYTHON", ".venv-llama/bin/python"))  # has xllamacpp, a wheel of llama.cpp
needs_llama_cpp = pytest.mark.skipif(not PYTHON.is_file(), reason="LLAMA_PYTHON names no Python with xllamacpp")
W4 = Rtn(bits=4, group_size=32, symmetric=True)
TOKENS = {"bos_token_id": 0, "eos_token_id": 0}


def small(**changes: object) -> PreTrainedModel:
    return make_llama(**{**TOKENS, **changes})


def save(model: PreTrainedModel, folder: Path, words: Tokenizer | None = None) -> Path:
    model.save_pretrained(folder)
    (words or bytes_of_words()).save(str(folder / "tokenizer.json"))
    return folder


def saved(variant: str, folder: Path, tokenizer: Tokenizer | None = None, **changes: object) -> None:
    save(gguf_models.make(variant, **changes), folder / "model", tokenizer)


def values(folder: Path) -> dict[str, Tensor]:
    """The file's tensors by their names in it, float32."""
    reader = gguf.GGUFReader(folder / "out" / "gguf" / "model.gguf")
    return {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}


def field(folder: Path, name: str) -> Any:
    return gguf.GGUFReader(folder / "out" / "gguf" / "model.gguf").fields[name].contents()


def asked(folder: Path, prompts: list[list[int]], texts: list[str], embed: bool, words: int) -> dict[str, Any]:
    question = json.dumps({"prompts": prompts, "texts": texts, "embed": embed, "words": words})
    script = Path(__file__).parent / "gguf_in_llama_cpp.py"
    command = [str(PYTHON), str(script), str(folder / "out" / "gguf" / "model.gguf"), question]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
