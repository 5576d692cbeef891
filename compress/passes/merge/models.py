"""Whole models, as a merge may know them before it merges piece by piece."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    import torch
    from torch import Tensor

    from compress.calibration.training import Make, TrainingStore
    from compress.passes.base import Pass

T = TypeVar("T")


@dataclass(frozen=True)
class Tried:
    """How good a merge is on the samples of one source.

    Attributes:
        loss: mean negative log-likelihood in nats of the tokens, or of the labels.
        accuracy: of a classifier, the share of samples it has right; of a language model None.
        negative_flips: share of tokens (samples) that the base predicts right and this does not.
    """

    loss: float
    accuracy: float | None = None
    negative_flips: float | None = None

    @property
    def score(self) -> float:
        """Accuracy, or the negative loss: more is better."""
        return -self.loss if self.accuracy is None else self.accuracy


class Models(Protocol):
    """The models of a merge as wholes. Model 0 is the base, 1, 2, ... are the others.

    Attributes:
        names: of the tensors that are merged.
        blocks: tensor -> number of the block that it is in; None outside.
        generator: randomness of this pass.
        notes: what the report should say of the pass; a pass may add to it.
    """

    names: Sequence[str]
    blocks: Mapping[str, int | None]
    generator: torch.Generator
    notes: dict[str, Any]

    def over(self, items: Iterable[T], total: int | None, label: str | Callable[[], str]) -> Iterator[T]:
        """Draw progress over items."""

    def value(self, model: int, name: str) -> Tensor:
        """A whole tensor of one model, float32; not to be written to."""

    def tried(self, pass_: Pass, found: Any = None) -> dict[str, Tried]:
        """Source -> how good the merge is, on the calibration data, that `pass_` makes, knowing `found`.

        Nothing is trained on; the same merge is not made twice, also when a run goes on after it was interrupted.
        """

    def tried_alone(self, model: int) -> dict[str, Tried]:
        """Source -> how good one model is by itself, unmerged, on the calibration data."""

    def running(self) -> AbstractContextManager[Running]:
        """While open, the base is in memory and can be run with other values of its tensors."""


@dataclass(frozen=True)
class Running:
    """A model in memory.

    Attributes:
        logits: (values on demand, numbers of samples (B,)) -> logits, differentiable in the values: (B, classes), of a
            language model (B * (length - 1), vocabulary), float32.
        count: samples of the calibration data.
        kept: where the state of an unfinished training is kept.
        names: of the tensors that may have other values: those that are merged, without buffers.
        sources: (count,) the number of the source that each sample is from.
    """

    logits: Callable[[Make, Tensor], Tensor]
    count: int
    kept: TrainingStore
    names: tuple[str, ...]
    sources: Tensor
