"""What is known of a model while a pipeline is planned on it, and what planning one more pass adds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from compress.encodings.cache import SCALES
from compress.models.site import bytes_by_tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from compress.encodings import Spec
    from compress.encodings.cache import CacheForm
    from compress.errors import Problem
    from compress.models.fewer_experts import Fewer
    from compress.models.graph import Graph
    from compress.models.narrow import Narrower
    from compress.models.shorten import Shorter
    from compress.models.site import Site
    from compress.passes import Pass


FLOAT = 4
CARRIED = "carried along"  # stands for all tensors without a place, among the sizes


@dataclass(frozen=True)
class PassPlan:
    """One pass on one model: the sites it works on, and each one's expected spec afterwards.

    A pass that takes blocks, experts or units out has the sites of which it may take some, and one that merges those
    whose weights it merges; they have no specs.

    Attributes:
        left: what is left of a block, in words, behind a pass that takes units out; or what else it changes.
        results: bytes of what such a pass keeps on the disk until the result is written.
    """

    path: str
    pass_: Pass
    sites: tuple[Site, ...]
    specs: dict[str, Spec]
    left: str = ""
    results: int = 0


@dataclass(frozen=True)
class PlanState:
    """The model as the passes planned so far leave it.

    Attributes:
        graph: its blocks and sites.
        dtypes: parameter name -> type it is stored in.
        sizes: tensor name -> bytes in the source.
        parameters: names of all parameters, tied ones too.
        kinds: site -> kind of its weight, such as `dense` or `sparse-quantized`.
        specs: site -> how its weight is stored; only of sites that a pass worked on.
        new_biases: site -> bytes of a bias that a pass gives it.
        caches: attention layer -> how it rounds the keys and values that it keeps.
        shorter: whether a pass took blocks, experts, neurons or heads out.
        merges: how many passes merged.
        first_change: path of the first pass that is not a merge; empty before it.
        first_learner: path of the first pass that learns from data; empty before it.
    """

    graph: Graph
    dtypes: Mapping[str, torch.dtype]
    sizes: Mapping[str, int]
    parameters: frozenset[str]
    kinds: Mapping[str, str]
    specs: Mapping[str, Spec] = field(default_factory=dict)
    new_biases: Mapping[str, int] = field(default_factory=dict)
    caches: Mapping[str, CacheForm] = field(default_factory=dict)
    shorter: bool = False
    merges: int = 0
    first_change: str = ""
    first_learner: str = ""

    def entered(self, path: str, pass_: Pass) -> PlanState:
        """The state with a pass counted, before what it does to the model."""
        merges = pass_.reach == "merge"
        return replace(
            self,
            merges=self.merges + merges,
            first_change=self.first_change or ("" if merges else path),
            first_learner=self.first_learner or (path if pass_.calibrated else ""),
        )

    def without_blocks(self, shorter: Shorter) -> PlanState:
        """The state of the model without the blocks that a pass takes out."""
        return replace(
            self,
            graph=shorter.graph,
            dtypes=shorter.moved(self.dtypes),
            sizes=shorter.moved(self.sizes),
            parameters=frozenset(shorter.moved(dict.fromkeys(self.parameters))),
            kinds=shorter.moved(self.kinds),
            specs=shorter.moved(self.specs),
            new_biases=shorter.moved(self.new_biases),
            shorter=True,
        )

    def with_cuts(self, fewer: Fewer | Narrower) -> PlanState:
        """The state of the model without the experts, neurons or heads that a pass takes out."""
        before = {name: tensor.numel() for name, tensor in self.graph.tensors()}
        sizes = {
            name: size * math.prod(fewer.cuts[name].shape) // before[name] if name in fewer.cuts else size
            for name, size in self.sizes.items()
        }
        rows, left = ({site.name: site.shape[0] for site in graph.sites} for graph in (self.graph, fewer.graph))
        return replace(
            self,
            graph=fewer.graph,
            sizes=sizes,
            kinds=fewer.moved(self.kinds),
            specs=fewer.moved(self.specs),
            new_biases={n: size * left[n] // rows[n] for n, size in fewer.moved(self.new_biases).items()},
            shorter=True,
        )

    def settled(self) -> PlanState:
        """The state in which what passes made dense counts as the original."""
        return replace(self, specs={name: spec for name, spec in self.specs.items() if not spec.is_dense})

    def final_bytes(self) -> int:
        """Expected size of all weights."""
        made = {name: spec.num_bytes for name, spec in self.specs.items()}
        sizes = bytes_by_tensor(self.graph.sites, self.sizes, made)
        scales = sum(len(SCALES) * form.heads * FLOAT for form in self.caches.values())
        return sum(sizes.values()) + sum(self.new_biases.values()) + scales


@dataclass(frozen=True)
class Planned:
    """What planning one pass gives.

    Attributes:
        part: the pass's part of the plan.
        state: the model afterwards.
        problems: what is impossible about it, without line numbers.
    """

    part: PassPlan
    state: PlanState
    problems: tuple[Problem, ...]


class Planner(Protocol):
    """Plans one pass of a certain reach."""

    def __call__(self, state: PlanState, path: str, pass_: Pass, *, fused: bool, first: bool) -> Planned:
        """Plan a pass.

        Args:
            state: the model as the passes before leave it.
            path: of the pass in the pipeline, such as passes[1].wanda.
            pass_: with its options.
            fused: whether other passes run in the same stage.
            first: whether it is the first of its stage.
        """


def initial(graph: Graph, dtypes: Mapping[str, torch.dtype], carried: int = 0) -> PlanState:
    """The state before every pass. `carried`: bytes of tensors that the model has no place for."""
    sizes = {name: tensor.numel() * dtypes[name].itemsize for name, tensor in graph.tensors()}
    return PlanState(
        graph,
        dtypes,
        sizes={**sizes, CARRIED: carried} if carried else sizes,
        parameters=frozenset(name for name, _ in graph.model.named_parameters(remove_duplicate=False)),
        kinds={site.name: "dense" for site in graph.sites},
    )
