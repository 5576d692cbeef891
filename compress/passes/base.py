"""What a pass is: a frozen dataclass whose fields are its whole configuration, and one method.

A pass is given a site's weight as (out, in) float32, its mask and its statistics, and returns an edit. It knows no
device, no file, no other site, and keeps nothing between calls.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from compress.axes import Axis
from compress.calibration.reconstruct import BlockData
from compress.calibration.statistics import Need, Statistics
from compress.encodings import Encoding, Form, InputForm, LowRank, LowRankForm
from compress.passes.names import Override


class OptionError(ValueError):
    """An impossible option. `option` names the field; the pipeline adds file, line and path."""

    def __init__(self, option: str, message: str):
        super().__init__(f"{option}: {message}")
        self.option, self.message = option, message


@dataclass(frozen=True)
class Target:
    """What a LinearPass works on: one matrix, or several fed by the same input stacked row upon row.

    Attributes:
        weight: (out, in) float32, zero where masked. Not to be written to.
        mask: (out, in) bool, True = kept; None when dense.
        statistics: of the inputs; None when the pass needs none, or nothing ever reached the site.
        generator: seeded from (seed, pass, site name).
        kernel: neighbouring columns that belong to one input channel; more than 1 for a convolution.
        rows, columns: the channels that they are, where their order is free; columns only for a ModelPass.
        original: (out, in) as it was before every pass; None unless the pass compares with it.
    """

    weight: Tensor
    mask: Tensor | None = None
    statistics: Statistics | None = None
    generator: torch.Generator | None = None
    kernel: int = 1
    rows: Axis | None = None
    columns: Axis | None = None
    original: Tensor | None = None


@dataclass(frozen=True)
class Block:
    """What a BlockPass works on.

    Attributes:
        targets: site name -> its weight, mask and statistics, for the sites of this pass.
        data: how to run the block, on what, and what should come out; None for a pass that does not run it.
        generator: seeded from (seed, pass, block).
        over: iterates with a progress bar: (items, number of them, label).
    """

    targets: Mapping[str, Target]
    data: BlockData | None
    generator: torch.Generator
    over: Callable[[Iterable[int], int, str], Iterator[int]]


@dataclass(frozen=True)
class Edit:
    """What a pass did to one weight: new dense values, or codes; and the mask, where there is one.

    Attributes:
        weight: (out, in) float32 new values, or None when `encoding` is given.
        mask: (out, in) bool, True = kept; None when dense.
        encoding: integer codes.
        low_rank: a correction to keep beside the weight as it is; then neither `weight` nor `encoding` is given.
        notes: facts for the report, such as dead inputs.
    """

    weight: Tensor | None = None
    mask: Tensor | None = None
    encoding: Encoding | None = None
    low_rank: LowRank | None = None
    notes: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Options every pass has.

    Args:
        include: shell wildcards on full module names. Empty: every site inside the blocks. Sites outside the blocks,
            such as lm_head, are only worked on when a pattern here matches them.
        exclude: sites to leave alone.
        overrides: `{match: "*.down_proj", bits: 8}`, or `Override("*.down_proj", {"bits": 8})`.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    overrides: tuple[Override, ...] = ()

    key: ClassVar[str]
    accepts: ClassVar[frozenset[str]] = frozenset({"dense", "sparse"})
    compares: ClassVar[bool] = False  # wants `Target.original`
    preserves: ClassVar[bool] = False  # the model computes what it did: this is the original from then on

    @property
    def needs(self) -> Need:
        """What it must know about the inputs of a site."""
        return "none"

    @property
    def calibrated(self) -> bool:
        """Whether it learns from data."""
        return self.needs != "none"

    def check(self) -> Iterator[OptionError]:
        """Every impossible option."""
        return iter(())

    def mistakes(self) -> Iterator[OptionError]:
        """Every impossible option, in the overrides too."""
        yield from self.check()
        known = {f.name for f in fields(self)} - {"include", "exclude", "overrides"}
        for i, override in enumerate(self.overrides):
            unknown = sorted(set(override.options) - known)
            for name in unknown:
                yield OptionError(f"overrides[{i}].{name}", f"unknown option of {self.key}; known: {sorted(known)}")
            if not unknown:
                for error in replace(self, overrides=(), **override.options).check():
                    yield OptionError(f"overrides[{i}].{error.option}", error.message)

    def check_shape(self, shape: tuple[int, int]) -> str | None:
        """Why this pass cannot work on an (out, in) matrix, or None."""
        return None

    def form(self, shape: tuple[int, int]) -> Form | None:
        """What its codes for an (out, in) matrix will be like; None when it makes none."""
        return None

    def low_rank_form(self, shape: tuple[int, int]) -> LowRankForm | None:
        """What its correction of an (out, in) matrix will be like, or about like; None when it makes none."""
        return None

    def input_form(self) -> InputForm | None:
        """The grid that the inputs of a layer are rounded to from then on; None leaves them as they are."""
        return None

    def produces(self, kind: str) -> str:
        """The kind of a weight (`dense`, `sparse`, `quantized`, `sparse-quantized`) after this pass."""
        raise NotImplementedError

    def selects(self, name: str, in_block: bool) -> bool:
        """Whether a site is worked on."""
        if any(fnmatchcase(name, p) for p in self.exclude):
            return False
        return any(fnmatchcase(name, p) for p in self.include) if self.include else in_block

    def at(self, name: str) -> Self:
        """This pass with the overrides of one site applied, and no patterns left."""
        options: dict[str, Any] = {}
        for override in self.overrides:
            if fnmatchcase(name, override.match):
                options = dict(override.options)
        return replace(self, include=(), exclude=(), overrides=(), **options)

    def options(self) -> dict[str, Any]:
        """Fields that differ from their defaults."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}


