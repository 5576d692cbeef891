"""Width pruning: neurons and key-value groups go from every block, and the layer that reads them makes up for it.

Shapes: O outputs and I inputs of the reading layer, U units of w of its columns each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Gt, Le

from compress.lazy import torch
from compress.passes.base import OptionError
from compress.passes.interface import Narrowed
from compress.passes.solvers.columns import cheapest, moments_of, repaired
from compress.passes.width import WidthPass

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from compress.calibration.statistics import Need
    from compress.passes.interface import UnitsSeen


@dataclass(frozen=True, kw_only=True)
class WidthPrune(WidthPass):
    """Take the least useful neurons and key-value groups out of every block.

    What is left is a smaller model of the same class: thinner matrices, and a configuration that says so.

    Source: `magnitude` and `taylor`: Ma, Fang and Wang, "LLM-Pruner: On the Structural Pruning of Large Language
    Models", 2023, arXiv 2305.11627, section 3.2; `activation`: Sun et al., "A Simple and Effective Pruning Approach for
    Large Language Models", 2023, arXiv 2306.11695, summed over columns; `fluctuation`, and `repair: bias`: An et al.,
    "Fluctuation-based Adaptive Structured Pruning for Large Language Models", 2023, arXiv 2312.11983, eq. 4 and 5;
    `obs`, and `repair: least_squares`: Kurtic, Frantar and Alistarh, "ZipLM: Inference-Aware Structured Pruning of
    Language Models", 2023, arXiv 2302.04089, section 3. Differs from the papers in: every block loses the same share,
    as one number of the configuration counts for all; magnitude is the norm of what makes a unit times that of what
    reads it, which scaling one against the other does not change; a bias is shifted where the class has one, and none
    is added.

    Args:
        score: what a unit is worth. `magnitude`: the norm of the weights that make it times that of those that read
            it; `activation`: the norm of what it adds to the output, sum of column norm^2 times mean input^2;
            `fluctuation`: the same with the variance of the input, as its mean goes into a bias; `taylor`: the sum of
            |weight * gradient of the loss|, with the whole model in memory; `obs`: what its loss costs once the other
            units have made up for it, one after the other.
        repair: what the layer that reads the units does without those that went. `least_squares`: its columns for the
            others, and its bias where it has one, are solved again for the least error on calibration data; `bias`:
            only its bias takes up what they added on average; `none`: nothing.
        damping: share of the mean second moment of the inputs that holds the solution back.

    Example:
        >>> import compress
        >>> model, tokenizer = compress.demo.load()
        >>> tokens = compress.load_tokens("demo", tokenizer, samples=4, length=128)
        >>> result = compress.apply(model, [compress.WidthPrune(parts=("mlp",))], calibration=tokens)
        >>> result.model.config.intermediate_size, tuple(result.model.model.layers[0].mlp.down_proj.weight.shape)
        (616, (256, 616))
    """

    score: Literal["magnitude", "activation", "fluctuation", "taylor", "obs"] = "obs"
    repair: Literal["least_squares", "bias", "none"] = "least_squares"
    damping: Annotated[float, Gt(0), Le(1)] = 0.01

    key: ClassVar[str] = "width_prune"

    @property
    def needs(self) -> Need:
        if self.repair != "none" or self.score in ("fluctuation", "obs"):
            return "gram"
        return "norm" if self.score == "activation" else "none"

    @property
    def sees_makers(self) -> bool:
        return self.score == "magnitude"

    @property
    def sees_slopes(self) -> bool:
        return self.score == "taylor"

    @property
    def needs_biases(self) -> bool:
        return self.repair == "bias"

    def check(self) -> Iterator[OptionError]:
        yield from super().check()
        if self.score == "obs" and self.repair != "least_squares":
            yield OptionError("repair", f"{self.repair} is not what score: obs counts on; set it to least_squares")

    def scores(self, seen: UnitsSeen) -> Tensor:
        """(U,) float64: what each unit is worth by itself; `obs` looks at them one after the other instead."""
        squares = seen.weight.double().square().sum(0)  # of each column
        if self.score == "magnitude":
            assert seen.made is not None
            return (seen.made.sum(0) * _summed(squares, seen.columns)).sqrt()
        if self.score == "taylor":
            assert seen.slopes is not None
            return seen.slopes
        assert seen.statistics is not None
        means = seen.statistics.square_sum / max(1, seen.statistics.tokens)
        if self.score == "fluctuation":
            mean = seen.statistics.mean
            assert mean is not None
            means = (means - mean.square()).clamp(min=0.0)
        return _summed(squares * means, seen.columns)

    def run(self, seen: UnitsSeen) -> Narrowed:
        shifted = seen.biased and self.repair != "none"
        moments = None if self.needs != "gram" or seen.statistics is None else moments_of(seen.statistics, shifted)
        if self.score == "obs":
            assert moments is not None
            kept = cheapest(seen.weight, moments, seen.columns, seen.keep, self.damping)
        else:
            kept = self.scores(seen).argsort(descending=True, stable=True)[: seen.keep].sort().values
        stay = seen.columns[kept].flatten().sort().values
        if moments is None:
            lost = seen.weight.index_fill(1, stay, 0.0)
            error = float(lost.norm() / seen.weight.norm().clamp(min=torch.finfo(torch.float32).tiny))
            return Narrowed(tuple(kept.tolist()), seen.weight[:, stay], notes={"error": error})
        wide = seen.weight.double()
        made = wide[:, stay]
        if self.repair == "least_squares":
            made = repaired(wide, moments, stay, self.damping)
        difference = wide.index_add(1, stay, made, alpha=-1)
        shift = difference @ moments.mean if shifted else None
        whole = moments.lost(wide)
        error = (moments.lost(difference, shift) / whole) ** 0.5 if whole > 0 else 0.0
        return Narrowed(tuple(kept.tolist()), made.float(), None if shift is None else shift.float(), {"error": error})

    def stand_in(self) -> WidthPrune:
        return replace(self, score="activation" if self.score == "obs" else self.score, repair="none")


def _summed(values: Tensor, columns: Tensor) -> Tensor:
    """(I,) of columns -> (U,) of units."""
    return values[columns].sum(1)
