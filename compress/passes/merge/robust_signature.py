"""What makes a fine-tune robust, without what every fine-tune of the task has in common.

Shapes: C robust models, n elements of a piece.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Le

from compress.errors import OptionError
from compress.lazy import torch
from compress.passes.merge.base import MergePass
from compress.passes.merge.schedules import PerModel, model_count, values_at

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from compress.passes.merge.base import Piece, Pieces


@dataclass(frozen=True)
class Signature:
    """The signature of one robust model in one tensor.

    Attributes:
        common: how much of the standard fine-tune's change is taken out.
        least, most: between which values it lies, where it is rounded.
    """

    common: float
    least: float = 0.0
    most: float = 0.0

    def of(self, standard: Tensor, robust: Tensor, bits: int | None) -> Tensor:
        """(n,) the signature, from what fine-tuning changed in both."""
        value = torch.add(robust, standard, alpha=-self.common)
        step = (self.most - self.least) / (2**bits - 1) if bits else 0.0
        return value.sub_(self.least).div_(step).round_().mul_(step).add_(self.least) if step else value


@dataclass(frozen=True, kw_only=True)
class RobustSignature(MergePass):
    """Patch a model with what robust fine-tunes have beyond a standard one, in its shallowest layers.

    The signature of a robust fine-tune is what it changed, less its projection on what the standard fine-tune changed,
    tensor by tensor. It is added to the standard fine-tune, or to a model of another task.

    Source: Cai et al., "Robust Weight Signatures: Gaining Robustness as Easy as Patching Weights?", 2023, arXiv
    2302.12480, section 3. Differs from the paper in: biases, norms and running statistics of the patched layers go
    towards the robust models by the same share, not all the way; linear layers and embeddings are patched like
    convolutions. Differs from the public code in: a share counts once; there it is multiplied twice.

    Args:
        alpha: how much of the signatures is added, one for each robust model or one for all; each counts for its part
            of C, so 1 is their mean.
        layers: the first so many convolutions and linear layers of the model, and what stands before, between and right
            behind them. Everything else is the target's.
        target: what is patched: the `standard` fine-tune; the `base`, the model that the pipeline is run on; or the
            `last` of `models`, a model of another task.
        bits: signatures are rounded to 2^bits values between their least and their largest; none are by default.

    Example:
        >>> import torch
        >>> from compress import RobustSignature
        >>> from compress.passes.merge.base import Piece
        >>> tuned = torch.tensor([1.0, 0.0]), torch.tensor([2.0, 3.0])
        >>> piece = Piece("weight", torch.zeros(2), tuned, shape=(1, 2))
        >>> patch = RobustSignature(models=("standard", "foggy"))
        >>> patch.run(piece, patch.look(lambda: iter([piece]), None))
        tensor([1., 3.])
    """

    alpha: PerModel = 1.0
    layers: Annotated[int, Ge(1)] = 7
    target: Literal["standard", "base", "last"] = "standard"
    bits: Annotated[int, Ge(1), Le(16)] | None = None

    key: ClassVar[str] = "robust_signature"
    common: ClassVar[frozenset[str]] = MergePass.common | {"target"}

    @property
    def count(self) -> int:
        """How many robust models there are."""
        return len(self.models) - 1 - (self.target == "last")

    def check(self) -> Iterator[OptionError]:
        yield from super().check()
        if self.models and self.count < 1:
            last = ", and the one that is patched" if self.target == "last" else ""
            yield OptionError("models", f"name the standard fine-tune first, then at least one robust one{last}")
        elif self.models and model_count(self.alpha) not in (None, self.count):
            yield OptionError("alpha", f"{model_count(self.alpha)} values for {self.count} robust models: one for each")

    @property
    def looks(self) -> bool:
        return True

    def look(self, tensor: Pieces, found: Any) -> list[Signature] | None:
        """The signature of every robust model; None where none is added."""
        first = next(tensor())
        if first.layer >= self.layers or len(first.shape) < 2:
            return None
        products = torch.zeros(1 + self.count, dtype=torch.float64)
        for piece in tensor():
            standard, robust = self._changes(piece)
            products += torch.stack([torch.dot(standard.double(), d.double()) for d in (standard, *robust)])
        length = float(products[0])
        shares = [product / length if length > 0 else 0.0 for product in products[1:].tolist()]
        return [self._rounded(Signature(share), i, tensor) for i, share in enumerate(shares)]

    def _rounded(self, signature: Signature, number: int, tensor: Pieces) -> Signature:
        """The signature with the bounds of its values, if it is to be rounded."""
        if not self.bits:
            return signature
        ends = []
        for piece in tensor():
            standard, robust = self._changes(piece)
            ends += torch.stack(torch.aminmax(signature.of(standard, robust[number], None))).tolist()
        return Signature(signature.common, min(ends), max(ends))

    def run(self, piece: Piece, facts: list[Signature] | None) -> Tensor:
        targets = {"standard": piece.others[0], "base": piece.base, "last": piece.others[-1]}
        target = targets[self.target]
        made = target.clone()
        if piece.layer >= self.layers:
            return made
        shares = [a / self.count for a in values_at(self.alpha, self.count, piece.name, piece.depth, 1.0)]
        if facts is None:
            for share, robust in zip(shares, self._robust(piece), strict=True):
                made.add_(robust - target, alpha=share)
            return made
        standard, changes = self._changes(piece)
        for share, signature, change in zip(shares, facts, changes, strict=True):
            made.add_(signature.of(standard, change, self.bits), alpha=share)
        return made

    def _robust(self, piece: Piece) -> Sequence[Tensor]:
        return piece.others[1 : 1 + self.count]

    def _changes(self, piece: Piece) -> tuple[Tensor, list[Tensor]]:
        """What fine-tuning changed in the standard model, and in each robust one."""
        return piece.others[0] - piece.base, [robust - piece.base for robust in self._robust(piece)]
