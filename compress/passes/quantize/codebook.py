"""Codebooks: rows of like distribution share a small table of free values, found by k-means.

Shapes: O rows, I columns, K entries of a table, G tables.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from annotated_types import Ge, Le

from compress.encodings import CodebookForm
from compress.encodings.codebook import MOST_ENTRIES, MOST_TABLES, index_bits, unscaled
from compress.errors import SolveError
from compress.lazy import torch
from compress.passes.base import Edit, OptionError
from compress.passes.quantize.activations import ActivationOptions
from compress.passes.quantize.embeddings import EmbeddingOptions
from compress.passes.quantize.grouping import even_runs, group, quantiles
from compress.passes.quantize.tables import root_mean_square, solve

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from compress.calibration.statistics import Need
    from compress.encodings import Codebooks
    from compress.passes.base import Target

FLOOR = 0.01  # of the mean importance: a column that calibration hardly used still has some influence


@dataclass(frozen=True, kw_only=True)
class CodebookOptions(ActivationOptions):
    """Rounds to the entries of tables that rows share.

    Args:
        bits: 2 to 8; tables have 2**bits entries.
        entries: of a table, 2 to 256, instead of `bits`; codes take the whole bits they need.
        tables: how many, 1 to 256. By default as many as take no more space than a scale and a zero point for each row
            would, and at least one.
        scale: `none` has tables of the weights themselves; `row` has tables of the weights in units of a scale that
            each row stores; `group` stores one for every `group_size` neighbouring columns of a row.
        group_size: columns that share a scale, where `scale` is `group`.
        grouping: `any` row has any table and stores its number; `runs` of neighbouring rows share a table, and only
            where runs end is stored: for layers that `reorder` has sorted.
        weighting: `hessian` weights each column by the summed squares of its inputs; `none` needs no data.
        iterations: rounds of fitting tables, rows and scales to one another.
        tolerance: a round that lowers the squared error by a smaller share is the last.
    """

    bits: Annotated[int, Ge(2), Le(8)] = 4
    entries: Annotated[int, Ge(2), Le(MOST_ENTRIES)] | None = None
    tables: Annotated[int, Ge(1), Le(MOST_TABLES)] | None = None
    scale: Literal["none", "row", "group"] = "none"
    group_size: Annotated[int, Ge(1)] = 64
    grouping: Literal["any", "runs"] = "any"
    weighting: Literal["none", "hessian"] = "hessian"
    iterations: Annotated[int, Ge(1)] = 50
    tolerance: Annotated[float, Ge(0)] = 0.005

    @property
    def needs(self) -> Need:
        asked = {self.weighting, *(o.options.get("weighting") for o in self.overrides)}
        others = super().needs
        return "norm" if others == "none" and "hessian" in asked else others

    def check(self) -> Iterator[OptionError]:
        yield from super().check()
        if self.scale != "group" and "group_size" in self.options():
            yield OptionError("group_size", f"changes nothing where scale is {self.scale}; set it to group")

    def check_shape(self, shape: tuple[int, int]) -> str | None:
        if self.scale == "group" and shape[1] % self.group_size:
            return f"scale group needs a number of columns that group_size {self.group_size} divides; it has {shape[1]}"
        if self.tables is not None and self.tables > shape[0]:
            return f"{self.tables} tables are more than its {shape[0]} rows"
        return None

    def produces(self, kind: str) -> str:
        return "quantized" if kind == "dense" else "sparse-quantized"

    def form(self, shape: tuple[int, int]) -> CodebookForm:
        entries = self.entries or 2**self.bits
        bits = index_bits(entries)
        num_tables, groups = self.tables, shape[1] // self.group_size if self.scale == "group" else 1
        if num_tables is None:
            budget = shape[0] * (16 + bits if self.scale == "none" else groups * bits)
            choices = range(1, min(shape[0], MOST_TABLES) + 1)
            numbers = (lambda g: 32 * g) if self.grouping == "runs" else (lambda g: shape[0] * index_bits(g))
            within = (g for g in choices if 16 * g * entries + numbers(g) <= budget)
            num_tables = max(within, default=1)
        period = shape[0] if self.grouping == "runs" else 0
        scaled = self.scale != "none"
        return CodebookForm(
            bits=bits, entries=entries, num_tables=num_tables, scaled=scaled, period=period, groups=groups
        )

    def by_kmeans(self, target: Target) -> Codebooks:
        """A matrix rounded to tables of its own.

        Raises:
            SolveError: no input ever reached the site.
        """
        weight, mask = target.weight, target.mask
        importance = self._importance(target)
        form = self.form((weight.shape[0], weight.shape[1]))
        scale = root_mean_square(weight, mask, form.groups) if form.scaled else None
        row_group, period = torch.zeros(len(weight), dtype=torch.uint8), None
        if self.grouping == "runs":
            period = len(weight) if target.rows is None else target.rows.size
            row_group = even_runs(len(weight), period, min(form.num_tables, period))
        elif form.num_tables > 1:
            values = weight if scale is None else unscaled(weight, scale)
            row_group = group(quantiles(values, mask), form.num_tables)
        found = solve(
            weight,
            importance if mask is None else importance * mask,
            row_group,
            form.entries,
            scale=scale,
            iterations=self.iterations,
            tolerance=self.tolerance,
            period=period,
        )
        return found if mask is None else replace(found, codes=torch.where(mask, found.codes, found.idle()))

    def _importance(self, target: Target) -> Tensor:
        """(1, I) float32, about one on average."""
        if self.weighting == "none":
            return torch.ones(1, target.weight.shape[1])
        squares = None if target.statistics is None else target.statistics.square_sum
        if squares is None or not bool(squares.any()):
            raise SolveError("no input ever reached this layer")
        return (squares / squares.mean()).clamp_(min=FLOOR).float()[None]


@dataclass(frozen=True, kw_only=True)
class Codebook(CodebookOptions, EmbeddingOptions):
    """Give every weight the nearest of K free values; rows with similarly distributed weights share their K values.

    Masked weights stay zero and are left out of the tables.

    Source: Yvinec, Dapogny and Bailly, "Network Memory Footprint Compression Through Jointly Learnable Codebooks and
    Mappings", 2023, arXiv 2309.17361: its groups of neurons and first codebooks, without the joint learning. Weighting
    by the diagonal of the Gram matrix is from Choi, El-Khamy and Lee, "Towards the Limit of Network Quantization",
    2016, arXiv 1612.01543. Differs from the paper in: rows store the number of their table unless `reorder`
    sorts them; what rows are grouped by, that they then move to the table that serves them
    best, the number of tables and the start of k-means are a reconstruction or our choice.

    Example:
        >>> import torch, compress
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 8))
        >>> result = compress.apply(model, [compress.Codebook(entries=5, weighting="none")])
        >>> result.weights["0"].encoding.table.shape
        torch.Size([1, 5])
    """

    key: ClassVar[str] = "codebook"

    def run(self, target: Target) -> Edit:
        return Edit(encoding=self.by_kmeans(target), mask=target.mask)

    def stand_in(self) -> Self:
        return replace(self, weighting="none", overrides=())
