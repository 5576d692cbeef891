"""What the original model makes of the evaluation data, kept to compare with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.lazy import functional, torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

# Log-probabilities of the original that are kept for the KL: 256 MB; windows beyond are not compared.
REFERENCE_NUMBERS = 1 << 26


class Reference:
    """The original model's first predictions, and what it predicts right of all.

    Attributes:
        compared: how many predictions are kept: their log-probabilities or, where nothing is right, themselves.
    """

    def __init__(self, numbers: int = REFERENCE_NUMBERS) -> None:
        self._parts: list[Tensor] = []
        self._right: list[Tensor] = []
        self._numbers, self._before = numbers, 0
        self.compared = 0

    def begin(self, before: int) -> None:
        """So many predictions are kept by other processes: their room is taken before that of the first kept here."""
        self._before = before

    def keep(self, logits: Tensor, right: Tensor | None) -> None:
        """Keep (n, classes) predictions, or (n, width) outputs; only as long as there is room."""
        self._numbers, self._before = max(0, self._numbers - self._before * logits.shape[1]), 0
        if right is not None:
            self._right.append(right)
        if logits.numel() <= self._numbers:
            self._parts.append(logits if right is None else functional.log_softmax(logits, dim=-1))
            self._numbers -= logits.numel()
            self.compared += len(logits)
        else:
            self._numbers = 0  # those that are kept are the first

    def right(self, start: int, stop: int) -> Tensor:
        """Whether predictions of these numbers are right."""
        return _rows(self._right, start, stop)

    def divergence(self, logits: Tensor, start: int) -> tuple[float, int]:
        """KL from the original, summed over predictions from number `start` on, and how many it has kept of them."""
        count = min(len(logits), self.compared - start)
        if count <= 0:
            return 0.0, 0
        own, theirs = functional.log_softmax(logits[:count], dim=-1), _rows(self._parts, start, start + count)
        return functional.kl_div(own, theirs, reduction="sum", log_target=True).item(), count

    def distances(self, outputs: Tensor, start: int, logits: bool) -> tuple[float, float, float, int]:
        """Divergences, relative errors and cosines of outputs, summed over rows from number `start` on; of how many."""
        count = min(len(outputs), self.compared - start)
        if count <= 0:
            return 0.0, 0.0, 0.0, 0
        own, theirs = outputs[:count], _rows(self._parts, start, start + count)
        errors = (own - theirs).norm(dim=1) / theirs.norm(dim=1).clamp(min=1e-12)
        diverged = 0.0
        if logits:
            ours, wanted = (functional.log_softmax(each, dim=-1) for each in (own, theirs))
            diverged = functional.kl_div(ours, wanted, reduction="sum", log_target=True).item()
        return diverged, float(errors.sum()), float(functional.cosine_similarity(own, theirs).sum()), count


def _rows(parts: Sequence[Tensor], start: int, stop: int) -> Tensor:
    """Rows of tensors that lie one after the other."""
    found, offset = [], 0
    for part in parts:
        if max(start, offset) < min(stop, offset + len(part)):
            found.append(part[max(0, start - offset) : stop - offset])
        offset += len(part)
    return found[0] if len(found) == 1 else torch.cat(found)
