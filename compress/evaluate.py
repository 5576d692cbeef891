"""Perplexity, divergence from the original, and size: what every pass is judged by."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from compress.calibration.data import batches
from compress.errors import DataError, NonFiniteError

TOKENS_AT_ONCE = 8192
REFERENCE_NUMBERS = (
    1 << 26
)  # log-probabilities of the original kept for the KL: 256 MB; windows beyond are not compared


@dataclass(frozen=True)
class Quality:
    """What was measured.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of every token but the first of each window.
        tokens: how many tokens that is.
        kl: mean over tokens of KL(original || this) in nats, on `kl_tokens` tokens; None without an original.
    """

    perplexity: float
    tokens: int
    kl: float | None = None
    kl_tokens: int = 0


class Reference:
    """The original model's log-probabilities on the first evaluation windows."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        self.numbers = 0

    def keep(self, logits: Tensor) -> None:
        """Keep a batch, as long as there is room."""
        if self.numbers + logits.numel() <= REFERENCE_NUMBERS:
            self.parts.append(log_softmax(logits, dim=-1))
            self.numbers += logits.numel()


def measure(
    logits: Callable[[Tensor], Tensor],
    tokens: Tensor,
    *,
    reference: Reference | None = None,
    keep: bool = False,
    progress: Callable[[Iterable[Tensor], int], Iterator[Tensor]] | None = None,
) -> Quality:
    """Evaluate a causal language model.

    Args:
        logits: (rows, length) token ids -> (rows, length, vocabulary).
        tokens: (windows, length) int64.
        reference: of the original; compared with, or filled when `keep`.
        keep: fill `reference` instead of comparing with it.
        progress: wraps the batches.

    Raises:
        NonFiniteError: the model's logits are not finite.
    """
    loss = divergence = 0.0
    count = compared = 0
    parts = batches(tokens, TOKENS_AT_ONCE)
    with torch.no_grad():
        for number, batch in enumerate(progress(parts, len(parts)) if progress else parts):
            out = logits(batch)[:, :-1].float()
            total = cross_entropy(out.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
            if not math.isfinite(total):
                raise NonFiniteError("the model's logits on the evaluation data are NaN or infinite")
            loss += total
            count += batch[:, 1:].numel()
            if reference is not None and keep:
                reference.keep(out)
            elif reference is not None and number < len(reference.parts):
                original = reference.parts[number]
                own = log_softmax(out, dim=-1)
                divergence += kl_div(own, original, reduction="sum", log_target=True).item()
                compared += batch[:, 1:].numel()
    kl = max(0.0, divergence / compared) if compared else None
    return Quality(math.exp(min(loss / count, 700)), count, kl, compared)


def evaluate(model: nn.Module, tokens: Tensor, *, against: nn.Module | None = None) -> Quality:
    """Perplexity of a causal language model in memory and, given the original, the divergence from it.

    Args:
        model: called with `input_ids`, returns an object with `logits`.
        tokens: (windows, length) int64 token ids.
        against: the original.

    Raises:
        DataError: tokens that the model cannot take.
        NonFiniteError: logits that are NaN or infinite.

    Example:
        >>> import compress, torch
        >>> model, tokenizer = compress.demo.load()
        >>> tokens = compress.load_tokens("demo", tokenizer, samples=4, length=128, split="evaluation")
        >>> compress.evaluate(model, tokens, against=model).kl
        0.0
    """
    for each in (model, against):
        if each is not None:
            _check(each, tokens)
    reference = None
    if against is not None:
        reference = Reference()
        measure(_logits_of(against), tokens, reference=reference, keep=True)
    return measure(_logits_of(model), tokens, reference=reference)


def _check(model: nn.Module, tokens: Tensor) -> None:
    config: Any = getattr(model, "config", None)
    vocabulary, longest = getattr(config, "vocab_size", None), getattr(config, "max_position_embeddings", None)
    if tokens.dim() != 2 or tokens.is_floating_point() or tokens.shape[1] < 2:
        raise DataError(f"tokens must be (windows, length) integers, length at least 2; got {tuple(tokens.shape)}")
    if vocabulary and not (int(tokens.min()) >= 0 and int(tokens.max()) < vocabulary):
        raise DataError(f"token ids outside 0..{vocabulary - 1}: they belong to another tokenizer")
    if longest and tokens.shape[1] > longest:
        raise DataError(f"windows of {tokens.shape[1]} tokens are longer than the model's {longest} positions")


def _logits_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    def logits(batch: Tensor) -> Tensor:
        out: Any = model(input_ids=batch, use_cache=False)
        result: Tensor = out.logits
        return result

    return logits
