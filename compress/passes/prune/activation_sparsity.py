"""Activation sparsity: the inputs of a layer that matter least are zero while it runs, and their columns not read.

Shapes: T tokens, I columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Self

from annotated_types import Gt, Lt

from compress.encodings import InputForm
from compress.encodings.inputs import Criterion, Threshold
from compress.lazy import torch
from compress.passes.base import Edit, LinearPass

if TYPE_CHECKING:
    from torch import Tensor

    from compress.passes.base import Target


@dataclass(frozen=True, kw_only=True)
class ActivationSparsity(LinearPass):
    """Skip the inputs with the least |x| times the norm of their column, token by token; weights are untouched.

    Calibration sets one threshold for each layer, so that a share of what it saw lies below; which inputs are skipped
    is seen when a token comes. Codes, masks and corrections stay as they are.

    Source: Chen et al., "WINA: Weight Informed Neuron Activation for Accelerating Large Language Model Inference",
    2025, arXiv 2505.19427; `teal`: Liu et al., "Training-Free Activation Sparsity in Large Language Models", 2024,
    arXiv 2408.14690. Differs from the paper in: WINA's score is compared with a calibrated threshold, as TEAL's is, in
    the place of the largest K of each token, and weights are not made orthogonal; TEAL's thresholds are those of one
    share for all layers, without its search for the share of each, and hold for all tokens, prompts among them.

    Args:
        skip: the share of the inputs of each layer that is skipped on calibration data.
        criterion: `wina` weighs |x| with the norm of the column; `teal` goes by |x| alone.

    Example:
        >>> import torch, compress
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> result = compress.apply(model, [compress.ActivationSparsity(skip=0.25)], calibration=torch.randn(128, 64))
        >>> str(result.weights["0"].inputs.form)
        'wina thresholds that skip 25%'
    """

    skip: Annotated[float, Gt(0), Lt(1)] = 0.4
    criterion: Criterion = "wina"

    key: ClassVar[str] = "activation_sparsity"

    @property
    def ranged(self) -> bool:
        return True

    @property
    def calibrated(self) -> bool:
        return True

    def refusal(self, kind: str) -> str | None:
        return None

    def produces(self, kind: str) -> str:
        return kind

    def input_form(self) -> InputForm:
        return InputForm(grid="threshold", scale="tensor", criterion=self.criterion, skip=self.skip)

    def run(self, target: Target) -> Edit:
        seen = None if target.statistics is None else target.statistics.range
        if seen is None:
            return Edit(keeps=True)
        inputs = Threshold.of(self.input_form(), seen.sample, importance(target.weight, self.criterion))
        skipped = float((inputs.rounded(seen.sample) == 0).float().mean())
        return Edit(keeps=True, inputs=inputs, notes={"skipped": skipped})

    def stand_in(self) -> Self:
        return self


def importance(weight: Tensor, criterion: Criterion) -> Tensor:
    """What |x| is weighed with before it is compared, from (O, I) float32: (I,)."""
    if criterion == "teal":
        return torch.ones(weight.shape[1], device=weight.device)
    norms: Tensor = torch.linalg.vector_norm(weight, dim=0)
    return norms
