"""A block as a BlockPass may run it: with other weights, whole or in parts, on what arrives at it."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from compress.calibration import collect
from compress.calibration.precision import learning
from compress.calibration.reconstruct import BlockData
from compress.engine.learned_values import original_parameter, parameters_of
from compress.engine.placement import grids_of, present
from compress.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from torch import Tensor, nn

    from compress.calibration.activation_cache import Activations
    from compress.calibration.calls import Call
    from compress.calibration.reconstruct import Weights
    from compress.encodings import Weight
    from compress.engine.context import Context


@dataclass(frozen=True)
class View:
    """A block of the model.

    Attributes:
        index: of the block.
        chain: what arrives at it in the compressed model.
        original: what arrives at it in the original model.
        outputs: what the original block makes of that.
        users: numbers of other blocks that share matrices of it, whose calls are among these.
    """

    context: Context
    index: int
    chain: Activations
    original: Activations
    outputs: Activations
    users: tuple[int, ...] = ()

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
        plain, graph = replace(self.context, artifact=artifact.plain()), self.context.graph
        names = dict.fromkeys(s.parameter for s in graph.used_in(self.index))
        values = {name: original_parameter(self.context, name) for name in names}
        values |= {name: plain.tensor(name) for name in artifact.vectors}
        own = {n: v.to(dtype) for name, v in values.items() for n in graph.names_of(name) if n.startswith(self.prefix)}
        return {name.removeprefix(self.prefix): value for name, value in own.items()}

    @contextmanager
    def ready(self, learned: Collection[str], weights: Mapping[str, Weight]) -> Iterator[None]:
        """While open, the block may be run to learn some of its sites; others are as in `weights`, or committed."""
        # A weight is learned on inputs that are not rounded for it, and on those rounded for the layers before it.
        with ExitStack() as stack:
            for index in (self.index, *self.users):
                others = (s for s in self.context.graph.used_in(index) if s.name not in learned)
                grids = grids_of(self.context, others, weights)
                before = {} if index == self.index else self.context.graph.used_in(self.index)
                shared = {s.name for s in before}
                own = {name: grid for name, grid in grids.items() if name not in shared}
                stack.enter_context(present(self.context, index, own))
            yield

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
        if self.users:
            raise UnsupportedModelError(
                f"{self.prefix[:-1]} shares matrices with other blocks, so its parts cannot be learned by themselves; "
                "learn from the whole block, or use a method that does not learn, such as gptq"
            )
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
