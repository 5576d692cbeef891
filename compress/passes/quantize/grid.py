"""Options that every pass onto a grid shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge, Le

from compress.encodings import Uniform, UniformForm, fit, quantize
from compress.encodings.uniform import Search
from compress.passes.base import OptionError
from compress.passes.quantize.activations import ActivationOptions
from compress.passes.quantize.embeddings import EmbeddingOptions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


Granularity = Literal["tensor", "channel", "group"]
Fallback = Literal["channel"]


@dataclass(frozen=True, kw_only=True)
class GridOptions(ActivationOptions):
    """Rounds onto a grid with scales.

    Args:
        bits: 2 to 8.
        group_size: neighbouring columns that share a scale; None is one scale per row (`granularity: channel`).
        granularity: `tensor` is one scale for the whole matrix. By default `group` or `channel`, as group_size says.
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
        if self.granularity in ("tensor", "channel") and self.group_size is not None:
            yield OptionError("group_size", f"makes no sense with granularity {self.granularity}")

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
        sizes = [self.group_size, *(override.options.get("group_size") for override in self.overrides)]
        if self.fallback is not None and not any(sizes):
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

    def grid(self, weight: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
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

    def nearest(self, weight: Tensor) -> Uniform:
        """The whole matrix rounded to nearest on its own grid."""
        scale, zero = self.grid(weight)
        return Uniform(quantize(weight, scale, zero, self.bits), scale, zero, self.bits, self.symmetric)


@dataclass(frozen=True, kw_only=True)
class UniformPass(UniformOptions, EmbeddingOptions):
    """Rounds one matrix at a time onto the uniform grid."""

    @property
    def rowwise(self) -> bool:
        return self.granularity != "tensor"
