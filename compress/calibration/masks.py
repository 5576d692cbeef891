"""Texts for masked language models: which tokens are hidden, and have to be found again."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from compress.lazy import torch
from compress.models.named import LEFT_OUT

if TYPE_CHECKING:
    from compress.calibration.data import Dataset

EVERY = 7  # one token of so many is hidden: about the 15 % that BERT was trained with


def masked(data: Dataset, mask: int) -> Dataset:
    """Windows of which every seventh token is hidden, each window beginning at another; the same every time.

    Args:
        data: (windows, length) token ids.
        mask: the token that stands for a hidden one.

    Returns:
        The windows, with (windows, length) labels: the hidden tokens, LEFT_OUT elsewhere.
    """
    tokens = data.inputs
    rows, columns = torch.arange(tokens.shape[0])[:, None], torch.arange(tokens.shape[1])
    hidden = (columns + rows) % EVERY == 0
    labels = tokens.masked_fill(~hidden, LEFT_OUT)
    return replace(data, inputs=tokens.masked_fill(hidden, mask), labels=labels)
