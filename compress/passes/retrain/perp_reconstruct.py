"""PERP by reconstruction: recover what pruning lost block by block, from the outputs of the original blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge

from compress.calibration.reconstruct import BLOCK_ERROR, Recipe, by_block, by_layer
from compress.errors import SolveError
from compress.passes.base import BlockPass, Edit, LinearPass, OptionError
from compress.passes.retrain.options import Retraining

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compress.calibration.statistics import Need
    from compress.calibration.training import Outcome
    from compress.passes.base import Block, Target
    from compress.passes.retrain.trainables import Trainables


@dataclass(frozen=True, kw_only=True)
class PerpReconstruct(Retraining, BlockPass):
    """Train adapters that keep zeros, biases and norms of one block at a time until its output is what it was; merge.

    Never more than a block is in memory. Zeros stay zeros, and the model is exactly as large as before.

    Source: Zimmer et al., "PERP", 2023, arXiv 2312.15230, its layer-wise reconstruction; attention and MLP apart: a
    later work of that group, 2025, arXiv 2510.14444. Differs from the papers in: a whole block is compared with the
    original's output on the original's inputs, so that what earlier blocks lost is made up for too; the best iterate on
    held-out samples is kept.

    Args:
        granularity: what is compared with the original at once: the outputs of a `block`; of its children, attention
            and MLP, one after the other (`half_block`: norms outside them stay as they are); or of every `matrix`,
            through the Gram matrix of its inputs (biases and norms stay as they are).

    Example:
        >>> import torch, compress
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 8))
        >>> passes = [compress.Magnitude(sparsity=0.5), compress.PerpReconstruct(steps=2)]
        >>> result = compress.apply(model, passes, calibration=torch.randn(16, 64))
        >>> round(float((result.model[0].weight == 0).float().mean()), 2)
        0.5
    """

    batch_size: Annotated[int, Ge(1)] = 8
    granularity: Literal["block", "half_block", "matrix"] = "block"

    key: ClassVar[str] = "perp_reconstruct"
    compares: ClassVar[bool] = True

    @property
    def needs(self) -> Need:
        return "gram" if self.granularity == "matrix" else "none"

    @property
    def runs_block(self) -> bool:
        return self.granularity != "matrix"

    def check(self) -> Iterator[OptionError]:
        yield from super().check()
        if "head" in self.train:
            yield OptionError("train", "head is outside the blocks, which are all this works on; use perp")
        if self.granularity == "matrix" and not self.of_matrices:
            yield OptionError("granularity", "matrix trains nothing but matrices; add a set such as mask_lora to train")

    def mistakes(self) -> Iterator[OptionError]:
        yield from super().mistakes()
        for i, override in enumerate(self.overrides):
            for option in set(override.options) - {"train", "rank", "alpha", "share"}:
                yield OptionError(f"overrides[{i}].{option}", "is the same for all layers, which are trained together")

    def run(self, block: Block) -> Iterator[tuple[str, Edit]]:
        trained = self.trainables(block.targets, block.vectors)
        notes: dict[str, dict[str, float]] = {}
        for names, outcome in self._learn(trained, block):
            notes |= {name: outcome.notes(BLOCK_ERROR) for name in names}
        for name, edit in trained.edits({}):
            yield name, replace(edit, notes={**edit.notes, **notes.get(name, {})})

    def _learn(self, trained: Trainables, block: Block) -> Iterator[tuple[tuple[str, ...], Outcome]]:
        recipe = Recipe(self.steps, self.batch_size)
        if self.granularity == "matrix":
            yield tuple(trained.matrices), self._by_matrix(trained, block, recipe)
        elif self.granularity == "block":
            assert block.data is not None
            yield tuple(trained.names()), by_block(trained, block.data, recipe, block.generator, block.over, block.kept)
        else:
            assert block.parts is not None
            for i, (names, data) in enumerate(block.parts(trained.hard)):
                part = trained.part(names)
                if part.count:
                    kept = block.kept.part(str(i))
                    yield names, by_block(part, data, recipe, block.generator, block.over, kept)

    def _by_matrix(self, trained: Trainables, block: Block, recipe: Recipe) -> Outcome:
        grams, original = {}, {}
        for name, target in block.targets.items():
            if name in trained.matrices and target.statistics is not None and target.statistics.gram is not None:
                assert target.original is not None
                grams[name], original[name] = target.statistics.gram, target.original
        if not grams:
            raise SolveError("no input ever reached these layers")
        return by_layer(trained.part(tuple(grams)), original, grams, recipe, block.over, block.kept)

    def stand_in(self) -> LinearPass:
        return Unchanged()


@dataclass(frozen=True, kw_only=True)
class Unchanged(LinearPass):
    """Leaves every weight as it is."""

    key: ClassVar[str] = "nothing"

    def produces(self, kind: str) -> str:
        return kind

    def run(self, target: Target) -> Edit:
        if target.stored is not None and target.stored.encoding is not None:
            return Edit(encoding=target.stored.encoding, mask=target.mask)
        return Edit(weight=target.weight, mask=target.mask)
