"""What every quantizer that learns from the outputs of a block shares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt

from compress.calibration.reconstruct import BLOCK_ERROR, Inputs, Recipe, by_block, by_layer
from compress.encodings.counting import sums_by_number
from compress.errors import SolveError
from compress.lazy import function, torch
from compress.passes.base import BlockPass, Edit, OptionError
from compress.passes.solvers.device import fused, has_kernels

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from compress.calibration.statistics import Need
    from compress.encodings import Encoding
    from compress.passes.base import Block, Target


class LearnedRounding(ABC):
    """One matrix being learned: numbers, the weights they stand for, and the codes they would be stored as."""

    @abstractmethod
    def groups(self) -> list[tuple[list[Tensor], float]]:
        """Learned tensors, each list with its learning rate."""

    @abstractmethod
    def soft(self, progress: float) -> Tensor:
        """(out, in), differentiable; `progress` goes from 0 to 1 over the steps."""

    @abstractmethod
    def encoding(self) -> Encoding:
        """What would be stored now."""

    def penalty(self, progress: float) -> Tensor | None:
        """Something to add to the loss."""
        return None

    def after(self) -> None:  # noqa: B027  (most methods have nothing to do then)
        """Called when the optimizer has changed the learned tensors."""


@dataclass(frozen=True, kw_only=True)
class LearnedPass(BlockPass):
    """Learns how to round a block's matrices from the block's outputs.

    Args:
        steps: of learning, per block.
        batch_size: calibration samples per step.
        learning_rate: of Adam at the start; it falls to zero along a cosine.
        inputs: what the block is fed while learning: its inputs in the `compressed` model, in the `original`, or an
            element-wise random `mix` of both.
        objective: `block` compares the block's outputs; `layer` each matrix's own, through the Gram matrix of its
            inputs, which is quicker and learns less.
    """

    steps: Annotated[int, Ge(1)] = 200
    batch_size: Annotated[int, Ge(1)] = 8
    learning_rate: Annotated[float, Gt(0), Lt(1)] = 0.005
    inputs: Inputs = "compressed"
    objective: Literal["block", "layer"] = "block"

    @property
    def needs(self) -> Need:
        return "gram" if self.objective == "layer" else "none"

    @property
    def runs_block(self) -> bool:
        return self.objective == "block"

    def mistakes(self) -> Iterator[OptionError]:
        yield from super().mistakes()
        for i, override in enumerate(self.overrides):
            for option in ("steps", "batch_size", "inputs", "objective"):
                if option in override.options:
                    yield OptionError(f"overrides[{i}].{option}", "is the same for all layers, which learn together")

    def start(self, target: Target) -> LearnedRounding:
        """One matrix as it is before anything is learned."""
        raise NotImplementedError

    def run(self, block: Block) -> Iterator[tuple[str, Edit]]:
        starts = {name: self.at(name).start(t) for name, t in block.targets.items()}
        computed = block.data.dtype if block.data and self.objective == "block" else None
        learned = _LearnedBlock(starts, block.targets, computed)
        recipe = Recipe(self.steps, self.batch_size, self.inputs)
        if self.objective == "layer":
            grams = {name: gram for name, t in block.targets.items() if (gram := _gram(t)) is not None}
            if not grams:
                raise SolveError("no input ever reached these layers")
            original = {name: block.targets[name].weight for name in grams}  # others stay as they start
            outcome = by_layer(learned, original, grams, recipe, block.over, block.kept)
        else:
            assert block.data is not None
            outcome = by_block(learned, block.data, recipe, block.generator, block.over, block.kept)
        for name, target in block.targets.items():
            yield (
                name,
                Edit(encoding=learned.parts[name].encoding(), mask=target.mask, notes=outcome.notes(BLOCK_ERROR)),
            )


@dataclass(frozen=True)
class _LearnedBlock:
    """The matrices of a block as one thing to learn."""

    parts: Mapping[str, LearnedRounding]
    targets: Mapping[str, Target]
    dtype: torch.dtype | None  # that the block computes in: no wider copy waits for it

    def groups(self) -> list[tuple[list[Tensor], float]]:
        return [group for part in self.parts.values() for group in part.groups()]

    def soft(self, progress: float) -> dict[str, Tensor]:
        return {name: self._masked(name, part.soft(progress)) for name, part in self.parts.items()}

    def hard(self) -> dict[str, Tensor]:
        return {name: self._masked(name, part.encoding().dequantize()) for name, part in self.parts.items()}

    def penalty(self, progress: float) -> Tensor | None:
        found = [p for part in self.parts.values() if (p := part.penalty(progress)) is not None]
        return sum(found[1:], found[0]) if found else None

    def after(self) -> None:
        for part in self.parts.values():
            part.after()

    def _masked(self, name: str, weight: Tensor) -> Tensor:
        mask = self.targets[name].mask
        masked = weight if mask is None else weight * mask
        return masked if self.dtype is None else masked.to(self.dtype)


def _gram(target: Target) -> Tensor | None:
    return None if target.statistics is None else target.statistics.gram


@fused
def pulled(before: Tensor, after: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """(O, I) places after a step whose length is scaled by the pull of the side that it goes to."""
    step = after - before
    return before + step * torch.where(step > 0, up, down)


def look_up(tables: Tensor, index: Tensor, table_of: Tensor | None = None) -> Tensor:
    """The entries of small tables, differentiable in them.

    Args:
        tables: (G, K) float32.
        index: (O, ...) int64, below K.
        table_of: (O,) int64, the table of each row; None where all have the first.
    """
    found: Tensor = function(_LookUp).apply(tables, index, table_of)
    return found


class _LookUp:
    # Indexing's own backward adds up one weight after the other in no fixed order of rounding; this one is quick, and
    # the same every time.
    @staticmethod
    def forward(ctx: Any, tables: Tensor, index: Tensor, table_of: Tensor | None) -> Tensor:
        ctx.save_for_backward(index.to(torch.uint8) if tables.shape[1] <= 256 else index, table_of)
        ctx.shape = tables.shape
        return tables.flatten().index_select(0, _flat(index, table_of, ctx.shape[1])).view(index.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        (gradient,) = gradients
        index, table_of = ctx.saved_tensors
        count, entries = ctx.shape
        if has_kernels(gradient):
            rows = sums_by_row(gradient, index, entries)
            total = rows.sum(0) if table_of is None else _one_hot(table_of, count).T @ rows
        else:
            at = _flat(index.long(), table_of, entries)
            total = sums_by_number(at, gradient.flatten().double(), count * entries)
        return total.to(gradient.dtype).view(ctx.shape), None, None


def sums_by_row(gradient: Tensor, index: Tensor, entries: int) -> Tensor:
    """(O, ...) gradients and whole numbers below K -> (O, K) float64 sums of those with each number, by a kernel."""
    from compress.passes.quantize.entry_kernel import sums_of_entries

    return sums_of_entries(gradient.reshape(len(gradient), -1), index.reshape(len(index), -1), entries)


def _flat(index: Tensor, table_of: Tensor | None, entries: int) -> Tensor:
    if table_of is None:
        return index.flatten()
    return (index + (table_of * entries).view(-1, *[1] * (index.dim() - 1))).flatten()


def _one_hot(table_of: Tensor, count: int) -> Tensor:
    return (table_of[:, None] == torch.arange(count, device=table_of.device)).double()
