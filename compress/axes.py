"""Channels between two layers of a block whose order is free: rows of the layers that make them, columns of the next.

Neurons of a gated MLP are such channels, and values of attention within their head: put in another order on both sides,
the model computes what it did before. Only where nothing else sees them, which is known by the kind of model, never
guessed from names alone; layers with a bias are left out, whose bias would have to move too.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Decoders whose MLP is down(act(gate(x)) * up(x)), and whose values go from v_proj through attention to o_proj.
KNOWN = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "olmo", "olmo2", "smollm3", "granite")


@dataclass(frozen=True)
class Axis:
    """Channels in heads; their order is free within each head.

    Attributes:
        makers: sites whose rows they are, (heads * size) of them.
        readers: sites whose columns they are, (heads * repeats * size) of them.
        size: channels of a head.
        heads: 1 for the neurons of an MLP.
        repeats: how many heads of the readers read the same head, as in grouped-query attention.
    """

    makers: tuple[str, ...]
    readers: tuple[str, ...]
    size: int
    heads: int = 1
    repeats: int = 1

    def rows(self, order: Tensor) -> Tensor:
        """(heads, size) which channel comes first in each head -> (heads * size,) the rows of a maker in that order."""
        return (order + self.size * torch.arange(self.heads)[:, None]).flatten()

    def columns(self, order: Tensor) -> Tensor:
        """(heads, size) -> (heads * repeats * size,) the columns of a reader in that order."""
        wide = order.repeat_interleave(self.repeats, 0)
        return (wide + self.size * torch.arange(len(wide))[:, None]).flatten()


def find_axes(model: nn.Module, sites: Iterable[str]) -> tuple[Axis, ...]:
    """The free orders among a model's sites; none in a model whose wiring is not known."""
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) not in KNOWN:
        return ()
    names = set(sites)
    owners = sorted({name.rpartition(".")[0] for name in names})
    return tuple(axis for owner in owners for axis in (*_neurons(model, owner, names), *_values(model, owner, names)))


def _neurons(model: nn.Module, owner: str, names: set[str]) -> Iterator[Axis]:
    gate, up, down = (f"{owner}.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj"))
    if {gate, up, down} <= names and not (_biased(model, gate) or _biased(model, up)):
        yield Axis((gate, up), (down,), _shape(model, down)[1])


def _values(model: nn.Module, owner: str, names: set[str]) -> Iterator[Axis]:
    made, read = f"{owner}.v_proj", f"{owner}.o_proj"
    size = getattr(model.get_submodule(owner), "head_dim", None)
    if not {made, read} <= names or not size or _biased(model, made):
        return
    rows, columns = _shape(model, made)[0], _shape(model, read)[1]
    if rows % size == 0 and columns % rows == 0:
        yield Axis((made,), (read,), size, rows // size, columns // rows)


def _biased(model: nn.Module, name: str) -> bool:
    return getattr(model.get_submodule(name), "bias", None) is not None


def _shape(model: nn.Module, name: str) -> tuple[int, int]:
    rows, columns = model.get_parameter(f"{name}.weight").shape
    return rows, columns
