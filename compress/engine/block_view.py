"""A block as a BlockPass may run it: with other weights, whole or in parts, on what arrives at it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from compress.calibration import collect
from compress.calibration.precision import learning
from compress.calibration.reconstruct import BlockData
from compress.engine.learned_values import original_parameter, parameters_of
from compress.engine.placement import grids_of, present

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping
    from contextlib import AbstractContextManager

    from torch import Tensor, nn

    from compress.calibration.activation_cache import Activations
    from compress.calibration.calls import Call
    from compress.calibration.reconstruct import Weights
    from compress.encodings import Weight
    from compress.engine.placement import Context


@dataclass(frozen=True)
class View:
    """A block of the model.

    Attributes:
        index: of the block.
        chain: what arrives at it in the compressed model.
        original: what arrives at it in the original model.
        outputs: what the original block makes of that.
    """

    context: Context
    index: int
    chain: Activations
    original: Activations
    outputs: Activations

    @property
    def prefix(self) -> str:
        """What the name of everything in the block begins with."""
        name = self.context.graph.blocks[self.index]
        return f"{name}." if name else ""

    @property
    def block(self) -> nn.Module:
        """The module."""
        return self.context.graph.model.get_submodule(self.context.graph.blocks[self.index])

    def vectors(self) -> list[str]:
        """Names of the block's biases and scales of norms."""
        return [name for name in self.context.graph.vectors() if name.startswith(self.prefix)]

    def original_values(self) -> dict[str, Tensor]:
        """What the block's parameters were where passes may have changed them, by name in the block."""
        artifact, dtype = self.context.artifact, self.context.dtype
        plain = replace(self.context, artifact=artifact.plain())
        names = dict.fromkeys(s.parameter for s in self.context.graph.in_block(self.index))
        values = {name: original_parameter(self.context, name) for name in names}
        values |= {name: plain.tensor(name) for name in self.vectors() if name in artifact.vectors}
        return {name.removeprefix(self.prefix): value.to(dtype) for name, value in values.items()}

    def ready(self, learned: Collection[str], weights: Mapping[str, Weight]) -> AbstractContextManager[None]:
        """While open, the block may be run to learn some of its sites; others are as in `weights`, or committed."""
        # A weight is learned on inputs that are not rounded for it, and on those rounded for the layers before it.
        others = (s for s in self.context.graph.in_block(self.index) if s.name not in learned)
        return present(self.context, self.index, grids_of(self.context, others, weights))

    def data(self, fixed: Weights) -> BlockData:
        """`fixed`: weights of sites, and vectors, that other passes of the stage have changed already."""

        def call(weights: Weights, hidden: Tensor, numbers: Tensor) -> Tensor:
            with learning(self.context.products, hidden):
                values = self._values({**fixed, **weights})
                return self.chain.run(self.block, hidden, numbers, values, self.index)

        samples = self.chain.samples(), self.original.samples(), self.outputs.samples()
        shares = self.context.executor.shares(len(samples[2]))
        return BlockData(call, *samples, shares, self.context.dtype)

    def parts(self, learned: Callable[[], Weights], fixed: Weights) -> Iterator[tuple[tuple[str, ...], BlockData]]:
        """The children of the block that hold sites: names of their sites and vectors, and how to run each.

        A child is given what arrives at it in the block as it is by then; what should come out is what the original
        child makes of that.
        """
        everything = (*(s.name for s in self.context.graph.in_block(self.index)), *self.vectors())
        children = dict(self.block.named_children())
        first = next(self.chain.forwards(self.block, self._values({**fixed, **learned()}), self.index))
        called = {list(children)[i] for i in collect.reached(first, list(children.values()))}
        for child in [name for name in children if name in called]:
            module = children[child]
            names = tuple(n for n in everything if f"{n}.".startswith(f"{self.prefix}{child}."))
            if any(n in self.context.artifact.sites for n in names):
                yield names, self._part(child, module, learned(), fixed)

    def _part(self, child: str, module: nn.Module, learned: Weights, fixed: Weights) -> BlockData:
        now = self._values({**fixed, **learned})
        runs = self.chain.forwards(self.block, now, self.index)
        inputs = self.context.waiting(self._arrivals(runs, module))
        outputs = inputs.copy()
        original = _under(child, self.original_values())
        for number, made in enumerate(outputs.forwards(module, original)):
            outputs.keep(number, made())

        def call(weights: Weights, hidden: Tensor, numbers: Tensor) -> Tensor:
            with learning(self.context.products, hidden):
                own = _under(child, self._values({**fixed, **weights}))
                return inputs.run(module, hidden, numbers, own)

        shares = self.context.executor.shares(len(inputs.samples()))
        return BlockData(call, inputs.samples(), inputs.samples(), outputs.samples(), shares)

    def _arrivals(
        self, runs: Iterator[Callable[[], Tensor]], child: nn.Module
    ) -> Iterator[tuple[Tensor, Mapping[int, Call]]]:
        for number, run in enumerate(runs):
            hidden, call = collect.arrival(run, child)
            yield hidden, {0: replace(call, visit=self.chain.call(number, self.index).visit)}

    def _values(self, weights: Weights) -> dict[str, Tensor]:
        """Values of sites and vectors by name in the block, as its modules take them."""
        made = parameters_of(self.context, weights)
        return {name.removeprefix(self.prefix): value for name, value in made.items()}


def _under(child: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values that belong to a child, by their names in the child."""
    return {n.removeprefix(f"{child}."): v for n, v in values.items() if n.startswith(f"{child}.")}
