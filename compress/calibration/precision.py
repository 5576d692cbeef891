"""How exactly float32 matrices are multiplied."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

Products = Literal["bfloat16", "float32"]


@contextmanager
def products(kind: Products | None) -> Iterator[None]:
    """While open, float32 matrix products round their factors to bfloat16 (TensorFloat-32 on CUDA) or not at all.

    Sums are float32 either way, and processors without instructions for it multiply exactly. None changes nothing. For
    factors that are bfloat16 already both are the same, and `bfloat16` is several times quicker.
    """
    if kind is None:
        yield
        return
    reduced = kind == "bfloat16"
    backends: list[tuple[Any, str]] = [
        (torch.backends.mkldnn.matmul, "bf16" if reduced else "ieee"),  # type: ignore[attr-defined]
        (torch.backends.cuda.matmul, "tf32" if reduced else "ieee"),
    ]
    before = [backend.fp32_precision for backend, _ in backends]
    for backend, precision in backends:
        backend.fp32_precision = precision
    try:
        yield
    finally:
        for (backend, _), precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
