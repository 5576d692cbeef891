"""What routers of a mixture send to experts, and what those make of it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from compress.calibration import collect
from compress.calibration.experts import put_out
from compress.errors import NonFiniteError
from compress.models.experts import CHOICES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor, nn

    from compress.calibration.calls import Call


@dataclass
class Routing:
    """Sums over the tokens that the experts of several layers are sent.

    Attributes:
        modules: of experts, by name; each takes (tokens, width), the experts of each token, and their weights.
        count: how many experts each has; what a router chooses beyond those is none of them.
        outputs: whether to see what experts put out.
        tokens: layer -> (count,) int64, how many tokens each was sent.
        weighted: layer -> (count,) float64, the sum of router weight times the norm of the expert's output.
    """

    modules: Mapping[str, nn.Module]
    count: int
    outputs: bool
    tokens: dict[str, Tensor] = field(default_factory=dict)
    weighted: dict[str, Tensor] = field(default_factory=dict)

    def see(self, forwards: Iterable[Callable[[], Any]], names: Iterable[str]) -> None:
        """Run forward passes, and add up what some of the layers are sent in them."""
        layers = list(names)
        modules = [self.modules[name] for name in layers]
        for forward in forwards:
            enter = partial(self._sent, layers)
            collect.watched(forward, modules, enter, lambda _, __: None)

    def _sent(self, layers: Sequence[str], number: int, hidden: Tensor, call: Call) -> None:
        """One of the layers is sent tokens."""
        name, module = layers[number], self.modules[layers[number]]
        arguments = inspect.signature(type(module).forward).bind(module, hidden, *call.args, **call.kwargs).arguments
        hidden = hidden.reshape(-1, hidden.shape[-1])
        called = next(called for called in CHOICES if called in arguments)
        chosen, weights = (arguments[which].reshape(len(hidden), -1) for which in (called, CHOICES[called]))
        tokens = self.tokens.setdefault(name, chosen.new_zeros(self.count, dtype=torch.int64))
        weighted = self.weighted.setdefault(name, hidden.new_zeros(self.count, dtype=torch.float64))
        for expert in range(self.count):
            rows, places = torch.where(chosen == expert)
            tokens[expert] += len(rows)
            if self.outputs and len(rows):
                norms = put_out(module, hidden[rows], expert).double().norm(dim=-1)
                weighted[expert] += (weights[rows, places].double() * norms).sum()

    def found(self, gathered: Callable[[Any], list[Any]]) -> dict[str, dict[str, list[float]]]:
        """Layer -> `tokens` and `weighted`, over what all processes have seen.

        Raises:
            NonFiniteError: an expert put out NaN or infinity.
        """
        mine = {n: {"tokens": t.tolist(), "weighted": self.weighted[n].tolist()} for n, t in self.tokens.items()}
        sums: dict[str, dict[str, list[float]]] = {}
        for seen in gathered(mine):
            for name, facts in seen.items():
                zeros = {key: [type(values[0])(0)] * self.count for key, values in facts.items()}
                before = sums.setdefault(name, zeros)
                sums[name] = {k: [a + b for a, b in zip(before[k], facts[k], strict=True)] for k in facts}
        for name, facts in sums.items():
            if not torch.tensor(facts["weighted"], dtype=torch.float64).isfinite().all():
                raise NonFiniteError(
                    f"experts of {name} put out NaN or infinity on the calibration data; look for NaN weights before "
                    "it, or run with dtype: float32"
                )
        return sums
