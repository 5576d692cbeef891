"""A matrix that passes may change, and where in a model it lies."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor


@dataclass(frozen=True)
class TensorRef:
    """Where a matrix (out, in) lies: it is a parameter, or a piece of one.

    Attributes:
        parameter: full name.
        index: which piece along the first dimensions; (3,) is the fourth expert of a fused tensor (experts, ...).
        of: how many pieces there are.
        transposed: it is kept as (in, out).
        stored: its own shape where it is a convolution's, (out, in / groups, *window); (in, out / groups, *window) of a
            transposed one.
        groups: of a transposed convolution.
    """

    parameter: str
    index: tuple[int, ...] = ()
    transposed: bool = False
    stored: tuple[int, ...] = ()
    of: int = 1
    groups: int = 1

    def read(self, value: Tensor) -> Tensor:
        """The matrix (out, in), from the parameter's value; of its memory where it need not be turned."""
        piece = value[self.index] if self.index else value
        if self.stored and self.transposed:
            inputs, outputs = self.stored[0] // self.groups, self.stored[1]
            turned = piece.reshape(self.groups, inputs, outputs, -1).transpose(1, 2)
            return turned.reshape(self.groups * outputs, -1)
        if self.stored:
            return piece.reshape(len(piece), -1)
        return piece.T.contiguous() if self.transposed else piece

    def laid(self, matrix: Tensor) -> Tensor:
        """A matrix (out, in) as it lies in the parameter: all of that, or its piece."""
        if self.stored and self.transposed:
            inputs, outputs = self.stored[0] // self.groups, self.stored[1]
            return matrix.reshape(self.groups, outputs, inputs, -1).transpose(1, 2).reshape(self.stored)
        return matrix.reshape(self.stored) if self.stored else matrix.T.contiguous() if self.transposed else matrix

    def write(self, matrix: Tensor, value: Tensor | None = None) -> Tensor:
        """The parameter's value with a matrix (out, in) in its place: the inverse of `read`.

        Args:
            matrix: to be there.
            value: of the parameter until then, which is left as it is; needed where the matrix is a piece of it.
        """
        piece = self.laid(matrix)
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
        shape: (out, in); (out, in / groups * places of the window) of a convolution.
        ref: where it lies.
        block: index into `Graph.blocks`, or None for a site outside every block, such as an output head.
        groups: of a convolution; with more than one, each row multiplies only its own group's inputs.
        router: it chooses among experts.
        filter: a convolution that filters each channel by itself over time, with a few weights.
        looked_up: rows of it are looked up, as in an embedding; a head may multiply with it too.
        read_by: full name of the module that multiplies with it itself, where no layer of its own does.
        shared: full names of further modules that use it, such as a head that is tied to the embedding.
    """

    name: str
    shape: tuple[int, int]
    ref: TensorRef
    block: int | None = None
    groups: int = 1
    router: bool = False
    filter: bool = False
    looked_up: bool = False
    read_by: str | None = None
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
    def named_only(self) -> bool:
        """Whether passes leave it alone unless a pattern names it."""
        return self.router or self.filter or self.looked_up

    @property
    def place(self) -> str:
        """What a reader finds it under: its parameter, with its number where it is one of several."""
        return self.name if self.is_expert else self.parameter

    @property
    def is_layer(self) -> bool:
        """Whether a module with its name has it as a weight."""
        return not self.is_expert and (self.read_by is None or self.parameter == f"{self.name}.weight")

    @property
    def is_expert(self) -> bool:
        """Whether it is one matrix of several that a fused parameter holds."""
        return bool(self.ref.index)

    @property
    def is_convolution(self) -> bool:
        """Whether its columns are those of a window that moves over its inputs."""
        return bool(self.ref.stored)

    @property
    def kernel(self) -> int:
        """Neighbouring columns that belong to one input channel."""
        return math.prod(self.ref.stored[2:])

    def matrix(self, value: Tensor) -> Tensor:
        """The parameter's value as (out, in)."""
        return self.ref.read(value)

    def value(self, matrix: Tensor) -> Tensor:
        """The inverse of `matrix`; of a site that is all of its parameter."""
        return self.ref.write(matrix)

    @property
    def piece(self) -> tuple[int, int]:
        """The first of an expert's elements in the flattened parameter, and the first behind them."""
        (number,) = self.ref.index
        size = self.shape[0] * self.shape[1]
        return number * size, (number + 1) * size

    def of_piece(self, flat: Tensor) -> Tensor:
        """(out, in) of an expert's elements, as `piece` says where they lie."""
        rows, columns = self.shape
        return flat.view(columns, rows).T.contiguous() if self.ref.transposed else flat.view(rows, columns)


def parameter_of(sites: Sequence[Site], matrices: Iterable[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """A parameter's value from the matrices (out, in) of all sites that lie in it.

    Args:
        sites: one, or every expert of a fused parameter in its order.
        matrices: of each, asked for one after the other: no more than one need be in memory beside the value.
        dtype: of the value; by default that of the first matrix.
    """
    if not sites[0].is_expert:
        (matrix,) = matrices
        value = sites[0].value(matrix)
        return value if dtype is None else value.to(dtype)
    whole: Tensor | None = None
    for number, (site, matrix) in enumerate(zip(sites, matrices, strict=True)):
        piece = matrix.T if site.ref.transposed else matrix
        if whole is None:
            whole = torch.empty((len(sites), *piece.shape), dtype=dtype or matrix.dtype, device=matrix.device)
        assert site.ref.index == (number,)
        whole[number] = piece
        del matrix, piece
    assert whole is not None
    return whole


def learned_parameter(sites: Sequence[Site], matrices: Sequence[Tensor]) -> Tensor:
    """What `parameter_of` gives, as a value through which gradients reach the matrices."""
    if not sites[0].is_expert:
        return sites[0].value(matrices[0])
    return torch.stack([m.T if s.ref.transposed else m for s, m in zip(sites, matrices, strict=True)])


def bytes_by_tensor(sites: Iterable[Site], sizes: Mapping[str, int], made: Mapping[str, int]) -> dict[str, int]:
    """Bytes of every tensor, by parameter.

    Args:
        sites: that there are.
        sizes: tensor -> bytes before any pass.
        made: site -> bytes, of those that passes made something of; other experts of a fused parameter keep theirs.
    """
    found = dict(sizes)
    for site in sites:
        if site.name not in made:
            continue
        if site.is_expert:
            found[site.parameter] += made[site.name] - sizes[site.parameter] // site.ref.of
        else:
            found[site.parameter] = made[site.name]
    return found
