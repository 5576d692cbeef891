"""A language model whose head gets a matrix of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from compress.lazy import nn, transformers
from compress.models.graph import chosen, find
from compress.models.shorten import rebuilt

if TYPE_CHECKING:
    from collections.abc import Mapping

    from compress.models.cuts import Cut
    from compress.models.graph import Graph

Value = TypeVar("Value")
TIE = "tie_word_embeddings"


@dataclass(frozen=True)
class Untied:
    """The model with its head apart.

    Attributes:
        graph: of it.
        head: the parameter of the head.
        configured: changed entries of the configuration, with their new values.
        cuts: nothing is.
    """

    graph: Graph
    head: str
    configured: dict[str, Any]
    cuts: dict[str, Cut] = field(default_factory=dict)

    def moved(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """What was known by old names, by the new ones: the same."""
        return dict(values)


def untied(graph: Graph, head: str, in_place: bool = False) -> Untied:
    """A model without the tie of its head.

    Args:
        graph: of the model.
        head: the parameter of the head, tied to another.
        in_place: change the model itself. Otherwise it is rebuilt, parameters on the meta device.

    Raises:
        UnsupportedModelError: there is no such model.
    """
    model, configured = graph.model, {TIE: False}
    assert isinstance(model, transformers.PreTrainedModel)
    if in_place:
        owner, _, leaf = head.rpartition(".")
        value = model.get_parameter(head).detach().clone()
        model.get_submodule(owner)._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        setattr(model.config, TIE, False)
    else:
        model = rebuilt(model, configured, "a head apart from the embedding")
    names = list(dict.fromkeys(tower.name for tower in graph.towers))
    return Untied(chosen(find(model), names), head, configured)


__all__ = ["Untied", "untied"]
