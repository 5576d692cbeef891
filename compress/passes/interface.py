"""What passes are given, and what they return."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from compress.calibration.training import Label, TrainingStore
from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from compress.calibration.reconstruct import BlockData, Weights
    from compress.calibration.statistics import Statistics
    from compress.calibration.training import ModelData
    from compress.encodings import Encoding, InputGrid, LowRankFactors, Weight
    from compress.models.symmetry import Axis

# What a pass must see at once: a matrix, a block, the model; all models of a merge; which blocks, experts of a layer,
# neurons and heads there are; every batch norm; all layers that read a channel; all that touches the residual stream;
# what attention layers keep.
Reach = Literal[
    "matrix", "block", "model", "merge", "depth", "experts", "width", "norms", "channels", "stream", "cache",
]  # fmt: skip

Over = Callable[[Iterable[int], int, Label], Iterator[int]]
Distance: TypeAlias = "Callable[[Tensor, Tensor], Tensor]"


@dataclass(frozen=True)
class Target:
    """What a LinearPass works on: one matrix, or several fed by the same input stacked row upon row.

    Attributes:
        weight: (out, in) float32, zero where masked. Not to be written to.
        mask: (out, in) bool, True = kept; None when dense.
        statistics: of the inputs; None when the pass needs none, or nothing ever reached the site.
        generator: seeded from (seed, pass, site name).
        kernel: neighbouring columns that belong to one input channel; more than 1 for a convolution.
        rows, columns: the channels that they are, where their order is free. None for a stack.
        original: (out, in) as it was before every pass; None unless the pass compares with it.
        stored: how it is kept: values or codes, and a correction beside them. None for a stack.
    """

    weight: Tensor
    mask: Tensor | None = None
    statistics: Statistics | None = None
    generator: torch.Generator | None = None
    kernel: int = 1
    rows: Axis | None = None
    columns: Axis | None = None
    original: Tensor | None = None
    stored: Weight | None = None


@dataclass(frozen=True)
class Block:
    """What a BlockPass works on.

    Attributes:
        targets: site name -> its weight, mask and statistics, for the sites of this pass.
        data: how to run the block, on what, and what should come out; None for a pass that does not run it.
        generator: seeded from (seed, pass, block).
        over: iterates with a progress bar: (items, number of them, label).
        vectors: parameter name -> the vectors of the block that the pass trains.
        kept: where the state of an unfinished learning is kept.
        parts: the children of the block that hold sites, one after the other: the names of sites and vectors in it, and
            how to run it. Takes what was learned so far, and is asked for the next part only when one is done.
    """

    targets: Mapping[str, Target]
    data: BlockData | None
    generator: torch.Generator
    over: Over
    vectors: Mapping[str, Tensor] = field(default_factory=dict)
    kept: TrainingStore = field(default_factory=TrainingStore)
    parts: Callable[[Callable[[], Weights]], Iterator[tuple[tuple[str, ...], BlockData]]] | None = None


@dataclass(frozen=True)
class Whole:
    """What a ModelPass works on.

    Attributes:
        names: of the sites of this pass.
        load: reads a site; nothing is kept by the caller.
        vectors: parameter name -> the vectors that the pass trains.
        data: how to run the model and on what; None for a pass that does not run it.
        generator: seeded from (seed, pass).
        over: iterates with a progress bar: (items, number of them, label).
    """

    names: tuple[str, ...]
    load: Callable[[str], Target]
    vectors: Mapping[str, Tensor] = field(default_factory=dict)
    data: ModelData | None = None
    generator: torch.Generator = field(default_factory=lambda: torch.Generator())
    over: Over = lambda items, total, label: iter(items)


@dataclass(frozen=True)
class Depth:
    """What a DepthPass works on: the blocks of a model, numbered as they stand by then.

    Attributes:
        distances: (blocks, distance, last) -> the first block of every run of so many neighbours that may go, and how
            far the output of the run is from its input: the mean of `distance(before, after)` over calibration
            data. Both are (samples, positions, width) float64; `last` leaves only the last position of each sample,
            where the model reads from left to right.
    """

    distances: Callable[[int, Distance, bool], Mapping[int, float]]


@dataclass(frozen=True)
class ExpertsSeen:
    """What an ExpertsPass works on: the experts of one layer, and what calibration data showed of them.

    Attributes:
        tokens: (experts,) int64, how many tokens each was sent.
        weighted: (experts,) float64, the sum over its tokens of the weight that the router gave it times the norm of
            what it put out; zeros for a pass that does not ask for outputs.
        weights: (experts,) float64, the sum over its tokens of the weight that the router gave it.
        distances: (experts, experts) float64, how far apart the means are of what they put out, each shown every token;
            None for a pass that does not ask for them.
        keep: how many stay.
        groups: into which they fall, neighbours together; equally many of each stay.
        may: the numbers of those that may go.
    """

    tokens: Tensor
    weighted: Tensor
    weights: Tensor
    keep: int
    groups: int
    may: frozenset[int]
    distances: Tensor | None = None


@dataclass(frozen=True)
class ExpertsLeft:
    """What an ExpertsPass leaves of the experts of one layer.

    Attributes:
        numbers: of those that stay, in order; one that is made of several has the number of one of them.
        made_of: number of one that is made of several -> the numbers of those, and the share of each; 1 together.
    """

    numbers: tuple[int, ...]
    made_of: Mapping[int, Mapping[int, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class UnitsSeen:
    """What a WidthPass works on: the units between the layers that make them and the one that reads them.

    Shapes: O outputs and I inputs of the reading layer, U units of w columns each, M matrices that make them.

    Attributes:
        weight: (O, I) float32 of the reading layer.
        columns: (U, w) int64, which of its columns each unit has; all I of them.
        keep: how many units stay.
        statistics: of the reading layer's inputs; None where the pass needs none.
        made: (M, U) float64, the sum of squares of what each matrix has of each unit, biases left out; None where the
            pass does not ask for it.
        slopes: (U,) float64, the sum of |weight * gradient of the loss| over all that each unit has; None where the
            pass does not ask for it.
        biased: whether the reading layer has a bias, which can take up what units add on average.
    """

    weight: Tensor
    columns: Tensor
    keep: int
    statistics: Statistics | None = None
    made: Tensor | None = None
    slopes: Tensor | None = None
    biased: bool = False


@dataclass(frozen=True)
class Narrowed:
    """What a WidthPass makes of them.

    Attributes:
        kept: numbers of the units that stay, ascending.
        weight: (O, keep * w) float32, the reading layer on what they have, its columns in the order they had.
        shift: (O,) to be added to the layer's bias; only where it has one.
        notes: facts for the report.
    """

    kept: tuple[int, ...]
    weight: Tensor
    shift: Tensor | None = None
    notes: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Edit:
    """What a pass did to one weight: new dense values, or codes; and the mask, where there is one. Or to its inputs.

    Attributes:
        weight: (out, in) float32 new values, or None when `encoding` is given. Of a vector: its new values.
        mask: (out, in) bool, True = kept; None when dense.
        encoding: integer codes.
        low_rank: a correction to keep beside the weight; alone it leaves the weight as it is, unless it `replaces` it.
        replaces: whether nothing is kept but `low_rank`.
        keeps: whether the weight stays as it is, and only its inputs change.
        inputs: what becomes of the layer's inputs; of a pass that `keeps` the weight, None leaves them as they are.
        shift: (out,) to be added to the bias of the layer, which gets one if it has none.
        notes: facts for the report, such as dead inputs.
    """

    weight: Tensor | None = None
    mask: Tensor | None = None
    encoding: Encoding | None = None
    low_rank: LowRankFactors | None = None
    replaces: bool = False
    keeps: bool = False
    inputs: InputGrid | None = None
    shift: Tensor | None = None
    notes: Mapping[str, float] = field(default_factory=dict)
