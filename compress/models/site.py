"""A matrix that passes may change, and where in a model it lies."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TensorRef:
    """Where a matrix (out, in) lies: it is a parameter, or a piece of one.

    Attributes:
        parameter: full name.
        index: which piece along the first dimensions; (3,) is the fourth expert of a fused tensor (experts, ...).
        transposed: it is kept as (in, out).
        stored: its own shape where it is a convolution's, (out, in / groups, kernel height, kernel width).
    """

    parameter: str
    index: tuple[int, ...] = ()
    transposed: bool = False
    stored: tuple[int, ...] = ()

    def read(self, value: Tensor) -> Tensor:
        """The matrix (out, in), from the parameter's value; of its memory where it need not be turned."""
        piece = value[self.index] if self.index else value
        if self.stored:
            return piece.reshape(len(piece), -1)
        return piece.T.contiguous() if self.transposed else piece

    def write(self, matrix: Tensor, value: Tensor | None = None) -> Tensor:
        """The parameter's value with a matrix (out, in) in its place: the inverse of `read`.

        Args:
            matrix: to be there.
            value: of the parameter until then, which is left as it is; needed where the matrix is a piece of it.
        """
        piece = matrix.reshape(self.stored) if self.stored else matrix.T.contiguous() if self.transposed else matrix
        if not self.index:
            return piece
        assert value is not None
        changed = value.clone()
        changed[self.index] = piece
        return changed


@dataclass(frozen=True)
class Site:
    """One matrix to compress.

    Attributes:
        name: the module's full name, as patterns match it.
        shape: (out, in); (out, in / groups * kernel height * kernel width) of a convolution.
        ref: where it lies.
        block: index into `Graph.blocks`, or None for a site outside every block, such as an output head.
        groups: of a convolution; with more than one, each row multiplies only its own group's inputs.
        looked_up: rows of it are looked up, as in an embedding; a head may multiply with it too.
        shared: full names of further modules that use it, such as a head that is tied to the embedding.
    """

    name: str
    shape: tuple[int, int]
    ref: TensorRef
    block: int | None = None
    groups: int = 1
    looked_up: bool = False
    shared: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The full names of the modules that use it, any of which patterns may match."""
        return (self.name, *self.shared)

    @property
    def parameter(self) -> str:
        """The full name of the parameter that it lies in."""
        return self.ref.parameter

    @property
    def is_convolution(self) -> bool:
        """Whether its columns are those of a window over an image."""
        return bool(self.ref.stored)

    @property
    def kernel(self) -> int:
        """Neighbouring columns that belong to one input channel."""
        return math.prod(self.ref.stored[2:])

    def matrix(self, value: Tensor) -> Tensor:
        """The parameter's value as (out, in)."""
        return self.ref.read(value)

    def value(self, matrix: Tensor) -> Tensor:
        """The inverse of `matrix`."""
        return self.ref.write(matrix)
