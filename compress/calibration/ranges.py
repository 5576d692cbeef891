"""What calibration remembers about the inputs of a layer whose grid it fixes.

Shapes: C channels, the last dimension; T tokens (of a convolution: rows of its maps).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.encodings import fit_inputs
from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from compress.encodings import InputForm, InputGrid

MOST_NUMBERS = 1 << 18  # of the sample


class Range:
    """The extremes of everything a layer was fed, and an evenly spread sample of it.

    The sample is every `stride`-th token. Whenever it outgrows `MOST_NUMBERS`, every other one is dropped: it depends
    on the order of the tokens, never on how they came in batches, nor on how many processes shared them.

    Args:
        start: how many tokens other processes see before the first of this one.
    """

    def __init__(self, start: int = 0) -> None:
        self._ends: Tensor | None = None
        self._start, self._seen, self._stride = start, start, 1
        self._kept: list[Tensor] = []
        self._fitted: dict[InputForm, InputGrid] = {}

    def update(self, inputs: Tensor) -> None:
        """Add (..., C) inputs, all finite."""
        x = inputs.detach().reshape(-1, inputs.shape[-1])
        ends = torch.stack(x.aminmax())  # read when they are asked for: reading waits for the device
        ends = torch.stack([ends[0].clamp(max=0), ends[1].clamp(min=0)])
        before = ends if self._ends is None else self._ends
        self._ends = torch.stack([torch.minimum(before[0], ends[0]), torch.maximum(before[1], ends[1])])
        first, self._seen = -self._seen, self._seen + len(x)
        while -(-self._seen // self._stride) > max(1, MOST_NUMBERS // x.shape[1]):
            self._thin()
        self._kept.append(x[first % self._stride :: self._stride].to(torch.float32, copy=True))
        self._fitted.clear()

    def _thin(self) -> None:
        """Drop every other token of the sample: those whose number is no multiple of the next stride."""
        if self._kept:
            odd = -(-self._start // self._stride) % 2
            self._kept = [torch.cat(self._kept)[odd::2].clone()]
        self._stride *= 2

    def facts(self) -> dict[str, float]:
        """All but the sample, in numbers that JSON holds."""
        return {"low": self.low, "high": self.high, "start": self._start, "seen": self._seen, "stride": self._stride}

    @classmethod
    def joined(cls, parts: Sequence[tuple[Mapping[str, float], Tensor]]) -> Range:
        """What one process would have seen that had seen everything.

        Args:
            parts: `facts` and `sample` of the processes, in order.
        """
        made = cls()
        stride = max(int(facts["stride"]) for facts, _ in parts)
        for facts, sample in parts:
            part = cls(int(facts["start"]))
            part._stride, part._kept = int(facts["stride"]), [sample]
            while part._stride < stride:
                part._thin()
            made._kept += part._kept
        ends = min(facts["low"] for facts, _ in parts), max(facts["high"] for facts, _ in parts)
        made._ends = torch.tensor(ends, dtype=torch.float64)
        made._stride, made._seen = stride, max(int(facts["seen"]) for facts, _ in parts)
        return made

    @property
    def low(self) -> float:
        """The smallest number seen so far, or zero."""
        return 0.0 if self._ends is None else float(self._ends[0])

    @property
    def high(self) -> float:
        """The largest, or zero."""
        return 0.0 if self._ends is None else float(self._ends[1])

    @property
    def sample(self) -> Tensor:
        """(T, C) float32."""
        return torch.cat(self._kept)

    def grid(self, form: InputForm) -> InputGrid:
        """The grid of this form that suits what was seen; found once for all layers that share a range."""
        if form not in self._fitted:
            self._fitted[form] = fit_inputs(form, self.low, self.high, self.sample)
        return self._fitted[form]
