"""Perplexity, accuracy, or how far outputs are from the original's: what every pass is judged by."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from compress.calibration.data import Dataset, batches
from compress.calibration.given import OF_TOKENS, by_name, gathered, kind_of, token_ids
from compress.calibration.reference import Reference
from compress.calibration.shares import LONE
from compress.calibration.surroundings import device_of, evaluating, undisturbed
from compress.errors import DataError, NonFiniteError
from compress.lazy import functional, torch, transformers
from compress.models.architecture import has_logits, predicts_masked, predicts_next
from compress.models.families import family_of
from compress.models.families.transformers_model import TOKENS, called_with
from compress.models.logits import logits_in, logits_of, rows_at_once
from compress.models.named import call_with, predicted_tokens
from compress.models.positions import longest_window

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from compress.calibration.shares import Together

TOKENS_AT_ONCE = 8192


@dataclass(frozen=True)
class Quality:
    """What was measured.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of every token but the first of each window, or of those
            that were masked; None of other models.
        tokens: how many tokens that is; of a classifier, how many samples; of other models, rows of their output.
        kl: mean over tokens (samples) of KL(original || this) in nats, on `kl_tokens` of them; None without an
            original, and of outputs that are no logits.
        accuracy: of a classifier: the share of samples (tokens) whose largest logit is the label's.
        negative_flips: share of all tokens (samples) that the original predicts right and this does not: what a user
            of the original would notice. None without an original.
        loss: mean negative log-likelihood in nats, of a classifier that of the labels; NaN without any.
        relative_error: mean over rows of |this - original| / |original|, on `kl_tokens` of them: of a model that has
            neither a next token to predict nor labels, and of which the outputs themselves are compared.
        cosine: mean over the same rows of the cosine between both.
    """

    perplexity: float | None
    tokens: int
    kl: float | None = None
    kl_tokens: int = 0
    accuracy: float | None = None
    negative_flips: float | None = None
    loss: float = math.nan
    relative_error: float | None = None
    cosine: float | None = None


# What a model is judged by: the token after each, masked tokens, or a class for each sample or token; where nothing is
# known to be right, its predictions or other outputs, compared with the original's.
Judge = Literal["next token", "masked", "classes", "predictions", "outputs"]


def judge_of(model: nn.Module, labels: Tensor | None) -> Judge:
    """What a model is judged by on data with these labels, or without any."""
    if labels is not None:
        masked = labels.dim() > 1 and isinstance(model, transformers.PreTrainedModel) and predicts_masked(model)
        return "masked" if masked else "classes"
    if not isinstance(model, transformers.PreTrainedModel):
        return "outputs"
    if called_with(model) == TOKENS and predicts_next(model):
        return "next token"
    return "predictions" if has_logits(model) else "outputs"


def pooled(parts: Sequence[Quality]) -> Quality:
    """Quality over several sources taken together: every token, sample or row counts the same."""
    tokens = sum(p.tokens for p in parts)

    def mean(name: str, weight: str = "tokens") -> float | None:
        found = [(getattr(p, name), getattr(p, weight)) for p in parts if getattr(p, name) is not None]
        count = sum(weight for _, weight in found)
        return sum(value * weight for value, weight in found) / count if count else None

    loss = sum(p.loss * p.tokens for p in parts) / tokens
    return Quality(
        perplexity=None if any(p.perplexity is None for p in parts) else perplexity_of(loss),
        tokens=tokens,
        kl=mean("kl", "kl_tokens"),
        kl_tokens=sum(p.kl_tokens for p in parts),
        accuracy=mean("accuracy"),
        negative_flips=mean("negative_flips"),
        loss=loss,
        relative_error=mean("relative_error"),
        cosine=mean("cosine"),
    )


def perplexity_of(loss: float) -> float:
    """Exp of a mean negative log-likelihood, finite."""
    return math.exp(min(loss, 700))


def measure(
    logits: Callable[[Tensor], Tensor | Iterator[Tensor]],
    tokens: Tensor,
    *,
    labels: Tensor | None = None,
    judge: Judge | None = None,
    reference: Reference | None = None,
    keep: bool = False,
    progress: Callable[[Iterable[Tensor], int], Iterator[Tensor]] | None = None,
    divided: int = 1,
    together: Together = LONE,
    tokens_of: Callable[[Tensor], Tensor] = lambda batch: batch,
) -> Quality:
    """Evaluate a causal language model, a masked one or a classifier, or compare outputs with an original's.

    Args:
        logits: (rows, length) token ids -> (rows, length, vocabulary), or, so that a large vocabulary fits into memory,
            (n, vocabulary) in turn for all positions but the last of each row; of a classifier, inputs ->
            (rows, classes); of other models, inputs -> (rows, ..., width).
        tokens: (windows, length) int64; of other models, inputs (samples, ...).
        labels: (samples,) int64; (samples, length) of masked tokens or of a class for each token, where a negative one
            is left out.
        judge: what is measured; by default the next token, or with labels classes.
        reference: of the original; compared with, or filled when `keep`.
        keep: fill `reference` instead of comparing with it.
        progress: wraps the batches.
        divided: how many parts a usual batch is divided into.
        together: the processes that share the batches; what they find is the same to the bit, however many they are.
        tokens_of: token ids of a batch, below 0 where none is predicted; by default the batch itself.

    Raises:
        NonFiniteError: what the model makes of the data is not finite.
        DataError: labels that the model has no logit for, or windows of one token.
    """
    judge = judge or ("next token" if labels is None else "classes")
    if judge == "next token" and tokens.dim() > 1 and tokens.shape[1] < 2:
        raise DataError("windows have one token; at least two tokens are needed, of which the second is predicted")
    parts = batches(tokens, TOKENS_AT_ONCE, divided)
    start, stop = (len(parts) * rank // together.world for rank in (together.rank, together.rank + 1))
    before, own = sum(map(len, parts[:start])), parts[start:stop]
    seen: list[Counted] = []
    count = sample = 0
    if reference is not None and keep:
        reference.begin(_predictions_in(before, tokens, labels, judge))
    with torch.no_grad():
        for batch in progress(own, len(own)) if progress else own:
            theirs = None if labels is None else labels[before + sample :][: len(batch)]
            meant = tokens_of(batch) if judge == "next token" else batch
            for out, wanted in _predictions(logits(batch), meant, theirs, judge):
                seen.append(_counted(out, wanted, reference, keep, count, judge == "predictions"))
                count += len(out)
            sample += len(batch)
    everything = (part for each in together.gathered(seen) for part in each)
    return _quality(everything, judge, reference is not None and not keep)


# Of some predictions: their summed loss, and divergence from the original; how many they are, how many of them were
# compared with the original's, are right, and are wrong where the original's are right. Of outputs, the summed relative
# errors and cosines.
Counted = tuple[float, float, int, int, int, int, float, float]


def _predictions_in(samples: int, tokens: Tensor, labels: Tensor | None, judge: Judge) -> int:
    """How many predictions are made of the first samples; of outputs, whose rows nobody knows, one of each."""
    if judge == "next token" and tokens.dim() > 1:
        return samples * (tokens.shape[1] - 1)
    return int((labels[:samples] >= 0).sum()) if labels is not None and labels.dim() > 1 else samples


def _counted(
    out: Tensor, wanted: Tensor | None, reference: Reference | None, keep: bool, start: int, logits: bool
) -> Counted:
    """What is counted of predictions (n, classes), or outputs (n, width), of which the first is number `start`."""
    if wanted is None:
        return _compared(out, reference, keep, start, logits)
    wanted = wanted.to(out.device)
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
    return loss, divergence, len(wanted), compared, int(right.sum()), flipped, 0.0, 0.0


def _compared(out: Tensor, reference: Reference | None, keep: bool, start: int, logits: bool) -> Counted:
    """What is counted of outputs that nothing is known to be right of; else as `_counted`."""
    if not math.isfinite(out.sum().item()) and not torch.isfinite(out).all():
        raise NonFiniteError("what the model makes of the evaluation data is NaN or infinite")
    divergence, error, cosine, compared = 0.0, 0.0, 0.0, 0
    if reference is not None and keep:
        reference.keep(out, None)
    elif reference is not None:
        divergence, error, cosine, compared = reference.distances(out, start, logits)
    return math.nan, divergence, len(out), compared, 0, 0, error, cosine


def _quality(seen: Iterable[Counted], judge: Judge, against: bool) -> Quality:
    """What was counted piece by piece, taken together. `against`: whether it was compared with an original."""
    loss = divergence = errors = cosines = 0.0
    count = compared = correct = flipped = 0
    for lost, diverged, number, both, right, wrong, error, cosine in seen:
        loss, divergence, errors, cosines = loss + lost, divergence + diverged, errors + error, cosines + cosine
        count, compared, correct, flipped = count + number, compared + both, correct + right, flipped + wrong
    kl = max(0.0, divergence / compared) if compared else None
    if judge in ("predictions", "outputs"):
        found = Quality(None, count, kl if judge == "predictions" else None, compared)
        if not compared:
            return found if against else replace(found, relative_error=0.0, cosine=1.0)  # it is the original
        return replace(found, relative_error=errors / compared, cosine=min(1.0, cosines / compared))
    flips = flipped / count if against else None
    perplexity, accuracy = (None, correct / count) if judge == "classes" else (perplexity_of(loss / count), None)
    return Quality(perplexity, count, kl, compared, accuracy, flips, loss / count)


def _predictions(
    found: Tensor | Iterator[Tensor], batch: Tensor, labels: Tensor | None, judge: Judge
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """What a model makes of a batch, row by row in pieces of one size, with what is right of it."""
    if judge != "next token":
        assert isinstance(found, torch.Tensor)
        yield _labelled(found.float(), labels)
        return
    wanted, count = batch[:, 1:].flatten(), 0
    pieces = [found[:, :-1].flatten(0, 1)] if isinstance(found, torch.Tensor) else found
    for piece in pieces:
        for part in torch.split(piece, rows_at_once(*piece.shape)):
            right = wanted[count:][: len(part)]
            count += len(part)
            there = right >= 0
            yield (part.float(), right) if bool(there.all()) else (part[there.to(part.device)].float(), right[there])


def _labelled(out: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(n, classes) rows that have a label, and those; all rows (n, width) where there are none."""
    if labels is None:
        return (out[:, None] if out.dim() == 1 else out.flatten(0, -2)), None
    if labels.dim() > 1 and out.dim() == 3 and out.shape[:2] == labels.shape:
        there = labels >= 0
        out, labels = out[there.to(out.device)], labels[there]
    _check_labels(out, labels)
    return out, labels