@dataclass(frozen=True, kw_only=True)
class LinearPass(Pass):
    """A pass that sees one matrix at a time."""

    @property
    def rowwise(self) -> bool:
        """Rows are independent given the statistics, so matrices fed by one input may be stacked and solved once."""
        return False

    @property
    def surveys(self) -> bool:
        """Whether it must see all its matrices before it knows its options for any of them."""
        return False

    @property
    def survey_needs(self) -> Need:
        """What it must know about the inputs of a site for that."""
        return self.needs

    def survey(self, target: Target) -> Any:
        """What it must know of a matrix, JSON-able."""

    def allocated(self, found: Mapping[str, Any]) -> Self:
        """This pass with its options for every matrix, from what was found: site -> result."""
        return self

    def run(self, target: Target) -> Edit:
        """The edit of one matrix.

        Raises:
            SolveError: the linear algebra failed; the caller retries with more damping, then runs `fallback`.
        """
        raise NotImplementedError

    def fallback(self) -> "LinearPass":
        """A pass that cannot fail and makes the same kind of weight."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class BlockPass(Pass):
    """A pass that learns the matrices of a block together, from the block's outputs."""

    @property
    def calibrated(self) -> bool:
        return True

    @property
    def runs_block(self) -> bool:
        """Whether it needs `Block.data`."""
        return True

    def run(self, block: Block) -> Iterator[tuple[str, Edit]]:
        """The edits of a block's sites, in the order of `block.targets`.

        Raises:
            SolveError: nothing could be learned; the caller then runs `fallback` on each site.
        """
        raise NotImplementedError

    def fallback(self) -> LinearPass:
        """A pass that cannot fail and makes the same kind of weight."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ModelPass(Pass):
    """A pass that must see all its matrices before it can decide about any."""

    def run(self, names: tuple[str, ...], load: Callable[[str], Target]) -> Iterator[tuple[str, Edit]]:
        """Edits, one site at a time, in the order of `names`. `load` reads a site; nothing is kept by the caller."""
        raise NotImplementedError


__all__ = ["Block", "BlockPass", "Edit", "LinearPass", "ModelPass", "OptionError", "Override", "Pass", "Target"]
