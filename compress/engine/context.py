"""What a stage works with besides its passes: the model as it stands, where it is, who computes, what is kept."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from compress.calibration.activation_cache import Activations
from compress.calibration.precision import unrounded
from compress.calibration.statistics import MIN_EXPERT_TOKENS
from compress.engine.devices import Devices
from compress.engine.executor import SingleProcess
from compress.models.graph import forward
from compress.models.named import call_with, predicted_tokens
from compress.models.site import parameter_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    import torch
    from torch import Tensor

    from compress.calibration.calls import Call
    from compress.calibration.precision import Products
    from compress.checkpoint.artifact import Artifact
    from compress.config.pipeline import Calibration
    from compress.encodings import Weight
    from compress.engine.executor import Executor
    from compress.engine.ledger import MemoryLedger, Record
    from compress.engine.read_ahead import ReadAhead
    from compress.models.graph import Graph
    from compress.models.site import Site
    from compress.progress import Bars


@dataclass(frozen=True)
class ExpertOptions:
    """How statistics of the experts of a mixture are made; as in the section `calibration:`.

    Attributes:
        min_tokens: what is known of an expert that was sent fewer is not used.
        calibrate_all: each is shown all tokens.
    """

    min_tokens: int = MIN_EXPERT_TOKENS
    calibrate_all: bool = False


def expert_options(section: Calibration | None) -> ExpertOptions:
    """Those of a pipeline."""
    if section is None:
        return ExpertOptions()
    return ExpertOptions(section.min_expert_tokens, section.calibrate_all_experts)


def products_of(graph: Graph, asked: Products) -> Products:
    """How a model multiplies while calibrating: DBRX adds up what experts make in the type that it was given."""
    return "float32" if any(site.ref.joined for site in graph.sites) else asked


@dataclass(frozen=True)
class MadeDelta:
    """A compressed delta.

    Attributes:
        file: that holds it.
        merged: the checkpoint that it makes of the model the pipeline is run on.
    """

    file: Path
    merged: Path


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a stage needs besides its passes.

    Attributes:
        artifact: the model as it stands. A stage that makes another one of it returns another context.
        given: the artifact as the pipeline was given it: what compressed deltas belong to.
        ledger: what is done already.
        seed: of every random choice.
        resident: the model is in memory already; nothing is brought in or evicted, and results are set in place.
        dtype: the type that calibration and evaluation compute in.
        products: how float32 matrices are multiplied while calibrating.
        bars: progress.
        executor: who does the work.
        devices: where is computed, and where what is finished waits.
        ahead: reads the next block while a device works on this one; None where the processor computes.
        divided: how many parts usual batches are divided into, because the device has no room for whole ones.
        delta: a compressed one that was made, and belongs into the result.
        experts: of a mixture, and what is learned of their inputs.
        named: samples with several inputs by name; what runs through the model are their numbers.
    """

    artifact: Artifact
    given: Artifact
    ledger: MemoryLedger
    seed: int
    dtype: torch.dtype
    products: Products
    resident: bool
    bars: Bars
    executor: Executor = field(default_factory=SingleProcess)
    devices: Devices = field(default_factory=Devices)
    ahead: ReadAhead | None = None
    divided: int = 1
    delta: MadeDelta | None = None
    experts: ExpertOptions = field(default_factory=ExpertOptions)
    named: tuple[Mapping[str, Tensor], ...] = ()

    @property
    def graph(self) -> Graph:
        """The model's structure."""
        return self.artifact.graph

    def weight(self, site: Site) -> Weight:
        """A site as it stands now, where is computed."""
        return self.devices.to_compute(self.artifact.weight(site, self.devices.compute))

    def original(self, site: Site) -> Tensor:
        """(out, in) as `Artifact.original` has it, where is computed."""
        return self.devices.to_compute(self.artifact.original(site))

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A parameter or buffer as the model takes it, where is computed: codes move there, not what they mean.

        `dtype`: of what was compressed; float32 by default.
        """
        sites = self.artifact.made_sites(name)
        if sites:
            return parameter_of(sites, (self.weight(site).dequantize() for site in sites), dtype)
        ahead = None if self.ahead is None or name in self.artifact.vectors else self.ahead.take(name)
        return self.devices.to_compute(self.artifact.tensor(name)) if ahead is None else ahead

    def forward(self, inputs: Tensor) -> Any:
        """What the model makes of inputs, wherever they wait."""
        if self.named and inputs.dim() == 1:
            sample = {name: self.devices.to_compute(value) for name, value in self.named[int(inputs)].items()}
            return call_with(self.graph.model, sample)
        return forward(self.graph, self.devices.to_compute(inputs))

    def tokens_of(self, inputs: Tensor) -> Tensor:
        """(B, T) token ids of inputs, below 0 where none is predicted."""
        named = self.named and inputs.dim() == 1
        return predicted_tokens(self.graph.model, self.named[int(inputs)]) if named else inputs

    def waiting(
        self, arrivals: Iterable[tuple[Tensor, Mapping[int, Call]]], kinds: Mapping[int, int] | None = None
    ) -> Activations:
        """What arrives at a block, where it waits for it. `kinds`: as `Activations` takes them."""
        devices = self.devices
        trim = not self.resident and not devices.apart  # what a device computes takes no memory here
        return Activations(arrivals, trim=trim, store=devices.activations, room=devices.room, kinds=kinds)

    def commit(self, unit: str, key: str, records: Iterable[Record]) -> list[Record]:
        """Keep a finished unit, where it waits; returns its records as they are kept."""
        # What is written is packed where it was computed, and then is small.
        stored = (replace(r, weight=self.devices.to_store(r.weight)) if self.ledger.in_memory else r for r in records)
        return self.executor.commit(self.ledger, unit, key, list(stored))


def value_of(context: Context, name: str) -> Tensor:
    """A parameter or buffer as it stands now, in the type the model computes in."""
    with unrounded(context.devices.compute):  # a correction is the same, wherever it is multiplied out
        value = context.tensor(name, context.dtype)
    return value.to(context.dtype) if value.is_floating_point() else value


def piece_made(context: Context, site: Site, weight: Weight) -> Tensor:
    """A weight that was just made as it lies in its parameter, as `value_of` gives that."""
    with unrounded(context.devices.compute):
        return site.ref.laid(weight.dequantize()).to(context.dtype)
