"""Options that every pass onto a grid shares."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self, cast

from annotated_types import Ge, Le

from compress.encodings import FloatForm, SuperBlockForm, Uniform, UniformForm, fit, floats, quantize, super_blocks
from compress.encodings.super_blocks import KINDS, WIDTH
from compress.encodings.super_scales import fit as fit_super_blocks
from compress.encodings.uniform import Search
from compress.passes.base import OptionError
from compress.passes.quantize.activations import ActivationOptions
from compress.passes.quantize.embeddings import EmbeddingOptions
from compress.passes.quantize.named_grids import BLOCK, FLOAT_GRIDS, NAMED_GRIDS, WeightGrid, not_filled, unfilled

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from compress.encodings import Encoding
    from compress.encodings.lookup import BlockScale
    from compress.encodings.super_blocks import SuperBlockKind


Granularity = Literal["tensor", "channel", "group", "block"]
Fallback = Literal["channel"]


@dataclass(frozen=True, kw_only=True)
class GridOptions(ActivationOptions):
    """Rounds onto a grid with scales.

    Args:
        bits: 2 to 8.
        group_size: neighbouring columns that share a scale; None is one scale per row (`granularity: channel`).
        granularity: `tensor` is one scale for the whole matrix. By default `group` or `channel`, as group_size says.
            `block` is one for 128 rows and columns, of fp8 only.
        fallback: `channel` gives layers whose columns group_size does not divide one scale per row, and the report says
            which; None refuses them.
        scale_search: `minmax` covers the range; `mse` searches the range with the least error**2.4.
    """

    bits: Annotated[int, Ge(2), Le(8)] = 4
    group_size: Annotated[int, Ge(1)] | None = None
    granularity: Granularity | None = None
    fallback: Fallback | None = None
    scale_search: Search = "minmax"

    weighs_columns: ClassVar[bool] = False  # whether scales can be searched by what is known of the inputs

    def check(self) -> Iterator[OptionError]:
        yield from super().check()
        if self.scale_search == "weighted" and not self.weighs_columns:
            yield OptionError("scale_search", "weighted needs to know the inputs: use gptq, or mse here")
        if self.granularity == "group" and self.group_size is None:
            yield OptionError("granularity", "group needs a group_size")
        if self.granularity in ("tensor", "channel", "block") and self.group_size is not None:
            yield OptionError("group_size", f"makes no sense with granularity {self.granularity}")
        if self.granularity == "block" and not self.has_blocks:
            yield OptionError("granularity", "block is for floats of 8 bits: give rtn or gptq the scheme fp8")

    @property
    def has_blocks(self) -> bool:
        """Whether a scale may be shared by rows and columns of a block."""
        return False

    def check_shape(self, shape: tuple[int, int]) -> str | None:
        if self._misfit(shape[1]) and self.fallback is None:
            fits = [g for g in (16, 32, 64, 128, 256, 512) if shape[1] % g == 0]
            would = f"{', '.join(map(str, fits))} would" if fits else "only per channel (no group_size) would"
            return (
                f"group_size {self.group_size} does not divide its {shape[1]} columns; {would}, or fallback: channel "
                "for one scale per row in layers like it"
            )
        return None

    def departure(self, shape: tuple[int, int]) -> str | None:
        if self._misfit(shape[1]):
            return f"one scale per row: group_size {self.group_size} does not divide its {shape[1]} columns"
        return None

    def mistakes(self) -> Iterator[OptionError]:
        yield from super().mistakes()
        options = [vars(self), *(override.options for override in self.overrides)]
        shared = any(each.get("group_size") or each.get("granularity") == "block" for each in options)
        if self.fallback is not None and not shared:
            yield OptionError("fallback", "changes nothing without group_size")

    def _misfit(self, columns: int) -> bool:
        return self.group_size is not None and columns % self.group_size != 0

    def produces(self, kind: str) -> str:
        return "quantized" if kind == "dense" else "sparse-quantized"

    def groups(self, columns: int) -> int:
        """Groups of columns in a matrix this wide."""
        return columns // self.group_size if self.group_size and not self._misfit(columns) else 1


@dataclass(frozen=True, kw_only=True)
class UniformOptions(GridOptions):
    """Rounds onto the uniform grid.

    Args:
        symmetric: fixed middle zero point, not stored; otherwise affine.
    """

    symmetric: bool = False

    def form(self, shape: tuple[int, int]) -> UniformForm:
        per_tensor = self.granularity == "tensor"
        groups = self.groups(shape[1])
        return UniformForm(bits=self.bits, groups=groups, per_tensor=per_tensor, symmetric=self.symmetric)

    def even_grid(self, weight: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scale and zero point of a whole matrix. `importance`: (I,) of every column, for a weighted search."""
        return fit(
            weight,
            self.bits,
            groups=self.groups(weight.shape[1]),
            per_tensor=self.granularity == "tensor",
            symmetric=self.symmetric,
            search=self.scale_search,
            importance=importance,
        )

    def nearest(self, weight: Tensor) -> Encoding:
        """The whole matrix rounded to nearest on its own grid."""
        scale, zero = self.even_grid(weight)
        return Uniform(quantize(weight, scale, zero, self.bits), scale, zero, self.bits, self.symmetric)


