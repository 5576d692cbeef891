"""A fine-tune's delta as one sign per entry.

Shapes: n elements of a piece, k rounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt

from compress.calibration.training import ModelData, Schedule, train
from compress.encodings.signs import Signs
from compress.errors import OptionError
from compress.passes.merge.base import MergePass
from compress.passes.merge.delta_pass import DeltaPass
from compress.passes.merge.sign_scales import Distilled, Scales, distance, fit_sign_scales, signs_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from compress.passes.merge.base import Piece, Pieces
    from compress.passes.merge.models import Models


@dataclass(frozen=True, kw_only=True)
class BitDelta(DeltaPass):
    """The base plus the sign of every change a fine-tune made, one scale per matrix: a delta of one bit per weight.

    The matrices inside the blocks are coded; everything else (norms, biases, embeddings, the head) is kept as the
    fine-tune has it. The scales are learned on the calibration data: the result should predict what the fine-tune does.
    The whole model is in memory while they are, and of the fine-tune a tensor at a time.

    Source: Liu et al., "BitDelta: Your Fine-Tune May Only Be Worth One Bit", 2024, arXiv 2402.10193, sections 3.1 and
    3.2. Differs from the paper in: no change counts as positive, as in its code; what is learned are factors of the
    fitted scales, whose rate warms up and decays in straight lines; the best iterate on samples held out is kept.

    Args:
        bits: rounds; each codes, with a scale of its own, what those before it have left.
        steps: of Adam on the scales; 0 leaves each the one with the least error, and needs no data.
        batch_size: calibration samples per step.
        learning_rate: the largest, of the factors that the scales are multiplied with.

    Example:
        >>> import torch
        >>> from compress import BitDelta
        >>> from compress.passes.merge.base import Piece
        >>> tuned = torch.tensor([3.0, -1.0, -2.0, 2.0])
        >>> piece = Piece("weight", torch.zeros(4), (tuned,), total=4, block=0, shape=(2, 2))
        >>> bitdelta = BitDelta(models=("tuned",), steps=0)
        >>> bitdelta.run(piece, bitdelta.look(lambda: iter([piece]), None))
        tensor([ 2., -2., -2.,  2.])
    """

    bits: Annotated[int, Ge(1), Le(8)] = 1
    steps: Annotated[int, Ge(0)] = 200
    batch_size: Annotated[int, Ge(1)] = 4
    learning_rate: Annotated[float, Gt(0), Lt(1)] = 0.02

    key: ClassVar[str] = "bitdelta"
    coding: ClassVar[Literal["rice", "bits"]] = "bits"
    common: ClassVar[frozenset[str]] = MergePass.common | {"steps", "batch_size", "learning_rate"}

    @property
    def trains_whole(self) -> bool:
        return self.learns

    @property
    def learns(self) -> bool:
        return self.steps > 0

    def check(self) -> Iterator[OptionError]:
        yield from super().check()
        if self.steps and self.vocabulary == "common":
            yield OptionError("vocabulary", "models are run as wholes; vocabularies must be of one size, or steps 0")

    def learn(self, models: Models) -> Mapping[str, Scales]:
        """Tensor -> its scales, of every tensor that is coded."""
        with models.running() as running:
            fitted = {}
            for name in models.over(running.names, len(running.names), "bitdelta: fit"):
                delta = models.value(1, name) - models.value(0, name)
                if self._codes(models.blocks[name], delta.dim()):
                    fitted[name] = fit_sign_scales([delta.flatten()].copy, delta.numel(), self.at(name).bits)
            distilled = Distilled(models, fitted, self.learning_rate)
            if fitted:
                trial = train(
                    distilled,
                    ModelData(partial(distance, running, models), running.count, running.kept),
                    Schedule(self.steps, self.batch_size),
                    models.generator,
                    models.over,
                )
                models.notes |= trial.notes()
        return distilled.found()

    def look(self, tensor: Pieces, found: Mapping[str, Scales] | None) -> Scales:
        first = next(tensor())
        if found is not None and first.name in found:
            return found[first.name]
        rounds = self.bits if self._codes(first.block, len(first.shape)) else 0
        scales = fit_sign_scales(lambda: (next(piece.deltas()) for piece in tensor()), first.total, rounds)
        return Scales(scales, scales)

    def code(self, piece: Piece, facts: Scales) -> Signs | None:
        if not len(facts.used):
            return None
        return Signs(facts.used, signs_of(next(piece.deltas()), facts.fitted)[0])

    @staticmethod
    def _codes(block: int | None, dim: int) -> bool:
        return block is not None and dim >= 2
