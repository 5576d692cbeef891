"""The bundled model: a small Llama that writes Python documentation, and the text it is measured on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

MODEL_DIR = Path(__file__).parent / "model"


def load() -> tuple[Any, Any]:
    """The bundled model, in float32, and its tokenizer.

    Example:
        >>> import compress
        >>> model, tokenizer = compress.demo.load()
        >>> model.config.model_type
        'llama'
    """
    from transformers import AutoTokenizer

    from compress.models import loading

    return loading.load_model(MODEL_DIR), AutoTokenizer.from_pretrained(MODEL_DIR)
