"""Quality gates on what is not measured: known once the data are read, and before any work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.calibration.metrics import judge_of
from compress.config.pipeline import GATES
from compress.errors import DataError

if TYPE_CHECKING:
    from torch import nn

    from compress.calibration.data import Dataset
    from compress.calibration.metrics import Judge
    from compress.config.pipeline import Evaluation

GATES_OF: dict[Judge, str] = {
    "next token": "max_increase", "masked": "max_increase", "classes": "max_drop", "predictions": "max_error",
    "outputs": "max_error",
}  # fmt: skip


def refuse_idle_gate(section: Evaluation, model: nn.Module, data: Dataset) -> None:
    """Refuse a gate on what is not measured of this model on these data.

    Raises:
        DataError: names the gate that there is.
    """
    judge = judge_of(model, data.labels)
    idle = [gate for gate in GATES if gate != GATES_OF[judge] and getattr(section, gate) is not None]
    if idle:
        labels = "has no labels" if data.labels is None else "has labels"
        raise DataError(
            f"evaluate.{idle[0]} changes nothing: the evaluation data {labels}, and a {type(model).__name__} is judged "
            f"on them by {judge}; its gate is {GATES_OF[judge]}"
        )
