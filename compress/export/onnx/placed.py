"""Placeholders: nodes of a traced graph that are filled in once it is known what the packed layers there look like."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

PLACEHOLDER_DOMAIN = "compress"  # none of this domain is left in what is written
LINEAR, WEIGHT, INPUT = "Linear", "Weight", "Input"


def placed(kind: str, inputs: tuple[Tensor, ...], site: str, shape: tuple[Any, ...]) -> Tensor:
    """A placeholder's output."""
    made: Tensor = torch.onnx.ops.symbolic(
        f"{PLACEHOLDER_DOMAIN}::{kind}", inputs, {"site": site}, dtype=torch.float32, shape=shape, version=1
    )
    return made
