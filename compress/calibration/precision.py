"""How exactly float32 matrices are multiplied."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

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


@contextmanager
def unrounded(device: torch.device) -> Iterator[None]:
    """While open, float32 is computed in float32, whatever a model around it computes in."""
    with products("float32"), torch.autocast(device.type, enabled=False):
        yield


def product(left: Tensor, right: Tensor) -> Tensor:
    """(M, K) @ (K, N), float32 and summed up in float32; on CUDA factors may stay narrower."""
    if left.device.type == "cuda" and left.element_size() < torch.float32.itemsize:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def must_round(tensor: Tensor) -> bool:
    """Whether `products("bfloat16")` is open, but the factors have to be rounded before: such is the processor."""
    wanted: bool = torch.backends.mkldnn.matmul.fp32_precision == "bf16"  # type: ignore[attr-defined]
    return wanted and tensor.device.type == "cpu" and tensor.dtype == torch.float32 and _only_narrow_factors()


@contextmanager
def calibrating(kind: Products, dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """While open, a model of some type computes what passes learn from, as `kind` says.

    Its products are as `products` has them. A processor with bfloat16 instructions, but none that take float32 factors,
    gains nothing by that: with `bfloat16` its layers take and give bfloat16, as they do in `learning`.
    """
    enabled = kind == "bfloat16" and dtype == torch.float32 and device.type == "cpu" and _only_narrow_factors()
    with products(kind), torch.autocast(device.type, torch.bfloat16, enabled=enabled):
        yield


@contextmanager
def learning(kind: Products, example: Tensor) -> Iterator[None]:
    """While open, layers that are learned with compute as `kind` says, for inputs like `example`.

    With `bfloat16` their inputs and outputs are bfloat16 too, where the device has instructions for it, not only the
    factors of their products: the same holds for the gradients that come back. Sums over many steps stay float32.
    """
    device = example.device.type
    enabled = kind == "bfloat16" and example.dtype == torch.float32 and _multiplies_bfloat16(device)
    with torch.autocast(device, torch.bfloat16, enabled=enabled):
        yield


def _only_narrow_factors() -> bool:
    """Whether the processor multiplies bfloat16, but has no instructions with which float32 is rounded on the way."""
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16")) and not has.get("amx_bf16")


def _multiplies_bfloat16(device: str) -> bool:
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    has = torch.cpu.get_capabilities() if device == "cpu" else {}
    return any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
