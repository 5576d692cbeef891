"""Adding and subtracting what fine-tuning changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from compress.passes.merge.base import MergePass
from compress.passes.merge.schedules import PerModel, Value
from compress.passes.merge.task_vectors import Combine, summed

if TYPE_CHECKING:
    from torch import Tensor

    from compress.passes.merge.base import Piece


@dataclass(frozen=True, kw_only=True)
class TaskArithmetic(MergePass):
    """Add to the base what each fine-tune of it has learned: its task vector, tuned minus base.

    A negative weight takes a task away; a - b + c are weights 1, -1 and 1, the analogy.

    Source: Ilharco et al., "Editing Models with Task Arithmetic", 2022, arXiv 2212.04089, eq. 1 and section 2. Differs
    from the paper in: a weight for each model, which may differ by depth and by tensor; `combine: mean`.

    Args:
        scale: of the sum. 0.4 is the paper's where nothing can be validated; 0.3 for eight tasks.
        weights: one for each of `models`, or one for all.
        combine: `sum`, or the `mean` over the weights.

    Example:
        >>> import torch
        >>> from compress import TaskArithmetic
        >>> from compress.passes.merge.base import Piece
        >>> piece = Piece("weight", torch.tensor([1.0, 2.0]), (torch.tensor([2.0, 2.0]), torch.tensor([1.0, 0.0])))
        >>> TaskArithmetic(models=("maths", "code"), scale=0.5).run(piece, None)
        tensor([1.5000, 1.0000])
    """

    scale: Value = 0.4
    weights: PerModel = 1.0
    combine: Combine = "sum"

    key: ClassVar[str] = "task_arithmetic"

    def run(self, piece: Piece, facts: Any) -> Tensor:
        total = summed(piece.deltas(), self.of_each(self.weights, piece, 1.0), self.combine)
        return total.mul_(self.at_piece(self.scale, piece, 0.4)).add_(piece.base)
