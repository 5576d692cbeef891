"""Whether a whole model fits into memory, and what flows through it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.errors import ResourceError
from compress.models.logits import WHOLE
from compress.planning.memory import FLOAT, INTERPRETER, LEARNED_LOGITS, flowing, logits
from compress.planning.resources import available_memory

if TYPE_CHECKING:
    from compress.models.graph import Graph
    from compress.planning.places import Places

AT_ONCE = 2048  # tokens that run through the model at once


def refuse_too_large(graph: Graph, tokens: int, gradients: bool, places: Places) -> None:
    """Refuse to hold a whole model in float32 where there is no room for it.

    Args:
        graph: of the model.
        tokens: that it is run on.
        gradients: whether what flows through all of its blocks is kept for them.
        places: where it is computed.

    Raises:
        ResourceError: says how much is needed.
    """
    at_once = min(tokens, AT_ONCE)
    flows = flowing(graph, at_once) * (len(graph.blocks) if gradients else 1)
    needed = INTERPRETER + FLOAT * (sum(p.numel() for p in graph.model.parameters()) + flows)
    needed += logits(graph, at_once, WHOLE, LEARNED_LOGITS)
    limits = [places.device_limit] if places.apart else [places.host_limit, available_memory()]
    least = min((limit for limit in limits if limit is not None), default=None)
    if least is not None and least < needed:
        raise ResourceError(
            f"divergences and gradients are taken of the whole model in memory, about {needed / 1e9:.2f} GB, and "
            f"{least / 1e9:.2f} GB are available; sensitivity error needs one block at a time"
        )


__all__ = ["refuse_too_large"]
