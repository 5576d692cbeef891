"""Means and variances of batches, as batch norms see them while a network is trained."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from compress.models.batch_norms import MEAN, VARIANCE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor
    from torch.nn.modules.batchnorm import _BatchNorm

Moments = dict[str, tuple["Tensor", "Tensor"]]  # norm -> mean and unbiased variance of each channel
COUNT = "num_batches_tracked"


@contextmanager
def moments_of(norms: Mapping[str, _BatchNorm]) -> Iterator[Callable[[], Moments]]:
    """While open, these norms work as in training, and nothing else does.

    Each normalizes by the batch itself, so that what arrives at the next is what the network makes with statistics that
    fit.

    Gives a function for what they saw since it was called last; of a norm that ran several times the mean of its runs,
    of one that did not run nothing. Afterwards the norms are as they were.
    """
    before = {name: (dict(norm._buffers), norm.momentum, norm.training) for name, norm in norms.items()}

    def forget() -> None:
        for name, norm in norms.items():
            buffers = before[name][0]
            for leaf in (MEAN, VARIANCE):
                old = buffers[leaf]
                assert old is not None
                norm._buffers[leaf] = torch.zeros_like(old)
            norm._buffers[COUNT] = torch.zeros((), dtype=torch.long, device="cpu")

    def seen() -> Moments:
        found: Moments = {}
        for name, norm in norms.items():
            mean, variance, count = (norm._buffers[leaf] for leaf in (MEAN, VARIANCE, COUNT))
            assert mean is not None
            assert variance is not None
            assert count is not None
            if int(count):
                found[name] = (mean, variance)
        forget()
        return found

    try:
        forget()
        for norm in norms.values():
            norm.momentum = None  # the mean of all runs  # type: ignore[assignment]
            norm.train()
        yield seen
    finally:
        for name, norm in norms.items():
            buffers, norm.momentum, norm.training = before[name]
            norm._buffers.update(buffers)


__all__ = ["Moments", "moments_of"]
