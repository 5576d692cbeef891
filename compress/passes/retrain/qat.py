"""Quantization-aware training, after the fact: codes that the loss of the whole model has decided about.

Shapes: O rows, I columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Gt, Le, Lt

from compress.encodings.uniform import Search
from compress.lazy import torch
from compress.passes.base import ModelPass, OptionError
from compress.passes.kinds import why_refused
from compress.passes.quantize.grid import UniformOptions
from compress.passes.retrain.adapters import AdaptedMatrix, Recipe
from compress.passes.retrain.options import EndToEndRetraining, Train
from compress.passes.retrain.rounded import FROM_WEIGHTS, Grid, RoundedMatrix, Scale, ternary_step

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from compress.encodings import Form, LowRankForm, UniformForm
    from compress.passes.base import Target

Levels = Literal["even", "ternary", "stored"]
OF_GRIDS = ("bits", "group_size", "granularity", "fallback", "symmetric", "scale_search")
NOT_ROUNDED = {
    "head": "is not rounded here; train it with perp",
    "scale": "is an option here: scale: lsq trains the steps",
    "lora_prune": "trains weights that are gone; name lora, mask_lora or full",
}


@dataclass(frozen=True, kw_only=True)
class Qat(UniformOptions, EndToEndRetraining):
    """Train the whole model with its matrices rounded, gradients passing through the rounding; keep the codes.

    Latent weights start as the weights of the model and are dropped in the end: what is left is codes and scales like
    those of rtn. Behind a quantizer they start as near to the original weights as rounds to the codes that are there.
    Masked weights stay zero. The whole model is in memory while it is trained.

    Source: straight-through rounding and learned steps (`lsq`): Esser et al., "Learned Step Size Quantization", ICLR
    2020, arXiv 1902.08153; `stats` and `anneal`: Liu, Liu and Cheng, "Oscillation-free Quantization for Low-bit Vision
    Transformers" (OFQ), ICML 2023, arXiv 2302.02210; `mean` and ternary levels: Ma et al., "The Era of 1-bit LLMs"
    (BitNet b1.58), 2024, arXiv 2402.17764. Differs from the paper in: a trained model is the start, and its predictions
    are the goal; steps are learned as logarithms with a rate of their own, as Adam does not see the paper's factor 1 /
    sqrt(n Q) on their gradients, and start where the error of the weights is least; levels of `stats` are whole steps,
    zero among them; what `anneal` holds stays held, at its level instead of its latent value; one step may serve a
    group of columns; the best iterate on held-out samples is kept.

    Args:
        levels: `even`, 2**bits of them; `ternary`, -1, 0 and 1 steps, in codes of 2 bits; `stored`, those of the codes
            that a quantizer before it made.
        scale: where the step comes from: `lsq` learns it; `fixed` leaves it as it was fitted; `stats`, and for ternary
            levels `mean` and `median`, read it off the magnitudes of the latent weights at every step.
        scale_rate: learning rate of learned steps, a relative change.
        anneal: share of the steps, at the end, in which weights that are not near a border between two levels are held
            at theirs (OFQ), so that those which go to and fro come to rest; None holds none.

    Example:
        >>> import torch, compress
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 8))
        >>> passes = [compress.Qat(bits=2, symmetric=True, steps=2)]
        >>> result = compress.apply(model, passes, calibration=torch.randn(16, 64))
        >>> result.weights["0"].kind
        'quantized'
    """

    train: tuple[Train, ...] = ("bias", "norm", "full")
    scale_search: Search = "mse"
    levels: Levels = "even"
    scale: Scale = "lsq"
    scale_rate: Annotated[float, Gt(0), Lt(1)] = 5e-3
    anneal: Annotated[float, Gt(0), Le(1)] | None = None

    key: ClassVar[str] = "qat"
    compares: ClassVar[bool] = True
    accepts: ClassVar[frozenset[str]] = frozenset({"dense", "sparse", "quantized", "sparse-quantized"})

    def check(self) -> Iterator[OptionError]:
        yield from super().check()
        given = self.options()
        for name in self.train:
            if name in NOT_ROUNDED:
                yield OptionError("train", f"{name} {NOT_ROUNDED[name]}")
        if self.levels == "stored":
            for option in (name for name in OF_GRIDS if name in given):
                yield OptionError(option, "changes nothing with levels: stored, which keeps the grid that is there")
        if self.levels == "ternary" and "bits" in given and self.bits != 2:
            yield OptionError("bits", f"{self.bits} with levels: ternary, whose codes have 2; leave it out")
        if self.scale in ("mean", "median") and self.levels != "ternary":
            yield OptionError("scale", f"{self.scale} is the step of ternary levels; set levels: ternary")
        elif self.scale in FROM_WEIGHTS and (self.levels == "stored" or not self._symmetric):
            said = "levels: even and symmetric: true, or levels: ternary"
            yield OptionError("scale", f"{self.scale} reads the step off magnitudes, without a zero point; set {said}")
        if "scale_rate" in given and self.scale != "lsq":
            yield OptionError("scale_rate", "changes nothing unless steps are learned (scale: lsq)")

    def check_form(self, form: Form) -> str | None:
        if self.levels == "stored" and not form.steps:
            return f"their codes ({form.family}) are no even steps, which qat trains. Put rtn, gptq or the like before"
        return None

    def refusal(self, kind: str) -> str | None:
        if kind not in self.accepts:
            return why_refused(self.key, kind)
        if "quantized" in kind and self.levels != "stored":
            return "they have codes. Set levels: stored, which goes on from these, or put qat before the quantizer"
        if "quantized" not in kind and self.levels == "stored":
            return "they have no codes to go on from. Put a quantizer before, or name other levels"
        return None

    def produces(self, kind: str) -> str:
        return "sparse-quantized" if "sparse" in kind else "quantized"

    def selects(self, name: str, in_block: bool) -> bool:
        return ModelPass.selects(self, name, in_block)

    @property
    def _symmetric(self) -> bool:
        return self.symmetric or self.levels == "ternary"

    def form(self, shape: tuple[int, int]) -> UniformForm | None:  # type: ignore[override]  # stored ones stay
        if self.levels == "stored":
            return None
        bits = 2 if self.levels == "ternary" else self.bits
        return replace(super().form(shape), bits=bits, symmetric=self._symmetric)

    def low_rank_form(self, shape: tuple[int, int]) -> LowRankForm | None:
        return None

    def learned_of(self, name: str, shape: tuple[int, int]) -> int:
        steps = shape[0] * max(self.groups(shape[1]), shape[1] // 16 if self.levels == "stored" else 1)
        held = shape[0] * shape[1] // 4 if self.anneal is not None else 0  # two of 16 bits for four of 32
        return super().learned_of(name, shape) + held + (steps if self.scale == "lsq" else 0)

    def start(self, name: str, target: Target, slope: Tensor | None) -> RoundedMatrix:
        # What adapters add is masked with everything else when it is rounded, so lora need not be kept beside zeros.
        sets = ["mask_lora" if each == "lora" else each for each in self.sets_of(name)]
        recipe = Recipe(sets, self.rank, self.alpha, self.share)
        grid, weight = self.first_grid(target), target.weight
        if self.levels == "stored" and target.original is not None:
            weight = grid.within_cells(weight, target.original)
        latent = AdaptedMatrix(replace(target, weight=weight, stored=None), recipe, slope)
        hold_from = None if self.anneal is None else round((1 - self.anneal) * self.steps)
        return RoundedMatrix(latent, target.mask, grid, self.scale, self.scale_rate, hold_from)

    def first_grid(self, target: Target) -> Grid:
        """The grid that training starts with."""
        weight = target.weight
        if self.levels == "stored":
            assert target.stored is not None
            assert target.stored.encoding is not None
            codes = target.stored.encoding.lookup()
            assert codes.scale is not None
            step, zero = codes.scale.values, codes.steps_from()
            return Grid(step.float(), zero, codes.table.bits, symmetric=codes.zero is None)
        if self.levels == "ternary":
            shape = 1 if self.granularity == "tensor" else len(weight), self.groups(weight.shape[1])
            step = ternary_step(weight, target.mask, shape)
            return Grid(step, torch.full_like(step, 2, dtype=torch.uint8), 2, symmetric=True, ternary=True)
        scale, zero = self.even_grid(weight)
        return Grid(scale.float(), zero, self.bits, self.symmetric)
