"""What a layer can do about the errors of the layers before it.

In the compressed model a layer W is given x where the original has o. The matrix whose outputs are nearest to the
original's minimises the sum over tokens of ||W o - V x||^2:

    V = W + W D H^-1,      D = sum (o - x) x^T,      H = sum x x^T + damping,

and a share of the way to it, what is called the strength, is less tied to the calibration data.

Sources: Arai and Ichikawa, "Quantization Error Propagation: Revisiting Layer-Wise Post-Training Quantization", 2025,
arXiv 2504.09629; Li, Yin, Lee, Xiao and Panda, "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric
Calibration", 2025, arXiv 2504.02692. Differs from the papers in: one damping for this and for what
follows, and inputs inside a block come from layers of that block which are not compressed yet.

Shapes: O rows, I columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.calibration.precision import products
from compress.errors import SolveError
from compress.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def made_up(weight: Tensor, gram: Tensor, drift: Tensor, strength: float, damping: float) -> Tensor:
    """The weight that is nearer to the original's outputs, (O, I) float32.

    Args:
        weight: (O, I).
        gram: (I, I), sum of x x^T.
        drift: (I, I), sum of (o - x) x^T.
        strength: 0 leaves the weight, 1 is the minimum.
        damping: as a share of the mean of the Gram matrix's diagonal.

    Raises:
        SolveError: not positive definite.
    """
    diagonal = gram.diagonal()
    damped = gram.double()
    damped.diagonal().add_(damping * diagonal.mean())
    damped.diagonal()[diagonal == 0] = 1.0  # an input that is always zero drifts nowhere
    factor, failed = torch.linalg.cholesky_ex(damped)
    if bool(failed) or not torch.isfinite(factor.diagonal()).all():
        raise SolveError("the Gram matrix of the inputs is not positive definite at this damping")
    with products("float32"):
        turned = torch.cholesky_solve(drift.double().T, factor).T.float()  # D H^-1
        return weight + strength * (weight @ turned)
