"""Tensors of a folder under the names of the model, where transformers puts parameters together of several of them.

Checkpoints of mixtures keep a matrix for each expert; the model keeps all experts of a block in one parameter. How one
becomes the other is transformers' own statement (`conversion_mapping`), and is followed tensor by tensor: what is asked
for is put together then, and one expert alone where only one is wanted.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from compress.checkpoint.sources import ChangedSource
from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor

    from compress.checkpoint.sources import Source

NOT_A_SIGN = 1 << 30  # stands behind every number in a name


@dataclass(frozen=True)
class Recipe:
    """How transformers makes parameters of tensors.

    Attributes:
        converter: transformers' own statement; never changed.
        model: that the parameters belong to.
        first: name of the first parameter that is made.
        parts: (pattern of the converter, name in the files), in order.
    """

    converter: Any
    model: Any
    first: str
    parts: tuple[tuple[str, str], ...]

    def made(self, values: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Parameter -> its value. `values`: of a tensor in the files, by name."""
        converter = copy.deepcopy(self.converter)
        for pattern, stored in self.parts:
            converter.add_tensor(self.first, stored, pattern, partial(values, stored))
        found = converter.convert(self.first, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in found.items()}

    @property
    def apart(self) -> bool:
        """Whether entry i along the first dimension is made of what belongs to it alone."""
        return all(_keeps_first(operation) for operation in self.converter.operations)

    def settled(self, shape: tuple[int, ...]) -> Recipe:
        """The same recipe where nothing depends on what is there. `shape`: of the tensor in the files."""
        operations = self.converter.operations
        if len(operations) > 1 or not getattr(operations[0], "check_dims", False):
            return self
        converter, meant = copy.copy(self.converter), tuple(self.model.get_parameter(self.first).shape)
        turn = copy.copy(operations[0])
        turn.check_dims = False
        converter.operations = [_AsItIs() if shape == meant else turn]
        return replace(self, converter=converter)

    def of_entry(self, index: int, stacked: bool) -> Recipe:
        """The recipe of one entry along the first dimension. `stacked`: every tensor in the files has them all."""
        if stacked:
            return self
        patterns: dict[str, list[str]] = {}
        for pattern, stored in self.parts:
            patterns.setdefault(pattern, []).append(stored)
        parts = tuple((pattern, names[index]) for pattern, names in patterns.items())
        return Recipe(self.converter, self.model, self.first, parts)


class _AsItIs:
    """The operation of a tensor that lies in the files as in the model."""

    def convert(self, tensors: dict[str, Any], target_patterns: Sequence[str], **_: Any) -> dict[str, Any]:
        """Gives a tensor its new name."""
        (value,) = tensors.values()
        return {target_patterns[0]: value}


def _keeps_first(operation: Any) -> bool:
    """Whether an operation treats the entries along the first dimension alike and apart."""
    kind = type(operation).__name__
    if kind == "MergeModulelist":
        return bool(operation.dim == 0)
    if kind == "Transpose":
        return bool(operation.dim0 > 0 and operation.dim1 > 0 and not getattr(operation, "check_dims", False))
    if isinstance(operation, _AsItIs):
        return True
    return kind in ("Concatenate", "Interleave") and operation.dim > 0


@dataclass(frozen=True)
class _Made:
    """A parameter that is put together.

    Attributes:
        shape: of the parameter.
        dtype: of the tensors that it is made of.
        entries: recipes of its entries along the first dimension, where each is made of its own; else empty.
        stacked: whether the tensors in the files have all entries themselves.
    """

    recipe: Recipe
    shape: tuple[int, ...]
    dtype: torch.dtype
    entries: bool
    stacked: bool