def _check_labels(logits: Tensor, labels: Tensor) -> None:
    if logits.dim() != 2 or len(logits) != len(labels):
        raise DataError(f"a classifier outputs (samples, classes) logits; this model outputs {tuple(logits.shape)}")
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]):
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
    """Perplexity of a language model in memory, accuracy of a classifier, and how far either is from the original.

    Both are measured in evaluation mode and are left in the mode that they were in.

    Args:
        model: a model of transformers; or a language model, called with `input_ids`, that returns an object with
            `logits`; or a classifier, called with inputs, that returns logits or an object with `logits`. Of a model
            that predicts neither a token nor a class the outputs are compared with the original's.
        data: (windows, length) integer token ids, as a tensor or an array, a list of windows, what a tokenizer returns
            (without padding), or a data loader of these; for a classifier, its inputs (samples, ...) and labels
            (samples,), or (samples, length) of a class for each token or of the tokens that were masked, negative ones
            left out. Several sources by name are measured together.
        against: the original.
        device: where both are measured, one after the other, each moved there and back again; None for where each is.
        progress: wraps the batches.
        together: the processes that share the batches, each of which calls this.

    Raises:
        DataError: data that the model cannot take, or of which nothing can be measured.
        NonFiniteError: logits that are NaN or infinite.

    Example:
        >>> import compress, torch
        >>> model, tokenizer = compress.demo.load()
        >>> tokens = compress.load_tokens("demo", tokenizer, samples=4, length=128, split="evaluation")
        >>> compress.evaluate(model, tokens, against=model).kl
        0.0
    """
    ours = isinstance(model, transformers.PreTrainedModel)
    kind = kind_of(model) if ours else "inputs" if isinstance(data, tuple) else "tokens"
    found = data if isinstance(data, Dataset) else by_name("data", data, model) or gathered("data", data, kind)
    inputs, labels = found.inputs, found.labels
    judge: Judge = judge_of(model, labels) if ours else "next token" if labels is None else "classes"
    if judge in ("predictions", "outputs") and against is None:
        raise DataError(
            f"nothing says what is right of the outputs of a {type(model).__name__}: give labels, as (inputs, labels), "
            "or the original to compare with (`against`)"
        )
    models = [model] if against is None else [model, against]
    if kind in OF_TOKENS and not found.named:
        for each in models:
            inputs = _checked_tokens(each, inputs, 2 if judge == "next token" else 1)
    measured = partial(measure, tokens=inputs, labels=labels, judge=judge, progress=progress, together=together)
    if found.named:
        measured.keywords["tokens_of"] = lambda number: predicted_tokens(model, found.named[int(number)])
    with evaluating(*models):
        reference = None
        if against is not None:
            reference = Reference()
            with _moved(against, device):
                measured(_logits_of(against, judge, found.named), reference=reference, keep=True)
        with _moved(model, device):
            return measured(_logits_of(model, judge, found.named), reference=reference)


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


