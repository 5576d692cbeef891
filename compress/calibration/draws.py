"""Random numbers that are the same on every device: drawn on the processor, then moved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

Kind = Literal["uniform", "normal", "permutation"]


def draw(
    generator: torch.Generator | None,
    shape: Sequence[int],
    kind: Kind,
    like: Tensor,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """Random numbers on the device of another tensor.

    Args:
        generator: of the processor; None takes the global one.
        shape: of what is drawn.
        kind: `uniform` and `normal` (mean 0, deviation 1) are float32; a `permutation` of (n,) is 0 ... n-1, int64.
        like: a tensor on the device that the numbers are for.
        bounds: of uniform numbers, [low, high).
    """
    if kind == "permutation":
        (count,) = shape
        drawn = torch.randperm(count, generator=generator, device="cpu")
    elif kind == "normal":
        drawn = torch.randn(*shape, generator=generator, device="cpu")
    else:
        drawn = torch.empty(*shape, device="cpu").uniform_(*bounds, generator=generator)
    return drawn.to(like.device)


__all__ = ["Kind", "draw"]
