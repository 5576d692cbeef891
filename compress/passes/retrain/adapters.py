"""What is trained of a matrix, and how it becomes part of it.

Shapes: O rows, I columns, r rank; scales are (R, G), R = O or 1, of G groups of I / G columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from compress.calibration.draws import draw
from compress.encodings import LowRankFactors
from compress.encodings.uniform import narrowest, stored_scale
from compress.lazy import no_grad, torch
from compress.passes.interface import Edit
from compress.passes.retrain.importance import principal, sensitive

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from compress.passes.interface import Target

NOISE = 0.02  # of the components of scale_lora that start without effect; equal ones would stay equal for ever


@dataclass(frozen=True)
class Recipe:
    """What is trained of a matrix.

    Attributes:
        sets: names of what `train` may hold, one after the other.
        rank: of adapters.
        alpha: what they add is multiplied by alpha / rank.
        share: of the kept weights, where some of them are trained.
    """

    sets: Sequence[str]
    rank: int
    alpha: float
    share: float = 1.0


class AdaptedMatrix:
    """One matrix being trained: what it starts as, and the adapters that change it one after the other.

    Adapters of `lora` are merged into a dense matrix. Beside one with zeros or codes, which they would destroy, they
    are kept as its low-rank correction, and go on from the correction, or the factors, that are there.
    """

    def __init__(self, target: Target, recipe: Recipe, slope: Tensor | None = None):
        """`slope` (O, I): the gradient of the loss, for `sensitive`."""
        rank, alpha = recipe.rank, recipe.alpha
        self.mask, self.stored = target.mask, target.stored
        self.encoding = None if self.stored is None else self.stored.encoding
        self.factored = self.stored is not None and self.stored.factored
        base = target.weight if self.stored is None else self.stored.base()
        self.base = base.detach()
        generator = target.generator or torch.Generator()
        self.adapters: list[Adapter] = []
        self.beside: Lora | None = None
        self.factor: Tensor | None = None
        for name in recipe.sets:
            if name == "scale":
                if (scale := getattr(self.encoding, "scale", None)) is not None and scale.is_floating_point():
                    self.factor = torch.zeros(scale.shape, requires_grad=True)
            elif name == "full":
                self.adapters.append(Full(base))
            elif name in ("principal", "sensitive"):
                scores = principal(base, rank) if name == "principal" else sensitive(base, slope, rank)
                self.adapters.append(Chosen(scores, recipe.share, self.mask))
            elif name == "scale_lora":
                self.adapters.append(ScaleLora(base, rank, generator))
            elif name in ("lora", "head") and (self.mask is not None or self.encoding is not None or self.factored):
                found = None if self.stored is None else self.stored.low_rank
                self.beside = Lora(base, rank, 1.0 if found else alpha / rank, generator, found)
            else:
                self.adapters.append(Lora(base, rank, alpha / rank, generator, masked=_MASKED[name]))

    def tensors(self) -> list[Tensor]:
        """What is learned."""
        found = [t for a in (*self.adapters, *([self.beside] if self.beside else [])) for t in a.tensors]
        return found if self.factor is None else [*found, self.factor]

    def groups(self, rate: float) -> list[tuple[list[Tensor], float]]:
        """The same with its learning rate."""
        return [(self.tensors(), rate)]

    def stepped(self, step: int) -> None:
        """Nothing follows a step."""

    def state(self) -> list[Tensor]:
        """Nothing else belongs to an iterate."""
        return []

    def soft(self) -> Tensor:
        """(O, I), as it is used in training."""
        made = self._base()
        for adapter in self.adapters:
            made = adapter.soft(made, self.mask)
        return self._corrected(made)

    @no_grad
    def merged(self) -> Tensor:
        """(O, I), as it will be stored, but for rounding."""
        return self._corrected(self._merged_base())

    def _merged_base(self) -> Tensor:
        made = self._base()
        for adapter in self.adapters:
            made = adapter.merged(made, self.mask)
        return made

    def _corrected(self, base: Tensor) -> Tensor:
        if self.beside is not None:
            return self.beside.soft(base, None)
        low_rank = None if self.stored is None else self.stored.low_rank
        return base if low_rank is None else base + low_rank.product()

    def _base(self) -> Tensor:
        if self.factor is None:
            return self.base
        rows, groups = self.factor.shape
        grouped = self.base.view(rows, -1, groups, self.base.shape[1] // groups)
        return (grouped * self.factor.exp().view(rows, 1, groups, 1)).view(self.base.shape)

    @no_grad
    def edit(self, notes: Mapping[str, float]) -> Edit:
        """What is stored now."""
        low_rank = None if self.beside is None else self.beside.low_rank()
        if self.factored:
            low_rank = low_rank or (self.stored.low_rank if self.stored else None)
            return Edit(low_rank=low_rank, replaces=True, notes=notes)
        if self.encoding is None:
            return Edit(weight=self._merged_base(), mask=self.mask, low_rank=low_rank, notes=notes)
        encoding = self.encoding
        if self.factor is not None:
            scale = encoding.scale.float() * self.factor.exp()  # type: ignore[attr-defined]
            encoding = replace(encoding, scale=narrowest(stored_scale(scale)))  # type: ignore[type-var]
        return Edit(encoding=encoding, mask=self.mask, low_rank=low_rank, notes=notes)


class Adapter:
    """Numbers that change a matrix.

    Attributes:
        tensors: what is learned.
    """

    tensors: list[Tensor]

    def soft(self, weight: Tensor, mask: Tensor | None) -> Tensor:
        """(O, I) -> (O, I), as it is used in training."""
        raise NotImplementedError

    def merged(self, weight: Tensor, mask: Tensor | None) -> Tensor:
        """(O, I) -> (O, I), as it will be stored."""
        return self.soft(weight, mask)


class Full(Adapter):
    """Every weight that is kept."""

    def __init__(self, weight: Tensor):
        self.tensors = [torch.zeros_like(weight, requires_grad=True)]

    def soft(self, weight: Tensor, mask: Tensor | None) -> Tensor:
        return weight + _kept(self.tensors[0], mask)


class Chosen(Adapter):
    """Those of the kept weights that have the highest scores."""

    def __init__(self, scores: Tensor, share: float, mask: Tensor | None):
        kept = scores.numel() if mask is None else int(mask.sum())
        count = min(kept, max(1, round(share * kept)))
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        self.places = scores.flatten().argsort(descending=True, stable=True)[:count].sort().values
        self.tensors = [torch.zeros(count, requires_grad=True)]

    def soft(self, weight: Tensor, mask: Tensor | None) -> Tensor:
        change = torch.zeros(weight.numel()).scatter(0, self.places, self.tensors[0])
        return weight + change.view(weight.shape)


_MASKED = {"lora": "never", "head": "never", "lora_prune": "merged", "mask_lora": "always"}


class Lora(Adapter):
    """W + scaling * B A. What is added is masked `always`, only when `merged`, or `never`."""

    def __init__(
        self,
        base: Tensor,
        rank: int,
        scaling: float,
        generator: torch.Generator,
        start: LowRankFactors | None = None,
        masked: str = "never",
    ):
        rows, columns = base.shape
        bound = columns**-0.5  # Kaiming-uniform with a = sqrt(5)
        if start is None:
            a = draw(generator, (rank, columns), "uniform", base, (-bound, bound))
            b = torch.zeros(rows, rank)
        else:
            a, b = start.factors()
        self.tensors = [a.clone().requires_grad_(), b.clone().requires_grad_()]
        self.scaling, self.masked = scaling, masked

    def soft(self, weight: Tensor, mask: Tensor | None) -> Tensor:
        a, b = self.tensors
        if mask is None or self.masked != "always":
            return torch.addmm(weight, b, a, alpha=self.scaling)
        return weight + _kept((b @ a).mul(self.scaling), mask)

    def merged(self, weight: Tensor, mask: Tensor | None) -> Tensor:
        if self.masked != "merged":
            return self.soft(weight, mask)
        a, b = self.tensors
        return weight + _kept((b @ a).mul(self.scaling), mask)

    def low_rank(self) -> LowRankFactors:
        """The adapter as it is kept beside a matrix."""
        a, b = (t.detach() for t in self.tensors)
        return LowRankFactors(narrowest(stored_scale(a)), narrowest(stored_scale(b * self.scaling)))


class ScaleLora(Adapter):
    """W * (B A), where B A is one everywhere at first.

    One component is all ones; the others are noise times nothing, not copies of the first, which would stay copies.
    """

    def __init__(self, base: Tensor, rank: int, generator: torch.Generator):
        rows, columns = base.shape
        a = draw(generator, (rank, columns), "normal", base) * NOISE
        b = torch.zeros(rows, rank)
        a[0], b[:, 0] = 1.0, 1.0
        self.tensors = [a.requires_grad_(), b.requires_grad_()]

    def soft(self, weight: Tensor, mask: Tensor | None) -> Tensor:
        a, b = self.tensors
        return weight * (b @ a)


def _kept(change: Tensor, mask: Tensor | None) -> Tensor:
    return change if mask is None else change * mask