@dataclass(frozen=True, kw_only=True)
class UniformPass(UniformOptions, EmbeddingOptions):
    """Rounds one matrix at a time onto even steps, floats, or super-blocks.

    Args:
        grid: `int` has even steps. `fp8`: floats of 8 bits (E4M3); `mxfp4` and `nvfp4`: of 4 bits (E2M1), 32 or 16
            columns sharing a scale that is a power of two or an E4M3 number. `q2_k` to `q6_k`: the super-blocks of 256
            columns that llama.cpp calls K-quants, whose blocks of 16 or 32 have scales of few bits. In a file
            `scheme: nvfp4` is short for grid, bits and group_size.
    """

    grid: WeightGrid = "int"

    def check(self) -> Iterator[OptionError]:
        yield from super().check()
        if self.grid == "int":
            return
        bits, group_size = NAMED_GRIDS[self.grid]
        if self.bits != bits:
            yield OptionError("bits", f"codes of {self.grid} have {bits} bits, not {self.bits}{self._short}")
        if group_size is not None and self.group_size != group_size:
            said = f"{group_size} columns share a scale of {self.grid}, not {self.group_size or 'those of a row'}"
            yield OptionError("group_size", said + self._short)
        if self.symmetric:
            why = "whose codes have a sign" if self.grid in FLOAT_GRIDS else "which says itself where steps begin"
            yield OptionError("symmetric", f"changes nothing with grid: {self.grid}, {why}")

    @property
    def _short(self) -> str:
        return f"; `scheme: {self.grid}` in a file says all of it, and `grid: int` means even steps"

    @property
    def has_blocks(self) -> bool:
        return self.grid == "fp8"

    @property
    def has_super_blocks(self) -> bool:
        """Whether scales are those of super-blocks."""
        return self.grid in KINDS

    def check_shape(self, shape: tuple[int, int]) -> str | None:
        if self.fallback is None and self._splits_blocks(shape):
            return f"{unfilled(shape)}; set fallback: channel for one scale per row in layers like it"
        if self.fallback is None and self.has_super_blocks and self._misfit(shape[1]):
            return not_filled(self.grid, shape[1])
        return super().check_shape(shape)

    def departure(self, shape: tuple[int, int]) -> str | None:
        if self.has_super_blocks and self._misfit(shape[1]):
            return f"even steps, one scale per row: super-blocks of {WIDTH} do not fill its {shape[1]} columns"
        return f"one scale per row: {unfilled(shape)}" if self._splits_blocks(shape) else super().departure(shape)

    def _misfit(self, columns: int) -> bool:
        return bool(columns % WIDTH) if self.has_super_blocks else super()._misfit(columns)

    def fitting(self, shape: tuple[int, int]) -> Self:
        """The pass that a matrix of such a shape gets: with even steps where super-blocks do not fill it."""
        if self.has_super_blocks and self._misfit(shape[1]):
            return replace(self, grid="int", group_size=None, symmetric=True)
        return self

    def _splits_blocks(self, shape: tuple[int, int]) -> bool:
        return self.granularity == "block" and bool(shape[0] % BLOCK or shape[1] % BLOCK)

    @property
    def rowwise(self) -> bool:
        return self.granularity not in ("tensor", "block") and self.grid != "nvfp4"

    @property
    def shares_scale(self) -> bool:
        return self.grid == "nvfp4"

    def form(self, shape: tuple[int, int]) -> UniformForm | FloatForm | SuperBlockForm:  # type: ignore[override]
        if self.has_super_blocks:
            kind, other = cast("SuperBlockKind", self.grid), self.fitting(shape)
            return SuperBlockForm(bits=self.bits, kind=kind) if other is self else other.form(shape)
        return super().form(shape) if self.grid == "int" else self.float_form(shape)

    def float_form(self, shape: tuple[int, int]) -> FloatForm:
        """What codes that are floats will be like."""
        kind, groups, rows = FLOAT_GRIDS[self.grid], self.groups(shape[1]), shape[0]
        if self.granularity == "tensor":
            rows = 1
        elif self.granularity == "block" and not self._splits_blocks(shape):
            rows, groups = shape[0] // BLOCK, shape[1] // BLOCK
        return FloatForm(
            bits=kind.bits,
            number=kind.number,
            groups=groups,
            row_blocks=None if rows == shape[0] else rows,
            scale_type=kind.scale_type,
        )

    def float_scales(self, weight: Tensor, importance: Tensor | None = None) -> tuple[FloatForm, dict[str, Tensor]]:
        """What a whole matrix is stored as, and its scales. `importance`: as `even_grid` takes it."""
        form = self.float_form((len(weight), weight.shape[1]))
        return form, floats.fit(weight, form, search=self.scale_search, importance=importance)

    def super_scales(
        self, weight: Tensor, importance: Tensor | None = None
    ) -> tuple[SuperBlockKind, BlockScale, BlockScale | None]:
        """Which super-blocks a whole matrix is cut into, their scales and offsets. `importance`: as `even_grid`."""
        kind = cast("SuperBlockKind", self.grid)
        return kind, *fit_super_blocks(weight, kind, search=self.scale_search, importance=importance)

    def nearest(self, weight: Tensor) -> Encoding:
        other = self.fitting((len(weight), weight.shape[1]))
        if other is not self:
            return other.nearest(weight)
        if self.has_super_blocks:
            return super_blocks.quantize(weight, *self.super_scales(weight))
        return super().nearest(weight) if self.grid == "int" else floats.quantize(weight, *self.float_scales(weight))
