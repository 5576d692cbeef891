"""Norms whose scale may be moved into other layers, and what reads them: known of families, never guessed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.lazy import nn
from compress.models.symmetry import is_code_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping


@dataclass(frozen=True)
class Norm:
    """A norm over the residual stream that scales by `offset + weight`.

    Attributes:
        name: full name of its module.
        readers: full names of the layers that read what it puts out; nothing else does.
        offset: 1 for those of Gemma, else 0.
        scaled: whether it has a weight.
        shifted: whether it has a bias.
        centred: whether it takes the mean over the channels away first, as LayerNorm does.
    """

    name: str
    readers: tuple[str, ...]
    offset: float = 0.0
    scaled: bool = True
    shifted: bool = False
    centred: bool = False

    @property
    def weight(self) -> str:
        """The name of its scale."""
        return f"{self.name}.weight"

    @property
    def bias(self) -> str:
        """The name of its bias."""
        return f"{self.name}.bias"


def norms_of(
    model: nn.Module, reads: Mapping[str, tuple[str, ...]], code: Collection[str], offset: float
) -> Iterator[Norm]:
    """The norms of a model.

    Args:
        model: to look at; its parameters may be on the meta device.
        reads: name of a norm in the module that holds it -> the layers that read it, by their names there.
        code: the folders of `transformers.models` whose modules are known to do nothing else with these.
        offset: see `Norm`.
    """
    modules = dict(model.named_modules())
    for owner, module in modules.items():
        if not is_code_of(module, code):
            continue
        prefix = f"{owner}." if owner else ""
        for leaf, readers in reads.items():
            name, found = f"{prefix}{leaf}", tuple(f"{prefix}{reader}" for reader in readers)
            if name in modules and modules.keys() >= set(found):
                norm = modules[name]
                has = {key for key, value in norm._parameters.items() if value is not None}
                yield Norm(name, found, offset, "weight" in has, "bias" in has, _centres(norm))


def _centres(norm: nn.Module) -> bool:
    """A LayerNorm; that of OLMo, without a weight, is a class of its own."""
    return isinstance(norm, nn.LayerNorm) or type(norm).__name__.endswith("LayerNorm")


__all__ = ["Norm", "norms_of"]
