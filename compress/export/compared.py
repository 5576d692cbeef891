"""Whether an exported model computes what the packed one does."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from compress.calibration.data import batches
from compress.calibration.metrics import TOKENS_AT_ONCE, measure
from compress.calibration.reference import Reference
from compress.errors import CompressError
from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from compress.calibration.metrics import Judge
    from compress.export.base import Logits

NUMBERS = 1 << 24  # logits compared at most: 64 MB of each


@dataclass(frozen=True)
class Expected:
    """The outputs of the packed model.

    Attributes:
        inputs: token ids (windows, length), or images.
        labels: as `measure` takes them.
        judge: what both models are judged by.
        logits: of every batch of the inputs, float32.
    """

    inputs: Tensor
    labels: Tensor | None
    judge: Judge
    logits: list[Tensor]

    @classmethod
    def of(cls, logits: Logits, inputs: Tensor, labels: Tensor | None, judge: Judge) -> Expected:
        """Run the packed model on as many of the inputs as are compared."""
        language = judge == "next token"
        # Two tokens of a window tell how many logits a whole one has, which may be too many.
        numbers = logits(inputs[:1, :2]).shape[-1] * inputs.shape[1] if language else logits(inputs[:1]).numel()
        count = min(len(inputs), max(1, NUMBERS // numbers))
        if numbers > NUMBERS and language:
            inputs = inputs[:, : max(2, NUMBERS * inputs.shape[1] // numbers)]
        inputs, labels = inputs[:count], None if labels is None else labels[:count]
        return cls(inputs, labels, judge, [logits(batch) for batch in batches(inputs, TOKENS_AT_ONCE)])

    @property
    def finite(self) -> bool:
        """Whether the packed model's own outputs are finite."""
        return all(bool(torch.isfinite(part).all()) for part in self.logits)

    def compare(self, logits: Logits) -> dict[str, Any]:
        """Facts for the report: difference, divergence, and quality of both."""
        given, reference = iter(self.logits), Reference()
        measured = partial(measure, tokens=self.inputs, labels=self.labels, judge=self.judge, reference=reference)
        here = measured(lambda _: next(given), keep=True)
        worst, kept = 0.0, iter(self.logits)

        def there(batch: Tensor) -> Tensor:
            nonlocal worst
            found = logits(batch)
            here = float((found - next(kept)).abs().max())
            worst = worst if here <= worst else here  # NaN is the worst
            return found

        quality = measured(there)
        found: dict[str, Any] = {"max_logit_difference": worst, "kl": quality.kl}
        for name in ("perplexity", "accuracy"):
            if getattr(quality, name) is not None:
                found |= {name: getattr(quality, name), f"packed_{name}": getattr(here, name)}
        return found | {"compared_on": list(self.inputs.shape)}

    def hold(self, found: dict[str, Any], tolerance: float, name: str) -> None:
        """Refuse a model that computes something else.

        Raises:
            CompressError: says by how much.
        """
        largest = max(float(part.abs().max()) for part in self.logits)
        most = tolerance * max(1.0, largest)
        if not found["max_logit_difference"] <= most:
            raise CompressError(
                f"the logits of the exported {name} differ by {found['max_logit_difference']:.3g} from those of the "
                f"packed model, more than {most:.3g}; nothing was given its final name"
            )


def some_tokens(vocabulary: int, longest: int) -> Tensor:
    """Two windows of arbitrary token ids, always the same: for models without evaluation data."""
    length = min(128, longest)
    return (torch.arange(2 * length).view(2, length) * 7919 + 13) % vocabulary


Expect: TypeAlias = "Callable[[torch.dtype], Expected]"  # by the type that the packed model computes in
