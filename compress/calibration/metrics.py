"""Perplexity or accuracy, and divergence from the original: what every pass is judged by."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from compress.calibration.data import batches
from compress.calibration.given import gathered, token_ids
from compress.calibration.shares import LONE
from compress.calibration.surroundings import device_of, evaluating, undisturbed
from compress.errors import DataError, NonFiniteError
from compress.lazy import functional, torch, transformers
from compress.models.families.transformers_model import called_with_images
from compress.models.logits import logits_in, logits_of, rows_at_once
from compress.models.positions import longest_window

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor, nn

    from compress.calibration.given import Kind
    from compress.calibration.shares import Together

TOKENS_AT_ONCE = 8192
# Log-probabilities of the original that are kept for the KL: 256 MB; windows beyond are not compared.
REFERENCE_NUMBERS = 1 << 26


@dataclass(frozen=True)
class Quality:
    """What was measured.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of every token but the first of each window; None of a
            classifier.
        tokens: how many tokens that is; of a classifier, how many samples.
        kl: mean over tokens (samples) of KL(original || this) in nats, on `kl_tokens` of them; None without an
            original.
        accuracy: of a classifier: the share of samples whose largest logit is the label's.
        negative_flips: share of all tokens (samples) that the original predicts right and this does not: what a user
            of the original would notice. None without an original.
        loss: mean negative log-likelihood in nats, of a classifier that of the labels.
    """

    perplexity: float | None
    tokens: int
    kl: float | None = None
    kl_tokens: int = 0
    accuracy: float | None = None
    negative_flips: float | None = None
    loss: float = math.nan


def pooled(parts: Sequence[Quality]) -> Quality:
    """Quality over several sources taken together: every token, or sample, counts the same."""
    tokens, compared = sum(p.tokens for p in parts), sum(p.kl_tokens for p in parts)
    loss = sum(p.loss * p.tokens for p in parts) / tokens
    kl = sum((p.kl or 0.0) * p.kl_tokens for p in parts) / compared if compared else None
    flips = [p.negative_flips * p.tokens for p in parts if p.negative_flips is not None]
    right = [p.accuracy * p.tokens for p in parts if p.accuracy is not None]
    return Quality(
        perplexity=None if right else perplexity_of(loss),
        tokens=tokens,
        kl=kl,
        kl_tokens=compared,
        accuracy=sum(right) / tokens if right else None,
        negative_flips=sum(flips) / tokens if flips else None,
        loss=loss,
    )


def perplexity_of(loss: float) -> float:
    """Exp of a mean negative log-likelihood, finite."""
    return math.exp(min(loss, 700))


class Reference:
    """The original model's log-probabilities of the first predictions, and what it predicts right of all.

    Attributes:
        compared: of how many predictions the log-probabilities are kept.
    """

    def __init__(self, numbers: int = REFERENCE_NUMBERS) -> None:
        self._parts: list[Tensor] = []
        self._right: list[Tensor] = []
        self._numbers, self._before = numbers, 0
        self.compared = 0

    def begin(self, before: int) -> None:
        """So many predictions are kept by other processes: their room is taken before that of the first kept here."""
        self._before = before

    def keep(self, logits: Tensor, right: Tensor) -> None:
        """Keep (n, classes) predictions; their log-probabilities only as long as there is room."""
        self._right.append(right)
        self._numbers, self._before = max(0, self._numbers - self._before * logits.shape[1]), 0
        if logits.numel() <= self._numbers:
            self._parts.append(functional.log_softmax(logits, dim=-1))
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


def _rows(parts: Sequence[Tensor], start: int, stop: int) -> Tensor:
    """Rows of tensors that lie one after the other."""
    found, offset = [], 0
    for part in parts:
        if max(start, offset) < min(stop, offset + len(part)):
            found.append(part[max(0, start - offset) : stop - offset])
        offset += len(part)
    return found[0] if len(found) == 1 else torch.cat(found)


def measure(
    logits: Callable[[Tensor], Tensor | Iterator[Tensor]],
    tokens: Tensor,
    *,
    labels: Tensor | None = None,
    reference: Reference | None = None,
    keep: bool = False,
    progress: Callable[[Iterable[Tensor], int], Iterator[Tensor]] | None = None,
    divided: int = 1,
    together: Together = LONE,
) -> Quality:
    """Evaluate a causal language model or, with labels, a classifier.

    Args:
        logits: (rows, length) token ids -> (rows, length, vocabulary), or, so that a large vocabulary fits into memory,
            (n, vocabulary) in turn for all positions but the last of each row; of a classifier, inputs ->
            (rows, classes).
        tokens: (windows, length) int64; of a classifier, inputs (samples, ...).
        labels: (samples,) int64.
        reference: of the original; compared with, or filled when `keep`.
        keep: fill `reference` instead of comparing with it.
        progress: wraps the batches.
        divided: how many parts a usual batch is divided into.
        together: the processes that share the batches; what they find is the same to the bit, however many they are.

    Raises:
        NonFiniteError: the model's logits are not finite.
        DataError: labels that the model has no logit for, or windows of one token.
    """
    if labels is None and tokens.shape[1] < 2:
        raise DataError("windows have one token; at least two tokens are needed, of which the second is predicted")
    parts = batches(tokens, TOKENS_AT_ONCE, divided)
    start, stop = (len(parts) * rank // together.world for rank in (together.rank, together.rank + 1))
    before, own = sum(map(len, parts[:start])), parts[start:stop]
    seen: list[Counted] = []
    count = 0
    if reference is not None and keep:
        reference.begin(before if labels is not None else before * (tokens.shape[1] - 1))
    with torch.no_grad():
        for batch in progress(own, len(own)) if progress else own:
            first = count
            for out in _predictions(logits(batch), labels is None):
                if labels is None:
                    wanted = batch[:, 1:].flatten()[count - first :][: len(out)]
                else:
                    wanted = labels[before + count :][: len(batch)]
                    _check_labels(out, wanted)
                seen.append(_counted(out, wanted.to(out.device), reference, keep, count))
                count += len(wanted)
    everything = (part for each in together.gathered(seen) for part in each)
    return _quality(everything, labels is None, reference is not None and not keep)


# Of some predictions: their summed loss, and divergence from the original; how many they are, how many of them were
# compared with the original's, are right, and are wrong where the original's are right.
Counted = tuple[float, float, int, int, int, int]


def _counted(out: Tensor, wanted: Tensor, reference: Reference | None, keep: bool, start: int) -> Counted:
    """What is counted of predictions (n, classes) of which the first is number `start`."""
    right = out.argmax(1) == wanted
    loss = functional.cross_entropy(out, wanted, reduction="sum").item()
    if not math.isfinite(loss):
        raise NonFiniteError("the model's logits on the evaluation data are NaN or infinite")
    divergence, compared, flipped = 0.0, 0, 0
    if reference is not None and keep:
        reference.keep(out, right)
    elif reference is not None:
        flipped = int((reference.right(start, start + len(wanted)) & ~right).sum())
        divergence, compared = reference.divergence(out, start)
    return loss, divergence, len(wanted), compared, int(right.sum()), flipped


def _quality(seen: Iterable[Counted], language: bool, against: bool) -> Quality:
    """What was counted piece by piece, taken together. `against`: whether it was compared with an original."""
    loss = divergence = 0.0
    count = compared = correct = flipped = 0
    for lost, diverged, number, both, right, wrong in seen:
        loss, divergence = loss + lost, divergence + diverged
        count, compared, correct, flipped = count + number, compared + both, correct + right, flipped + wrong
    kl = max(0.0, divergence / compared) if compared else None
    flips = flipped / count if against else None
    perplexity, accuracy = (perplexity_of(loss / count), None) if language else (None, correct / count)
    return Quality(perplexity, count, kl, compared, accuracy, flips, loss / count)


def _predictions(found: Tensor | Iterator[Tensor], tokens: bool) -> Iterator[Tensor]:
    """Logits in pieces of one size, whoever made them: (n, vocabulary), or all (rows, classes) of a classifier."""
    if not tokens:
        assert isinstance(found, torch.Tensor)
        yield found.float()
        return
    pieces = [found[:, :-1].flatten(0, 1)] if isinstance(found, torch.Tensor) else found
    for piece in pieces:
        yield from (part.float() for part in torch.split(piece, rows_at_once(*piece.shape)))


def _check_labels(logits: Tensor, labels: Tensor) -> None:
    if logits.dim() != 2 or len(logits) != len(labels):
        raise DataError(f"a classifier outputs (samples, classes) logits; this model outputs {tuple(logits.shape)}")
    if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
        raise DataError(f"labels outside 0..{logits.shape[1] - 1}: the model has no logit for them")


@undisturbed()
def evaluate(
    model: nn.Module,
    data: Any,
    *,
    against: nn.Module | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[Iterable[Tensor], int], Iterator[Tensor]] | None = None,
    together: Together = LONE,
) -> Quality:
    """Perplexity of a causal language model in memory, or accuracy of a classifier, and divergence from the original.

    Both are measured in evaluation mode and are left in the mode that they were in.

    Args:
        model: a language model, called with `input_ids`, that returns an object with `logits`; or a classifier, called
            with inputs, that returns logits or an object with `logits`.
        data: (windows, length) integer token ids, as a tensor or an array, a list of windows, what a tokenizer returns
            (without padding), or a data loader of these; for a classifier, its inputs (samples, ...) and labels
            (samples,). Several sources by name are measured together.
        against: the original.
        device: where both are measured, one after the other, each moved there and back again; None for where each is.
        progress: wraps the batches.
        together: the processes that share the batches, each of which calls this.

    Raises:
        DataError: data that the model cannot take.
        NonFiniteError: logits that are NaN or infinite.

    Example:
        >>> import compress, torch
        >>> model, tokenizer = compress.demo.load()
        >>> tokens = compress.load_tokens("demo", tokenizer, samples=4, length=128, split="evaluation")
        >>> compress.evaluate(model, tokens, against=model).kl
        0.0
    """
    found = gathered("data", data, _kind(model, data))
    inputs, labels = found.inputs, found.labels
    models = [model] if against is None else [model, against]
    if labels is None:
        for each in models:
            inputs = _checked_tokens(each, inputs)
    measured = partial(measure, tokens=inputs, labels=labels, progress=progress, together=together)
    with evaluating(*models):
        reference = None
        if against is not None:
            reference = Reference()
            with _moved(against, device):
                measured(_logits_of(against, labels), reference=reference, keep=True)
        with _moved(model, device):
            return measured(_logits_of(model, labels), reference=reference)


@contextmanager
def _moved(model: nn.Module, device: torch.device | str | None) -> Iterator[None]:
    """While open, a model is on another device."""
    before = device_of(model)
    if device is None or before == torch.device(device):
        yield
        return
    model.to(device)
    try:
        yield
    finally:
        model.to(before)


def _kind(model: nn.Module, data: Any) -> Kind:
    """What a model is measured on: a classifier of its own kind says it by its labels."""
    if isinstance(model, transformers.PreTrainedModel) and called_with_images(model):
        return "images"
    return "inputs" if isinstance(data, tuple) else "tokens"


def _checked_tokens(model: nn.Module, tokens: Tensor) -> Tensor:
    config: Any = getattr(model, "config", None)
    if isinstance(model, transformers.PreTrainedModel) and called_with_images(model):
        raise DataError("a model that takes no tokens is evaluated on (inputs, labels), for its accuracy")
    tokens = token_ids("data", tokens, getattr(config, "vocab_size", None), 2)
    longest = longest_window(model)
    if longest and tokens.shape[1] > longest:
        raise DataError(f"windows of {tokens.shape[1]} tokens are longer than the model's {longest} positions")
    return tokens


def _logits_of(model: nn.Module, labels: Tensor | None) -> Callable[[Tensor], Tensor | Iterator[Tensor]]:
    device = device_of(model)

    def of_tokens(batch: Tensor) -> Tensor | Iterator[Tensor]:
        here = batch.to(device)
        return logits_of(model, lambda: model(input_ids=here, use_cache=False), here)

    if labels is None:
        return of_tokens
    return lambda batch: logits_in(model(batch.to(device, copy=True)))  # a first layer may work in place
