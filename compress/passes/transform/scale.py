"""Channels with large inputs given finer steps of the grid.

Shapes: O rows, I columns, C channels, G groups of columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from annotated_types import Ge, Le

from compress.encodings import fit, quantize
from compress.encodings.uniform import dequantize
from compress.lazy import torch
from compress.passes.transform.scaling import Scaled, ScalingPass

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from compress.calibration.statistics import Need
    from compress.passes.transform.scaling import ChannelsSeen

LEAST = 1e-4  # of a scale before it is centred, as in the public code
CLIP_STEPS, NARROWEST = 20, 10  # the ranges that are tried are so many parts of the whole, down to the narrowest


@dataclass(frozen=True, kw_only=True)
class Scale(ScalingPass):
    """Multiply the weights of channels with large inputs by s = x^exponent before they are rounded, and divide before.

    A weight that is multiplied is rounded more finely next to its channel's inputs, as long as it does not widen the
    range of its group. For all layers that share their inputs one exponent is searched between 0 and 1: that with which
    the layers, rounded to nearest on the grid of the quantizer that follows, put out what is nearest to what they did.
    Give `bits`, `group_size` and `symmetric` as there. The division is folded into the norm or the layer that makes the
    channel.

    Source: Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", 2023, arXiv
    2306.00978, equations 4 and 5, and its public code for clipping. Differs from the paper in: an input is as large as
    its root mean square, not its mean absolute value; errors are those of the layers, not of the attention or MLP that
    they are in, and of all calibration tokens through their Gram matrix.

    Args:
        bits: of the quantizer that follows, 2 to 8.
        group_size: of the quantizer; None, or where it does not divide the columns, is one scale per row.
        symmetric: as of the quantizer.
        steps: how many exponents are tried, evenly from 0, which leaves everything as it is.
        clip: also narrow the range of every group of weights to that with the least error of what the group puts out.
            Weights beyond it are cut off, so the model no longer computes what it did.

    Example:
        >>> import compress
        >>> model, tokenizer = compress.demo.load()
        >>> tokens = compress.load_tokens("demo", tokenizer, samples=2, length=64)
        >>> passes = [compress.Scale(bits=3, group_size=64), compress.Rtn(bits=3, group_size=64)]
        >>> notes = compress.apply(model, passes, calibration=tokens).report.layers["model.layers.0.mlp.up_proj"]
        >>> notes["scale"]["output_error"] <= notes["scale"]["output_error_before"]
        True
    """

    bits: Annotated[int, Ge(2), Le(8)] = 4
    group_size: Annotated[int, Ge(1)] | None = None
    symmetric: bool = False
    steps: Annotated[int, Ge(2)] = 20
    clip: bool = False

    key: ClassVar[str] = "scale"

    @property
    def needs(self) -> Need:
        return "gram"

    def run(self, seen: ChannelsSeen) -> Scaled:
        gram = seen.statistics.gram
        assert gram is not None
        size = seen.of_channels(seen.statistics.square_sum.float()).sqrt()
        errors = {share: self._error(seen, gram, _scales(size, share)) for share in self._exponents()}
        best = min(errors, key=lambda share: (errors[share], share))
        scales = _scales(size, best)
        wide = seen.of_columns(scales)
        weights, error = tuple(w * wide for w in seen.weights), errors[best]
        if self.clip:
            weights = tuple(self._clipped(w, gram / wide / wide[:, None]) for w in weights)
            pairs = zip(weights, seen.weights, strict=True)
            error = sum(_lost(self._rounded(cut) / wide - w, gram) for cut, w in pairs)
        whole = sum(_lost(w, gram) for w in seen.weights) or 1.0
        notes = {
            "exponent": best,
            "output_error_before": (errors[0.0] / whole) ** 0.5,
            "output_error": (error / whole) ** 0.5,
        }
        return Scaled(scales, weights, notes)

    def _exponents(self) -> Iterator[float]:
        return (step / self.steps for step in range(self.steps))

    def _error(self, seen: ChannelsSeen, gram: Tensor, scales: Tensor) -> float:
        """What all layers put out wrong if they are rounded under such scales."""
        wide = seen.of_columns(scales)
        return sum(_lost(self._rounded(w * wide) / wide - w, gram) for w in seen.weights)

    def _rounded(self, weight: Tensor) -> Tensor:
        """(O, I) rounded to nearest on the grid of the quantizer."""
        scale, zero = fit(weight, self.bits, groups=self._groups(weight.shape[1]), symmetric=self.symmetric)
        return dequantize(quantize(weight, scale, zero, self.bits), scale, zero)

    def _groups(self, columns: int) -> int:
        return columns // self.group_size if self.group_size and columns % self.group_size == 0 else 1

    def _clipped(self, weight: Tensor, gram: Tensor) -> Tensor:
        """(O, I) with every group cut to the range with which it puts out the least error. `gram`: of its inputs."""
        groups = self._groups(weight.shape[1])
        size = weight.shape[1] // groups
        made = torch.empty_like(weight)
        for start in range(0, weight.shape[1], size):
            part = slice(start, start + size)
            made[:, part] = self._clipped_group(weight[:, part], gram[part, part])
        return made

    def _clipped_group(self, weight: Tensor, gram: Tensor) -> Tensor:
        """(O, I / G), the columns of one group."""
        largest = weight.abs().amax(1, keepdim=True)
        best, least = weight, torch.full((len(weight), 1), torch.inf, dtype=torch.float32)
        for step in range(CLIP_STEPS, NARROWEST - 1, -1):
            cut = weight.clamp(-largest * step / CLIP_STEPS, largest * step / CLIP_STEPS)
            scale, zero = fit(cut, self.bits, symmetric=self.symmetric)
            wrong = dequantize(quantize(cut, scale, zero, self.bits), scale, zero) - weight
            error = ((wrong @ gram) * wrong).sum(1, keepdim=True)
            better = error < least
            best, least = torch.where(better, cut, best), torch.where(better, error, least)
        return best


def _scales(size: Tensor, exponent: float) -> Tensor:
    """(C,) from the size of the inputs of each channel; about 1."""
    scales = (size**exponent).clamp(min=LEAST)
    return scales / (scales.amin() * scales.amax()).sqrt()


def _lost(wrong: Tensor, gram: Tensor) -> float:
    """The sum of squares of what a matrix puts out, on all inputs of which this is the Gram matrix."""
    return float(((wrong @ gram) * wrong).sum(dtype=torch.float64))


__all__ = ["Scale"]
