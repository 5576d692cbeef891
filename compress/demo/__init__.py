"""The bundled model: a small Llama that writes Python documentation, and the text it is measured on."""

from typing import Any

from transformers import AutoTokenizer

from compress.models import hub, loading

MODEL_DIR = hub.DEMO


def load() -> tuple[Any, Any]:
    """The bundled model, in float32, and its tokenizer.

    Example:
        >>> import compress
        >>> model, tokenizer = compress.demo.load()
        >>> model.config.model_type
        'llama'
    """
    return loading.load(MODEL_DIR), AutoTokenizer.from_pretrained(MODEL_DIR)
