"""How far a model's predictions move when a few of its layers, and nothing else, are quantized.

The model is run from the block on that they are in: what arrives there is the same every time, and kept.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from compress.calibration.collect import reached
from compress.calibration.metrics import judge_of, measure
from compress.calibration.reference import Reference
from compress.checkpoint.artifact import Packed
from compress.engine.model_training import in_memory
from compress.engine.placement import set_value, tie
from compress.models.logits import logits_in, logits_of, runs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from compress.encodings import Weight
    from compress.engine.context import Context
    from compress.models.site import Site

SAME = 1e-6  # nats that count as none: a model without any change, run from a block on


class _Stop(Exception):
    """A block's output is known; the rest is not run."""


def divergences(
    context: Context,
    groups: Sequence[Sequence[Site]],
    weights: Mapping[str, Weight | Packed],
    samples: Tensor,
    key: str,
) -> list[float]:
    """KL from the original model, in nats per prediction, with each group of sites in turn quantized.

    Args:
        context: of the original model.
        groups: of sites.
        weights: what each site becomes.
        samples: a few of the calibration data, which run as one batch.
        key: of all that the result depends on, for the ledger.
    """
    order = sorted(range(len(groups)), key=lambda i: (_first_block(context, groups[i]), i))
    found: dict[int, float] = {}
    kept = context.ledger.load_row("s00-divergences", key)
    if kept is not None:
        return [float(value) for value in kept["kl"]]
    with torch.no_grad(), in_memory(replace(context, dtype=torch.float32)):
        model = _FromBlock.of(context, samples)
        for i in context.bars.over(order, len(order), "divergence: layers", "end"):
            model.advance(_first_block(context, groups[i]))
            with _replaced(context, groups[i], weights):
                found[i] = model.divergence()
    row = [found[i] for i in range(len(groups))]
    context.ledger.commit_row("s00-divergences", key, {"kl": row})
    return row


def _first_block(context: Context, group: Sequence[Site]) -> int:
    """The first block that a group lies in; 0 where any of it lies outside, so that all of the model runs."""
    numbers = [0 if site.block is None or site.looked_up else site.block for site in group]
    return min(numbers)


@dataclass
class _FromBlock:
    """A model that can be run from a block on.

    Attributes:
        samples: that are run.
        reference: the original's predictions on them.
        skips: whether blocks before the first may be left out.
        first: number of the block that is run first.
        arrived: what the block before it put out.
    """

    context: Context
    samples: Tensor
    reference: Reference = field(default_factory=Reference)
    skips: bool = False
    first: int = 0
    arrived: Any = None

    @classmethod
    def of(cls, context: Context, samples: Tensor) -> _FromBlock:
        """The model, its own predictions known; tried out whether blocks may be left out."""
        blocks = [context.graph.model.get_submodule(name) for name in context.graph.blocks]
        found = cls(context, samples)
        found._measure(keep=True)
        in_turn = reached(lambda: context.forward(samples[:1]), blocks) == list(range(len(blocks)))
        if in_turn and len(blocks) > 1:
            found.skips = True
            found.advance(1)
            found.skips = found.divergence() < SAME
            found.first, found.arrived = 0, None
        return found

    def advance(self, block: int) -> None:
        """Run up to a block, from where this stands; no block is gone back to."""
        if not self.skips or block <= self.first:
            return
        caught: list[Any] = []
        last = self.context.graph.model.get_submodule(self.context.graph.blocks[block - 1])
        inner = last.forward

        def run(*args: Any, **kwargs: Any) -> None:
            caught.append(inner(*args, **kwargs))
            raise _Stop

        with self._skipping(), runs(last, run), suppress(_Stop):
            self.context.forward(self.samples)
        self.first, self.arrived = block, caught[0]

    def divergence(self) -> float:
        """KL of the model as it stands now from the original."""
        with self._skipping():
            return self._measure(keep=False)

    def _measure(self, keep: bool) -> float:
        context, model = self.context, self.context.graph.model
        judge = judge_of(model, None)

        def logits(batch: Tensor) -> Tensor | Iterator[Tensor]:
            if judge == "next token":
                return logits_of(model, lambda: context.forward(batch), batch)
            return logits_in(context.forward(batch))

        options: dict[str, Any] = {"judge": judge, "tokens_of": context.tokens_of}
        found = measure(logits, self.samples, reference=self.reference, keep=keep, **options)
        return found.kl or 0.0

    @contextmanager
    def _skipping(self) -> Iterator[None]:
        """While open, blocks before the first put out what arrived there."""
        blocks = self.context.graph.blocks[: self.first]
        with ExitStack() as stack:
            for name in blocks:
                answer: Callable[..., Any] = lambda *_, **__: self.arrived  # noqa: E731
                stack.enter_context(runs(self.context.graph.model.get_submodule(name), answer))
            yield


@contextmanager
def _replaced(context: Context, group: Sequence[Site], weights: Mapping[str, Weight | Packed]) -> Iterator[None]:
    """While open, sites of a model that is in memory have other weights."""
    model = context.graph.model
    before = {site.parameter: model.get_parameter(site.parameter) for site in group}
    changed = {name: value.detach().clone() for name, value in before.items()}
    for site in group:
        weight = weights[site.name]
        dense = (weight.load() if isinstance(weight, Packed) else weight).dequantize()
        piece = site.ref.laid(context.devices.to_compute(dense)).float()
        if site.is_expert:
            site.ref.pieces(changed[site.parameter])[site.ref.index] = piece
        else:
            changed[site.parameter] = piece
    try:
        for name, value in changed.items():
            set_value(model, name, value)
        tie(context.graph)
        yield
    finally:
        for name, parameter in before.items():
            set_value(model, name, parameter.detach())
        tie(context.graph)


__all__ = ["divergences"]
