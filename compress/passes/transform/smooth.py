"""Outliers of inputs moved into weights.

Shapes: O rows, I columns, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from annotated_types import Ge, Le

from compress.lazy import torch
from compress.passes.transform.scaling import Scaled, ScalingPass

if TYPE_CHECKING:
    from compress.calibration.statistics import Need
    from compress.passes.transform.scaling import ChannelsSeen

LEAST = 1e-5  # of a maximum, as in the public code: a channel that is never used is not blown up


@dataclass(frozen=True, kw_only=True)
class Smooth(ScalingPass):
    """Divide input channels by s = max|x|^strength / max|w|^(1 - strength), and multiply the weights with s.

    Outliers of the inputs, which one scale for a token or a tensor cannot hold, go into the weights, which have a scale
    for every row or group. The division is folded into the norm or the layer that makes the channel.

    Source: Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
    2022, arXiv 2211.10438, equation 4. Differs from the paper in: values of attention and gated neurons are smoothed
    too where the layer that makes them can take the division; `include` leaves them out.

    Args:
        strength: of the migration, alpha in the paper. 1 makes the inputs of all channels alike, 0 the weights.

    Example:
        >>> import compress
        >>> model, tokenizer = compress.demo.load()
        >>> tokens = compress.load_tokens("demo", tokenizer, samples=2, length=64)
        >>> passes = [compress.Smooth(), compress.Rtn(bits=8, activation_bits=8)]
        >>> result = compress.apply(model, passes, calibration=tokens)
        >>> round(result.report.layers["model.layers.0.mlp.down_proj"]["smooth"]["largest"], 1) > 1
        True
    """

    strength: Annotated[float, Ge(0), Le(1)] = 0.5

    key: ClassVar[str] = "smooth"

    @property
    def needs(self) -> Need:
        return "peak"

    def run(self, seen: ChannelsSeen) -> Scaled:
        peak = seen.statistics.peak
        assert peak is not None
        largest = torch.stack([w.abs().amax(0) for w in seen.weights]).amax(0)
        inputs = seen.of_channels(peak.float()).clamp(min=LEAST)
        weights = seen.of_channels(largest).clamp(min=LEAST)
        scales = inputs**self.strength / weights ** (1 - self.strength)
        scales = scales / (scales.amin() * scales.amax()).sqrt()  # norms and makers keep about their size
        wide = seen.of_columns(scales)
        notes = {"largest": float(scales.amax()), "smallest": float(scales.amin())}
        return Scaled(scales, tuple(w * wide for w in seen.weights), notes)


__all__ = ["Smooth"]
