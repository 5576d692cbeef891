"""What a pass is: a frozen dataclass whose fields are its whole configuration, and one method.

A pass is given a site's weight as (out, in) float32, its mask and its statistics, and returns an edit. It knows no
device, no file, no other site, and keeps nothing between calls.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar, Self

from compress.calibration.training import Loss
from compress.errors import OptionError
from compress.passes.interface import Block, Edit, Reach, Target, Whole
from compress.passes.kinds import why_refused
from compress.passes.names import Override

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from compress.calibration.statistics import Need
    from compress.encodings import Form, InputForm, LowRankForm


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Options every pass has.

    Args:
        include: shell wildcards on full module names. Empty: every site inside the blocks. Sites outside the blocks,
            such as lm_head, are only worked on when a pattern here matches them, routers and embeddings when one names
            them: "*embed_tokens*", not "*".
        exclude: sites to leave alone.
        overrides: `{match: "*.down_proj", bits: 8}`, or `Override("*.down_proj", {"bits": 8})`.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    overrides: tuple[Override, ...] = ()

    key: ClassVar[str]
    reach: ClassVar[Reach]
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

    @property
    def ranged(self) -> bool:
        """Whether the inputs of some layer are rounded to a grid that calibration fixes."""
        return False

    @property
    def propagates(self) -> bool:
        """Whether it must know how far a site's inputs are from the original model's."""
        return False

    @property
    def surveys(self) -> bool:
        """Whether it must see everything that it works on before it decides about any of it."""
        return False

    @property
    def loss(self) -> Loss | None:
        """What it trains the whole model for; None when it does not run the model."""
        return None

    @property
    def trains_whole(self) -> bool:
        """Whether it trains something with the whole model in memory."""
        return self.loss is not None

    def check(self) -> Iterator[OptionError]:
        """Every option that the others make impossible; types and ranges are declared on the fields."""
        return iter(())

    def mistakes(self) -> Iterator[OptionError]:
        """Every impossible option, in the overrides too; all are of their declared types."""
        yield from self.check()
        for i, override in enumerate(self.overrides):
            for error in replace(self, overrides=(), **override.options).check():
                yield OptionError(f"overrides[{i}].{error.option}", error.message)

    def alternatives(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """(what stands before their names in messages, options) that may hold in the place of its own."""
        yield from ((f"overrides[{i}].", override.options) for i, override in enumerate(self.overrides))

    def check_shape(self, shape: tuple[int, int]) -> str | None:
        """Why this pass cannot work on an (out, in) matrix, or None."""
        return None

    def departure(self, shape: tuple[int, int]) -> str | None:
        """What it does otherwise than it was asked to with an (out, in) matrix, in words for the report, or None."""
        return None

    def check_shapes(self, shapes: Mapping[str, tuple[int, int]]) -> OptionError | None:
        """Why it cannot work on all these matrices together, or None."""
        return None

    def form(self, shape: tuple[int, int]) -> Form | None:
        """What its codes for an (out, in) matrix will be like; None when it makes none."""
        return None

    def low_rank_form(self, shape: tuple[int, int]) -> LowRankForm | None:
        """What its factors for an (out, in) matrix will be like, or about like; None when it makes none."""
        return None

    def input_form(self) -> InputForm | None:
        """The grid that the inputs of a layer are rounded to from then on; None leaves them as they are."""
        return None

    def produces(self, kind: str) -> str:
        """The kind of a weight (`dense`, `sparse`, `quantized`, `sparse-quantized`, ...) after this pass."""
        raise NotImplementedError

    def refusal(self, kind: str) -> str | None:
        """Why it cannot work on a kind of weight, and what to do; None where it can."""
        return None if kind in self.accepts else why_refused(self.key, kind)

    @property
    def adds_biases(self) -> bool:
        """Whether it gives layers a bias that have none."""
        return False

    def trains(self, parameter: str) -> bool:
        """Whether it also learns a parameter that is no site's: a vector, such as a bias or a norm's scale."""
        return False

    def patterns(self) -> Iterator[tuple[str, str]]:
        """(option, pattern of names) of every pattern; each must match something."""
        yield from ((option, p) for option in ("include", "exclude") for p in getattr(self, option))
        yield from (("overrides", override.match) for override in self.overrides)

    def selects(self, name: str, in_block: bool) -> bool:
        """Whether a site is worked on."""
        chosen = any(fnmatchcase(name, p) for p in self.include) if self.include else in_block
        return chosen and not any(fnmatchcase(name, p) for p in self.exclude)

    def options_at(self, name: str) -> dict[str, Any]:
        """The options of the last override that matches a site."""
        return next((dict(o.options) for o in reversed(self.overrides) if fnmatchcase(name, o.match)), {})

    def at(self, name: str) -> Self:
        """This pass with the overrides of one site applied, and no patterns left."""
        return replace(self, include=(), exclude=(), overrides=(), **self.options_at(name))

    def options(self) -> dict[str, Any]:
        """Fields that differ from their defaults."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}


class SurveyingPass(Pass):
    """A pass that goes from block to block, and may look at every matrix before it changes any: see `surveys`."""

    @property
    def survey_needs(self) -> Need:
        """What it must know about the inputs of a site for that."""
        return self.needs

    def survey(self, target: Target) -> Any:
        """What it must know of a matrix, JSON-able."""

    def allocated(self, found: Mapping[str, Any]) -> Self:
        """This pass with its options for every matrix, from what was found: site -> result."""
        return self


@dataclass(frozen=True, kw_only=True)
class LinearPass(SurveyingPass):
    """A pass that sees one matrix at a time."""

    reach: ClassVar[Reach] = "matrix"

    @property
    def rowwise(self) -> bool:
        """Rows are independent given the statistics, so matrices fed by one input may be stacked and solved once."""
        return False

    @property
    def shares_scale(self) -> bool:
        """Whether matrices that engines multiply as one are solved as one, to have one scale."""
        return False

    def run(self, target: Target) -> Edit:
        """The edit of one matrix.

        Raises:
            SolveError: the linear algebra failed; the caller retries with more damping, then runs `stand_in`.
        """
        raise NotImplementedError

    def stand_in(self) -> LinearPass:
        """A pass that cannot fail and makes the same kind of weight."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class BlockPass(SurveyingPass):
    """A pass that learns the matrices of a block together, from the block's outputs."""

    reach: ClassVar[Reach] = "block"
    learned_on_device: ClassVar[int | None] = None  # float32 numbers per weight on a device; None: not measured

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
            SolveError: nothing could be learned; the caller then runs `stand_in` on each site.
        """
        raise NotImplementedError

    def stand_in(self) -> LinearPass:
        """A pass that cannot fail and makes the same kind of weight."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ModelPass(Pass):
    """A pass that must see all its matrices before it can decide about any."""

    reach: ClassVar[Reach] = "model"

    def run(self, model: Whole) -> Iterator[tuple[str, Edit]]:
        """Edits, one site at a time, in the order of `model.names`; then those of vectors, by parameter name."""
        raise NotImplementedError


__all__ = [
    "Block", "BlockPass", "Edit", "LinearPass", "Loss", "ModelPass", "OptionError", "Override", "Pass", "Reach",
    "SurveyingPass", "Target", "Whole",
]  # fmt: skip
