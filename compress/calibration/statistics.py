"""Running sums over the inputs of a site. Plain sums, divided (if at all) once by whoever uses them.

Shapes: T tokens, I input features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from compress.calibration.precision import product, products
from compress.errors import NonFiniteError
from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from compress.calibration.ranges import Range

Need = Literal["none", "norm", "peak", "gram"]

MIN_EXPERT_TOKENS = 16  # below, the inputs that an expert has seen are less than one sentence
SMALLEST_PANEL = 128  # columns of the Gram matrix summed up at once


class Statistics:
    """Sums over every input a site (or several sites fed by the very same tensor) has seen.

    What a batch adds is float32, and what all batches make is summed up in float64: in whatever order they are added,
    by whatever process, the Gram matrix that is made of it is the same to the bit, but for a sum that lies just between
    two float32 numbers.

    Attributes:
        tokens: T so far.
        square_sum: (I,) float64, the sum over tokens of x**2.
        gram: (I, I) float32, the sum over tokens of x x^T; None unless asked for. Only its lower half is summed up,
            panel by panel.
        drift: (I, I) float32, the sum over tokens of (o - x) x^T, where o is the input that the original model has in
            the place of x; None unless asked for.
        peak: (I,) the largest absolute value of every input feature; None unless asked for.
        range: of the numbers, with a sample; None unless asked for.
        groups: of a convolution, each with inputs of its own; 1 of everything else.
    """

    groups = 1

    def __init__(self, width: int, need: Need, device: torch.device | None = None, drifts: bool = False):
        """`device`: where the inputs will be; torch's default device if not given."""
        self.tokens, self.width, self.need = 0, width, need
        self._squares = torch.zeros(width, dtype=torch.float64, device=device)
        self._sum = torch.zeros(width, dtype=torch.float64, device=device) if need == "gram" else None
        self._drift = torch.zeros(width, width, dtype=torch.float64, device=device) if drifts else None
        self.peak = torch.zeros(width, device=device) if need == "peak" else None
        self._panels: list[Tensor] = []  # float64, of which (i, j) is element (i + start, j + start) of the matrix
        self._step = max(SMALLEST_PANEL, width // 8)
        self._gram: Tensor | None = None
        self._eigen: tuple[Tensor, Tensor] | None = None
        self.range: Range | None = None

    def update(self, inputs: Tensor, name: str, original: Tensor | None = None) -> None:
        """Add (..., I) inputs; `original`, where drift is asked for, are those of the original model.

        Raises:
            NonFiniteError: an input is NaN or infinite; `name` says whose.
        """
        x = inputs.detach().reshape(-1, inputs.shape[-1])
        with torch.autocast(x.device.type, enabled=False):  # sums are float32, whatever the model computes in
            if self._sum is None:
                self._squares += _square_sums(x)
            else:
                self._add_gram(x)
            if self.peak is not None and len(x):
                self.peak = torch.maximum(self.peak, x.abs().amax(0).float())
            if self._drift is not None and original is not None:
                away = original.detach().reshape(x.shape).float() - x.float()
                self._drift += product(away.T, x.float())
        self.tokens += x.shape[0]
        if x.device.type == "cpu":
            self.check(name)

    def check(self, name: str) -> None:
        """Look whether all inputs so far were finite: `update` does not where looking would wait for the device.

        Raises:
            NonFiniteError: as `update`.
        """
        squares = self.square_sum
        if not torch.isfinite(squares).all():
            bad = int((~torch.isfinite(squares)).nonzero()[0])
            raise NonFiniteError(
                f"the inputs of {name} are not finite (feature {bad}) on the calibration data; "
                "look for NaN weights before it, or run with dtype: float32"
            )

    def _add_gram(self, x: Tensor) -> None:
        assert self._sum is not None
        wide = x.float() if x.device.type == "cpu" else x  # processors round to bfloat16 in their products, if at all
        with products("bfloat16" if x.dtype == torch.bfloat16 else None):
            for start, panel in zip(self._starts(), self._opened(), strict=True):
                panel.add_(product(wide[:, start:].T, wide[:, start : start + self._step]))
        self._sum += wide.sum(0, dtype=torch.float32)

    def sums(self) -> Iterator[Tensor]:
        """Everything that is summed up, a part at a time: sums over more inputs may be written into its place."""
        if self._sum is None:
            yield self._squares
            return
        yield from self._opened()
        yield self._sum
        if self._drift is not None:
            yield self._drift

    def _starts(self) -> range:
        """The first column of each panel."""
        return range(0, self.width, self._step)

    def _opened(self) -> list[Tensor]:
        """The panels, to be written to."""
        if not self._panels:
            gram, device = self._gram, self._squares.device
            for a in self._starts():
                shape = self.width - a, min(self._step, self.width - a)
                zeros = torch.zeros(shape, dtype=torch.float64, device=device)
                self._panels.append(zeros if gram is None else gram[a:, a : a + self._step].double())
            self._gram = self._eigen = None
        return self._panels

    @property
    def gram(self) -> Tensor | None:
        """(I, I), symmetric."""
        if self._sum is None:
            return None
        if self._gram is None:
            wide, self._panels = self._opened(), []
            panels = [wide.pop(0).float() for _ in self._starts()]  # half as much, before there is a whole matrix
            self._gram = torch.empty(self.width, self.width, device=self._squares.device)
            for a in self._starts():
                panel, b = panels.pop(0), a + self._step  # its memory is free before the rest is filled in
                self._gram[a:, a:b] = panel
                self._gram[a:b, b:] = self._gram[b:, a:b].T
        return self._gram

    @property
    def drifts(self) -> bool:
        """Whether drift is asked for."""
        return self._drift is not None

    @property
    def drift(self) -> Tensor | None:
        """(I, I)."""
        return None if self._drift is None else self._drift.float()

    @property
    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues of the Gram matrix, ascending (I,), and eigenvectors (I, I), float64. Kept: sites share them."""
        if self._eigen is None:
            assert self.gram is not None
            self._eigen = torch.linalg.eigh(self.gram.double())
        return self._eigen

    @property
    def mean(self) -> Tensor | None:
        """(I,) float64, of every input feature; None without a Gram matrix, or when nothing was seen."""
        return None if self._sum is None or not self.tokens else self._sum / self.tokens

    @property
    def square_sum(self) -> Tensor:
        """(I,) float64."""
        if self._sum is None:
            return self._squares
        if self._gram is not None:
            return self._gram.diagonal().double()
        return torch.cat([panel.diagonal() for panel in self._opened()])

    @property
    def norm(self) -> Tensor:
        """(I,) float32, the 2-norm of every input feature over all tokens."""
        return self.square_sum.sqrt().float()


def _square_sums(x: Tensor) -> Tensor:
    """(T, I) -> (I,) sums of squares, float32 within a batch."""
    if x.device.type == "cuda":
        norms: Tensor = torch.linalg.vector_norm(x, dim=0, dtype=torch.float32)  # makes no copy as wide
        return norms.square()
    return x.float().square().sum(0)
