"""The residual stream of a model as far as it may be turned by an orthogonal matrix. Reads no weight.

Norms take the same sum of squares of a stream that was turned; LayerNorm takes the same mean of it away where the
vector of ones is turned into itself. So everything may be turned that writes to the stream and that reads it, once the
scales of norms are moved into the layers that read them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.errors import UnsupportedModelError
from compress.models.channels import clipped, values_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from compress.models.graph import Graph
    from compress.models.norms import Norm
    from compress.models.symmetry import Place


@dataclass(frozen=True, eq=False)
class Values:
    """The values of one attention.

    Attributes:
        reader: the site that reads them.
        columns: (heads, size) int64 of the reader.
        makers: what makes them, with (groups, size) rows.
    """

    reader: str
    columns: Tensor
    makers: tuple[Place, ...]


@dataclass(frozen=True, eq=False)
class Stream:
    """Everything that touches the stream.

    Attributes:
        width: how many channels it has.
        written: sites and biases whose rows lie along it.
        read: sites whose columns lie along it: layers and tables.
        norms: over it.
        values: of attention.
        head: the parameter of a head that must have a matrix of its own first; None where it has one or needs none.
    """

    width: int
    written: frozenset[str]
    read: frozenset[str]
    norms: tuple[Norm, ...]
    values: tuple[Values, ...]
    head: str | None

    @property
    def centred(self) -> bool:
        """Whether some norm takes the mean away."""
        return any(norm.centred for norm in self.norms)

    def norm_of(self, site: str) -> Norm | None:
        """The norm that a layer reads."""
        return next((norm for norm in self.norms if site in norm.readers), None)

    def tensors(self) -> tuple[str, ...]:
        """Sites and vectors that change, in no order; and biases that may be there."""
        of_norms = [name for norm in self.norms for name in _parameters(norm)]
        biases = [f"{name}.bias" for norm in self.norms if norm.shifted for name in norm.readers]
        makers = [place.tensor.removesuffix(".weight") for value in self.values for place in value.makers]
        readers = [value.reader for value in self.values]
        return tuple(dict.fromkeys((*self.written, *self.read, *of_norms, *biases, *makers, *readers)))


def stream_of(graph: Graph) -> Stream:
    """The stream of a model.

    Raises:
        UnsupportedModelError: it may not be turned; says why.
    """
    kind = type(graph.model).__name__
    sites = {site.parameter: site for site in graph.sites}
    blocks = tuple(f"{name}." for name in graph.blocks)
    every = graph.family.residual(graph.model, graph.tied)
    places = next((u.places for u in every if any(p.tensor.startswith(blocks) for p in u.places)), ())
    norms = tuple(graph.family.norms(graph.model))
    if not places or not norms:
        raise UnsupportedModelError(
            f"what touches the residual stream of a {kind} is not known (known: language models like Llama, GPT-2, "
            "GPT-NeoX and OPT, with norms before their layers), so it cannot be turned"
        )
    written, read = set[str](), set[str]()
    for place in places:
        site = sites.get(place.tensor)
        if site is None:
            written.add(place.tensor)
            continue
        (written if (place.axis == 0) != site.ref.transposed else read).add(site.name)
    written -= {name for norm in norms for name in _parameters(norm)}
    layers = {site.name for site in graph.sites}
    odd = next((name for name in sorted(written) if name.removesuffix(".bias") not in layers), None)
    if odd is not None:
        raise UnsupportedModelError(
            f"{odd} of a {kind} changes by itself what is added to the residual stream, so that cannot be turned"
        )
    _refuse_unread(graph, read, norms)
    tied = {name.removesuffix(".weight"): name for name in graph.tied}
    head = next((tied[name] for norm in norms if norm.scaled for name in norm.readers if name in tied), None)
    return Stream(len(places[0].index), frozenset(written), frozenset(read), norms, tuple(_values(graph)), head)


def written_from(graph: Graph, stream: Stream) -> tuple[str, ...]:
    """The layers of blocks that write to the stream and whose inputs are not turned yet."""
    layers = (site for site in graph.sites if site.block is not None and not site.is_expert)
    return tuple(site.name for site in layers if site.name in stream.written and site.name not in graph.turned)


def _refuse_unread(graph: Graph, read: Iterable[str], norms: Iterable[Norm]) -> None:
    """A layer that reads the stream without a norm that is known, or reads a norm and not the stream."""
    tables = {site.name for site in graph.sites if site.looked_up}
    of_norms = {name for norm in norms for name in norm.readers}
    odd = sorted({*read} - tables - of_norms) or sorted(
        name for name in of_norms - {*read} if f"{name}.weight" not in graph.tied
    )
    if odd:
        raise UnsupportedModelError(
            f"which norm {odd[0]} of a {type(graph.model).__name__} reads is not known, so the stream cannot be turned"
        )


def _values(graph: Graph) -> Iterable[Values]:
    readers = {site.parameter: site.name for site in graph.sites}
    for units in graph.units() if not clipped(graph) else ():
        reader = readers.get(units.places[-1].tensor)
        if units.part == "heads" and reader is not None:
            columns, makers = values_of(units)
            size = columns.shape[1]
            yield Values(reader, columns.transpose(1, 2).reshape(-1, size), makers)


def _parameters(norm: Norm) -> list[str]:
    return [norm.weight] * norm.scaled + [norm.bias] * norm.shifted


__all__ = ["Stream", "Values", "stream_of", "written_from"]
