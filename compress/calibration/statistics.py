"""Running sums over the inputs of a site. Plain sums, divided (if at all) once by whoever uses them.

Shapes: T tokens, I input features.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from compress.errors import NonFiniteError

Need = Literal["none", "norm", "gram"]


class Statistics:
    """Sums over every input a site (or several sites fed by the very same tensor) has seen.

    Attributes:
        tokens: T so far.
        square_sum: (I,) float64, the sum over tokens of x**2.
        gram: (I, I) float32, the sum over tokens of x x^T; None unless asked for.
    """

    def __init__(self, width: int, need: Need):
        self.tokens = 0
        self.square_sum = torch.zeros(width, dtype=torch.float64)
        self.gram = torch.zeros(width, width) if need == "gram" else None

    def update(self, inputs: Tensor, name: str) -> None:
        """Add (..., I) inputs.

        Raises:
            NonFiniteError: an input is NaN or infinite; `name` says whose.
        """
        x = inputs.detach().reshape(-1, inputs.shape[-1])
        wide = x.float()
        squares = wide.square().sum(0, dtype=torch.float64)
        if not torch.isfinite(squares).all():
            bad = int((~torch.isfinite(squares)).nonzero()[0])
            raise NonFiniteError(
                f"the inputs of {name} are not finite (feature {bad}) on the calibration data; "
                "look for NaN weights before it, or run with dtype: float32"
            )
        self.square_sum += squares
        if self.gram is not None:
            with _exact_products(x.dtype):
                self.gram.addmm_(wide.T, wide)
        self.tokens += x.shape[0]

    @property
    def norm(self) -> Tensor:
        """(I,) float32, the 2-norm of every input feature over all tokens."""
        return self.square_sum.sqrt().float()


@contextmanager
def _exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Use the processor's bfloat16 tiles for sums of products of bfloat16 numbers.

    Such products are exact in float32 and the tiles accumulate in float32, so the result is float32's, at a fraction of
    the time. Other types are left alone.
    """
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    if dtype == torch.bfloat16:
        settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