def _checked_tokens(model: nn.Module, tokens: Tensor, least: int) -> Tensor:
    config: Any = getattr(model, "config", None)
    tokens = token_ids("data", tokens, getattr(config, "vocab_size", None), least)
    longest = longest_window(model)
    if longest and tokens.shape[1] > longest:
        raise DataError(f"windows of {tokens.shape[1]} tokens are longer than the model's {longest} positions")
    return tokens


def _logits_of(
    model: nn.Module, judge: Judge, named: Sequence[Mapping[str, Tensor]] = ()
) -> Callable[[Tensor], Tensor | Iterator[Tensor]]:
    device = device_of(model)
    if named:

        def of_sample(number: Tensor) -> Tensor | Iterator[Tensor]:
            sample = {name: value.to(device) for name, value in named[int(number)].items()}
            run = partial(call_with, model, sample)
            return logits_of(model, run, sample[TOKENS]) if judge == "next token" else logits_in(run())

        return of_sample
    if judge == "next token":

        def of_tokens(batch: Tensor) -> Tensor | Iterator[Tensor]:
            here = batch.to(device)
            return logits_of(model, lambda: model(input_ids=here, use_cache=False), here)

        return of_tokens
    if isinstance(model, transformers.PreTrainedModel):
        return lambda batch: logits_in(family_of(model).forward(model, batch.to(device)))
    return lambda batch: logits_in(model(batch.to(device, copy=True)))  # a first layer may work in place
