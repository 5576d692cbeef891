"""What a merge is: a pass that makes one model of several of one architecture, a piece of a tensor at a time.

The model that the pipeline is run on is the base. A pass sees the same piece of the same tensor of every model, and
returns the merged piece; which files they come from and where the result goes, it does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args, get_type_hints

from compress.errors import OptionError
from compress.passes.base import Pass, Reach
from compress.passes.merge.schedules import model_count, numbers_in, patterns_in, value_at, values_at

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

    from compress.models.symmetry import Units
    from compress.passes.merge.models import Models
    from compress.passes.merge.orders import ReadTensor
    from compress.passes.merge.permutation import Alignment
    from compress.passes.merge.schedules import PerModel, Value


@dataclass(frozen=True)
class Piece:
    """The same elements of one tensor in every model.

    Attributes:
        name: the tensor's full name.
        base: (n,) float32, of the model that the pipeline is run on. Not to be written to, like the others.
        others: (n,) float32 each, of the other models in the order of `models`.
        generators: one for each of them, seeded from (seed, pass, tensor name, number of the model); they go on from
            piece to piece of a tensor.
        start: the place of the first element in the whole tensor, flattened.
        total: elements of the whole tensor.
        block: number of the block that the tensor is in; None outside.
        depth: 0 at the first block and outside the blocks, 1 at the last block.
        layer: how many layers stand before the one that the tensor belongs to, or comes behind; 0 before the first.
        shape: of the whole tensor.
    """

    name: str
    base: Tensor
    others: tuple[Tensor, ...]
    generators: tuple[torch.Generator, ...] = ()
    start: int = 0
    total: int = 0
    block: int | None = None
    depth: float = 0.0
    layer: int = 0
    shape: tuple[int, ...] = ()

    def deltas(self) -> Iterator[Tensor]:
        """What each of the other models adds to the base, one in memory at a time."""
        return (other - self.base for other in self.others)


Rule = Literal["score", "negative_flips"]
Pieces = Callable[[], Iterator[Piece]]  # in order, as often as it is called, with fresh generators every time


@dataclass(frozen=True, kw_only=True)
class MergePass(Pass):
    """A pass that merges the model with others of the same architecture. Include, exclude: full names of tensors.

    Args:
        models: the others, each a local folder, a hub id, or an adapter. The model that the pipeline is run on is the
            base.
        vocabulary: of different sizes: `refuse` them, or merge the rows that all have in `common`; the further rows of
            the base stay as they are, so its tokenizer still fits.
        accept: what a model may differ in from the base although its weights fit: fields of its configuration, such as
            rope_theta, or `tokenizer`; otherwise such models are refused.
        choose: options whose values are chosen by trying them on the calibration data, such as {scale: [0.2, 0.4]}; of
            several options every combination is tried.
        by: what is chosen: the best `score` (accuracy of a classifier, else loss, mean over the sources of the data);
            or, of those not worse than the other model itself (of several, their mean), the one with the fewest
            `negative_flips`.
    """

    models: tuple[str, ...] = ()
    vocabulary: Literal["refuse", "common"] = "refuse"
    accept: tuple[str, ...] = ()
    choose: Mapping[str, tuple[float, ...]] | None = None
    by: Rule = "score"

    reach: ClassVar[Reach] = "merge"
    accepts: ClassVar[frozenset[str]] = frozenset({"dense"})
    makes_delta: ClassVar[bool] = False  # it keeps what it adds to the base in a small file too
    pairwise: ClassVar[bool] = False  # it merges exactly two
    whole_rows: ClassVar[bool] = False  # no row of a tensor is divided between its pieces
    with_base: ClassVar[bool] = False  # the base has values of its own in what is given for each model
    other_end: ClassVar[str | None] = None  # an option with which, at 1, the result is the others' alone
    aligns: ClassVar[bool] = False  # it puts the units of the others in the order of the base's before it merges
    # The same for every tensor.
    common: ClassVar[frozenset[str]] = frozenset({"models", "vocabulary", "accept", "scope", "choose", "by"})

    @property
    def judged(self) -> bool:
        """Whether merges are tried on the calibration data."""
        return bool(self.choose)

    @property
    def calibrated(self) -> bool:
        return self.judged or self.learns

    @property
    def aligns_residual(self) -> bool:
        """Whether the channels of the residual stream are put in that order too."""
        return False

    @property
    def learns(self) -> bool:
        """Whether it tries out whole models, or reads whole tensors of them, before it merges anything."""
        return False

    @property
    def learns_once(self) -> bool:
        """Whether that is the same whatever numbers are tried by `choose`."""
        return False

    @property
    def looks(self) -> bool:
        """Whether it must see a whole tensor before it merges any piece of it."""
        return False

    def learn(self, models: Models) -> Any:
        """What it must know before anything else; then given to `look` and `run` as `survey`'s would be."""

    def align(
        self, units: Sequence[Units], ours: ReadTensor, theirs: ReadTensor, generator: torch.Generator
    ) -> Alignment:
        """How the units of another model are put in the order of the base's, before anything is merged."""
        raise NotImplementedError

    def survey(self, everything: Pieces, sizes: Mapping[str, int]) -> Any:
        """What it must know of the whole models, from the pieces of all tensors; `sizes`: elements of each."""

    def look(self, tensor: Pieces, found: Any) -> Any:
        """What it must know of a whole tensor. `found` is what `survey` returned."""

    def run(self, piece: Piece, facts: Any) -> Tensor:
        """The merged piece, (n,) float32. `facts` is what `look` returned; else `survey`, or `learn`."""
        raise NotImplementedError

    def produces(self, kind: str) -> str:
        return kind

    def selects(self, name: str, in_block: bool) -> bool:
        return super().selects(name, in_block=True)

    def patterns(self) -> Iterator[tuple[str, str]]:
        yield from super().patterns()
        for f in fields(self):
            yield from ((f.name, pattern) for pattern in patterns_in(getattr(self, f.name)))

    def mistakes(self) -> Iterator[OptionError]:
        yield from super().mistakes()
        for i, override in enumerate(self.overrides):
            for name in sorted(self.common & set(override.options)):
                yield OptionError(f"overrides[{i}].{name}", "is the same for every tensor; set it on the pass")

    def alternatives(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        yield from super().alternatives()
        tried = ((name, values) for name, values in (self.choose or {}).items() if name in self._numbers())
        yield from (("", {name: value}) for name, values in tried for value in values)

    def check(self) -> Iterator[OptionError]:
        if self.pairwise and len(self.models) != 1:
            yield OptionError("models", f"{self.key} merges the model with one other; {len(self.models)} are named")
        elif not self.models:
            yield OptionError("models", "no model to merge with; name folders or hub ids, such as [./math, ./code]")
        yield from self._check_choose()
        count = len(self.models) + self.with_base
        for f in fields(self):
            wanted = model_count(getattr(self, f.name)) if f.name in ("weights", "density") else None
            if wanted is not None and wanted != count:
                first = ", the model that the pipeline is run on first" if self.with_base else ""
                yield OptionError(f.name, f"{wanted} values for {count} models: give one for each{first}")

    def _numbers(self) -> list[str]:
        """The options that a number may be chosen for."""
        hints = get_type_hints(type(self))
        own = [f.name for f in fields(self) if f.name not in self.common]
        return sorted(name for name in own if hints[name] is float or float in get_args(hints[name]))

    def _check_choose(self) -> Iterator[OptionError]:
        numbers = self._numbers()
        for name, values in (self.choose or {}).items():
            if name not in numbers:
                known = f"known: {', '.join(numbers)}" if numbers else f"{self.key} has none; leave choose out"
                yield OptionError(f"choose.{name}", f"is not a number of {self.key} that can be tried; {known}")
            elif not values:
                yield OptionError(f"choose.{name}", "no value to try; give a list of numbers")
            else:
                for value in values:
                    changed: dict[str, Any] = {name: value}
                    yield from replace(self, choose=None, by="score", **changed).check()
        if self.choose and self.learns and not self.learns_once:
            yield OptionError("choose", f"tries merges, and {self.key} would have to learn for each; give the values")
        if self.by != "score" and not (self.pairwise or self.other_end):
            yield OptionError("by", f"{self.by} compares with the one other model; {self.key} merges several")
        if self.by != "score" and not self.choose:
            yield OptionError("by", "changes nothing without choose, such as {alpha: [0.25, 0.5, 0.75]}")

    def of_whole_models(self, option: str) -> Iterator[OptionError]:
        """An error where an option differs by depth or tensor, and with `scope: model` holds for whole models."""
        values = getattr(self, option)
        plain = not isinstance(values, tuple) or all(isinstance(value, int | float) for value in values)
        overridden = any(option in override.options for override in self.overrides)
        if getattr(self, "scope", "tensor") == "model" and not (plain and not overridden):
            yield OptionError(option, "is for the whole vector with scope: model, one number for each model")

    def within(self, option: str, least: float, most: float) -> Iterator[OptionError]:
        """An error for each number of an option that is outside its range."""
        for number in numbers_in(getattr(self, option)):
            if not least <= number <= most:
                yield OptionError(option, f"{number} is not between {least:g} and {most:g}")

    def at_piece(self, value: Value, piece: Piece, default: float) -> float:
        """The number that holds for a tensor."""
        return value_at(value, piece.name, piece.depth, default)

    def of_each(self, values: PerModel, piece: Piece, default: float) -> list[float]:
        """The numbers that hold for a tensor, one for each model."""
        return values_at(values, len(self.models) + self.with_base, piece.name, piece.depth, default)
