"""How the numbers of a stored weight are distributed: the shape of their distribution, and the entropy of their codes.

A generalised Gaussian has the density exp(-|x / a|^b) times a constant; b, its shape, is 2 for a Gaussian, 1 for a
Laplacian, and grows without end towards a uniform distribution. It says how much a code of all numbers in equal steps
leaves to an entropy code: the sharper the peak, the more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.encodings import rans
from compress.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from compress.checkpoint.artifact import Packed

SHAPES = (0.1, 20.0)  # of distributions that are told apart; beyond, it is the nearer of these
HALVINGS = 50


@dataclass(frozen=True)
class Distribution:
    """The numbers of a weight that are kept.

    Attributes:
        shape: of the generalised Gaussian with the same moments; None where there is nothing but zeros.
        entropy: bits per code that no code by frequencies alone falls below; None where there are no codes.
    """

    shape: float | None
    entropy: float | None


def distribution_of(packed: Packed) -> Distribution:
    """Read a weight and measure it, corrections left out."""
    weight = packed.load()
    if weight.factored:
        return Distribution(None, None)
    kept = weight.base() if weight.mask is None else weight.base()[weight.mask]
    if weight.encoding is None:
        return Distribution(shape_of(kept), None)
    codes = weight.encoding.codes
    used = codes if weight.mask is None or weight.encoding.form.stores_idle else codes[weight.mask]
    counts = torch.bincount(used.flatten().int(), minlength=1 << weight.encoding.form.bits)
    return Distribution(shape_of(kept), rans.entropy(counts.numpy()) if used.numel() else None)


def shape_of(values: Tensor) -> float | None:
    """The shape of the generalised Gaussian that has the same mean of sizes and of squares; None for zeros alone.

    Source: Sharifi and Leon-Garcia, "Estimation of shape parameter for generalized Gaussian distributions in subband
    decompositions of video", 1995: mean(|x|)^2 / mean(x^2) = G(2/b)^2 / (G(1/b) G(3/b)), which grows with b. Differs
    from it in: b is found by halving, not in a table.
    """
    sizes = values.double().abs()
    squares = float(sizes.square().mean()) if values.numel() else 0.0
    if not squares:
        return None
    wanted = float(sizes.mean()) ** 2 / squares
    low, high = SHAPES
    for _ in range(HALVINGS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if _ratio(middle) < wanted else (low, middle)
    return math.sqrt(low * high)


def _ratio(shape: float) -> float:
    """mean(|x|)^2 / mean(x^2) of a generalised Gaussian."""
    return math.exp(2 * math.lgamma(2 / shape) - math.lgamma(1 / shape) - math.lgamma(3 / shape))


__all__ = ["Distribution", "distribution_of", "shape_of"]
