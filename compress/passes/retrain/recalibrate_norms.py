"""Running statistics of batch norms, counted again on calibration data."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, ClassVar

from annotated_types import Ge

from compress.models.batch_norms import batch_norms
from compress.passes.base import OptionError, Pass, Reach

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from compress.models.graph import Graph


@dataclass(frozen=True, kw_only=True)
class RecalibrateNorms(Pass):
    """Count means and variances of all batch norms again, on the network as it is now.

    No mean of two networks' statistics is that of the merged network, and what pruning and rounding change is in no
    statistics either: signals that reach the norms of a merged network have far less variance than those of the
    networks it was made of, and every norm makes it worse for the next. All calibration samples run through the network
    once, with its batch norms as in training: each normalizes by the batch itself, and keeps the batch's mean m_b and
    unbiased variance v_b of every channel. The new statistics are the means over all B batches,

        running_mean = 1/B sum_b m_b,  running_var = 1/B sum_b v_b,

    which is what `torch.nn.BatchNorm2d` with `momentum=None` counts. No weight changes.

    Source: Jordan, Sedghi, Saukh, Entezari and Neyshabur, "REPAIR: REnormalizing Permuted Activations for Interpolation
    Repair", 2022, arXiv 2211.08403, section 3.1, for networks with batch norms; Izmailov et al., "Averaging Weights
    Leads to Wider Optima and Better Generalization", 2018, arXiv 1803.05407, for averages. Differs from the papers in:
    batches of about equal size instead of a smaller last one; networks without batch norms are refused, and not given
    any.

    Args:
        include: shell wildcards on full names of batch norms; empty: all.
        exclude: batch norms that keep their statistics.
        batch_size: samples that run through the network together, at most; their number decides what a norm takes for
            the mean of a batch, so take that of the training where it is known.

    Example:
        >>> import torch
        >>> from compress import RecalibrateNorms
        >>> means, variances = torch.tensor([[1.0], [3.0]]), torch.tensor([[4.0], [5.0]])
        >>> RecalibrateNorms().run(means, variances)
        (tensor([2.]), tensor([4.5000]))
    """

    batch_size: Annotated[int, Ge(2)] = 64

    key: ClassVar[str] = "recalibrate_norms"
    reach: ClassVar[Reach] = "norms"

    @property
    def calibrated(self) -> bool:
        return True

    def produces(self, kind: str) -> str:
        return kind

    def refusal(self, kind: str) -> str | None:
        return None  # weights stay as they are, of whatever kind

    def check(self) -> Iterator[OptionError]:
        if self.overrides:
            yield OptionError("overrides", "all norms count in one run of the network; choose with include and exclude")

    def chosen(self, graph: Graph) -> list[str]:
        """Full names of the norms that count again."""
        included = self.include or ("*",)
        return [
            name
            for name in batch_norms(graph.model)
            if any(fnmatchcase(name, p) for p in included) and not any(fnmatchcase(name, p) for p in self.exclude)
        ]

    def batches(self, samples: Tensor) -> list[Tensor]:
        """Samples in batches whose sizes differ by one at most."""
        return list(samples.tensor_split(-(-len(samples) // self.batch_size)))

    def run(self, means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
        """The statistics of a norm, (C,) each. means, variances: (B, C), of every batch."""
        return means.double().mean(0).to(means.dtype), variances.double().mean(0).to(variances.dtype)