@dataclass
class Conversions:
    """Tensors of the files by the parameter that they become a part of, as they are found."""

    model: Any
    parts: dict[str, tuple[Any, list[tuple[str, str]]]] = field(default_factory=dict)

    def add(self, converter: Any, target: str, pattern: str, stored: str) -> None:
        """A tensor of the files is part of what begins with a parameter of this name."""
        self.parts.setdefault(target, (converter, []))[1].append((pattern, stored))

    def recipes(self) -> list[Recipe]:
        """One for each parameter that is put together, or for several that come of one tensor."""
        found = []
        for first, (converter, parts) in self.parts.items():
            found.append(Recipe(converter, self.model, first, tuple(sorted(parts, key=lambda p: _natural(p[1])))))
        return found


def _natural(name: str) -> list[tuple[int, str]]:
    """Experts in the order of their numbers: 2 before 10."""
    return [(int(part), "") if part.isdigit() else (NOT_A_SIGN, part) for part in name.split(".")]


class ConvertedSource(ChangedSource):
    """A source in which parameters are put together of several tensors, whose own names it no longer has."""

    def __init__(self, before: Source, recipes: Sequence[Recipe]):
        super().__init__(before)
        self._made: dict[str, _Made] = {}
        used: set[str] = set()
        for stated in recipes:
            recipe = stated.settled(before.shape(stated.parts[0][1])) if len(stated.parts) == 1 else stated
            used.update(stored for _, stored in recipe.parts)
            shapes = {stored: before.shape(stored) for _, stored in recipe.parts}
            for name, value in recipe.made(lambda stored: self._blank(stored)).items():
                self._made[name] = _described(recipe, tuple(value.shape), value.dtype, shapes)
        self._names = [name for name in before.names() if name not in used] + list(self._made)

    def _blank(self, stored: str) -> Tensor:
        """A tensor of the files without its numbers."""
        return torch.empty(self.before.shape(stored), dtype=self.before.dtype(stored), device="meta")

    def names(self) -> Iterable[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._made[name].shape if name in self._made else self.before.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._made[name].dtype if name in self._made else self.before.dtype(name)

    def read(self, name: str) -> Tensor:
        made = self._made.get(name)
        if made is None:
            return self.before.read(name)
        if not made.entries:
            return made.recipe.made(self.before.read)[name].contiguous()
        whole = torch.empty(made.shape, dtype=made.dtype)
        for index in range(made.shape[0]):
            whole[index] = self._entry(name, made, index)
        return whole

    def piece(self, name: str, start: int, stop: int) -> Tensor:
        made = self._made.get(name)
        if made is None:
            return self.before.piece(name, start, stop)
        if not made.entries:
            return made.recipe.made(self.before.read)[name].flatten()[start:stop].clone()
        size = math.prod(made.shape[1:])
        first, last = start // size, (stop - 1) // size
        rows = [self._entry(name, made, index).flatten() for index in range(first, last + 1)]
        whole = rows[0] if len(rows) == 1 else torch.cat(rows)
        return whole[start - first * size : stop - first * size].clone()

    def _entry(self, name: str, made: _Made, index: int) -> Tensor:
        """One entry along the first dimension of a parameter; nothing else is read for it."""

        def part(stored: str) -> Tensor:
            shape = self.before.shape(stored)
            if not made.stacked:
                return self.before.read(stored)
            size = math.prod(shape[1:])
            return self.before.piece(stored, index * size, (index + 1) * size).view(1, *shape[1:])

        return made.recipe.of_entry(index, made.stacked).made(part)[name][0]


def _described(
    recipe: Recipe, shape: tuple[int, ...], dtype: torch.dtype, shapes: Mapping[str, tuple[int, ...]]
) -> _Made:
    """What is known of a parameter before any number is read. `shapes`: of the tensors in the files."""
    counts: dict[str, int] = {}
    for pattern, _ in recipe.parts:
        counts[pattern] = counts.get(pattern, 0) + 1
    stacked = set(counts.values()) == {1} and all(found[:1] == shape[:1] for found in shapes.values())
    each = len(shape) == 3 and (stacked or set(counts.values()) == {shape[0]})
    return _Made(recipe, shape, dtype, each and recipe.apart, stacked)
