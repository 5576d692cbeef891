"""What routers of a mixture send to experts, and what those make of it or would make."""

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
    """Sums over the tokens that the experts of several layers are sent, or shown.

    Attributes:
        modules: of experts, by name; each takes (tokens, width), the experts of each token, and their weights.
        count: how many experts each has; what a router chooses beyond those is none of them.
        outputs: whether to see what experts put out.
        compares: whether to see what each of them puts out for every token.
        tokens: layer -> (count,) int64, how many tokens each was sent.
        weights: layer -> (count,) float64, the sum of router weights.
        weighted: layer -> (count,) float64, the sum of router weight times the norm of the expert's output.
        sums: layer -> (count, width) float64, the sum over every token of each expert's output.
        shown: layer -> how many tokens came to it.
        distances: layer -> (count, count), how far apart the means of outputs are; once they were compared.
    """

    modules: Mapping[str, nn.Module]
    count: int
    outputs: bool
    compares: bool = False
    tokens: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    weighted: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)
    shown: dict[str, int] = field(default_factory=dict)
    distances: dict[str, list[list[float]]] = field(default_factory=dict)

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
        chosen, given = (arguments[which].reshape(len(hidden), -1) for which in (called, CHOICES[called]))
        tokens = self.tokens.setdefault(name, chosen.new_zeros(self.count, dtype=torch.int64))
        weights, weighted = (
            sums.setdefault(name, hidden.new_zeros(self.count, dtype=torch.float64))
            for sums in (self.weights, self.weighted)
        )
        for expert in range(self.count):
            rows, places = torch.where(chosen == expert)
            tokens[expert] += len(rows)
            weights[expert] += given[rows, places].double().sum()
            if self.outputs and len(rows):
                norms = put_out(module, hidden[rows], expert).double().norm(dim=-1)
                weighted[expert] += (given[rows, places].double() * norms).sum()
        if self.compares:
            self._shown(name, hidden)

    def _shown(self, name: str, hidden: Tensor) -> None:
        """Every expert of a layer is shown every token."""
        self.shown[name] = self.shown.get(name, 0) + len(hidden)
        for expert in range(self.count):
            total = put_out(self.modules[name], hidden, expert).sum(dim=0, dtype=torch.float64)
            sums = self.sums.setdefault(name, total.new_zeros(self.count, len(total)))
            sums[expert] += total

    def found(self, gathered: Callable[[Any], list[Any]]) -> dict[str, dict[str, Any]]:
        """Layer -> `tokens`, `weights` and `weighted` of what all processes have seen, and `distances` if asked for.

        Raises:
            NonFiniteError: an expert put out NaN or infinity.
        """
        summed = {"tokens": self.tokens, "weights": self.weights, "weighted": self.weighted}
        mine = {name: {part: sums[name].tolist() for part, sums in summed.items()} for name in self.tokens}
        found: dict[str, dict[str, Any]] = {}
        for seen in gathered(mine):
            for name, facts in seen.items():
                zeros = {part: [type(values[0])(0)] * self.count for part, values in facts.items()}
                before = found.setdefault(name, zeros)
                found[name] = {k: [a + b for a, b in zip(before[k], facts[k], strict=True)] for k in facts}
        for name, distances in self.distances.items():
            found[name]["distances"] = distances
        for name, facts in found.items():
            if not all(torch.tensor(values, dtype=torch.float64).isfinite().all() for values in facts.values()):
                raise NonFiniteError(
                    f"experts of {name} put out NaN or infinity on the calibration data; look for NaN weights before "
                    "it, or run with dtype: float32"
                )
        return found

    def compare(self, names: Iterable[str], gathered: Callable[[Any], list[Any]]) -> None:
        """Find out how far apart the outputs of experts are in all processes together; frees the sums."""
        for name in names if self.compares else ():  # one after the other: they are wide
            sums = self.sums.pop(name, None)
            seen = [s for s in gathered([] if sums is None else [self.shown[name], sums.tolist()]) if s]
            if seen:
                total = torch.stack([torch.tensor(values, dtype=torch.float64) for _, values in seen]).sum(dim=0)
                mean = total / sum(shown for shown, _ in seen)
                apart = torch.cdist(mean, mean, compute_mode="donot_use_mm_for_euclid_dist")
                self.distances[name] = apart.tolist()
