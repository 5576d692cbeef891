"""Mixtures of experts: parameters that hold the matrices of all experts, and the layers that choose among those.

What is known of them is found in what a model contains. Transformers marks the modules whose experts it runs by
attributes (`use_experts_implementation`); a few are not marked, and are known by their class.
"""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.lazy import torch
from compress.models.symmetry import Place, Units

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

MARKS = ("is_transposed", "has_gate", "has_bias", "is_concatenated")  # what transformers sets on such a module
# Classes without the marks -> whether they keep (experts, in, out).
UNMARKED = {
    "LongcatFlashExperts": False,
    "Step3p7Experts": False,
    "JetMoeParallelExperts": False,
    "Llama4TextExperts": True,
}
PASS_ON = ("zero_expert_num",)  # what a module calls how many numbers behind its experts' only pass on what comes in
# Classes that keep the rows of all experts in one matrix: what says how many there are, and parameter -> transposed.
JOINED: dict[str, tuple[str, dict[str, bool]]] = {
    "DbrxExpertGLU": ("moe_num_experts", {"w1": False, "v1": False, "w2": True}),
}
ROUTERS = ("Router", "TopKGating")  # in the names of classes
GATES = ("gate", "router", "shared_expert_gate")  # beside fused experts
OURS = "transformers.models."
# What such a module calls the experts of each token, and how much each of them counts.
CHOICES = {"top_k_index": "top_k_weights", "router_indices": "routing_weights"}
MAKERS, READER = ("gate_up_proj", "up_proj"), "down_proj"  # what makes the neurons of experts, and what reads them
EAGER = "eager"  # one expert after the other


def keeps_transposed(module: nn.Module) -> bool | None:
    """Whether a module of fused experts keeps (experts, in, out); None where it is no such module."""
    if all(hasattr(module, mark) for mark in MARKS):
        return bool(module.is_transposed)
    ours = type(module).__module__.startswith(OURS)
    return UNMARKED.get(type(module).__name__) if ours else None


@dataclass(frozen=True)
class Fused:
    """A parameter that holds a matrix for every expert.

    Attributes:
        leaf: its name in the module.
        count: how many experts there are.
        shape: of the matrix of one, as it lies there.
        transposed: each is kept as (in, out).
        joined: their rows stand one upon the other in a matrix.
        value: of the parameter.
    """

    leaf: str
    count: int
    shape: tuple[int, int]
    transposed: bool
    joined: bool
    value: Tensor


def fused_parameters(module: nn.Module) -> Iterator[Fused]:
    """Those of a module itself."""
    transposed = keeps_transposed(module)
    if transposed is not None:
        for leaf, value in module.named_parameters(recurse=False):
            if value.dim() == 3:
                yield Fused(leaf, len(value), (value.shape[1], value.shape[2]), transposed, False, value)
    elif type(module).__name__ in JOINED and type(module).__module__.startswith(OURS):
        number, leaves = JOINED[type(module).__name__]
        count = int(getattr(module, number))
        for leaf, value in module.named_parameters(recurse=False):
            if leaf in leaves:
                yield Fused(leaf, count, (len(value) // count, value.shape[1]), leaves[leaf], True, value)


def mixtures(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module that holds fused experts."""
    return {name: module for name, module in model.named_modules() if next(fused_parameters(module), None) is not None}


def says_how(module: nn.Module) -> bool:
    """Whether a module of experts computes as its marks say: up, perhaps with a gate, and down."""
    first = "gate_up_proj" if getattr(module, "has_gate", False) else "up_proj"
    return all(hasattr(module, mark) for mark in (*MARKS, first, "down_proj")) and takes_choices(module)


def takes_choices(module: nn.Module) -> bool:
    """Whether a module of experts is told which of them each token goes to, and so can be told another choice."""
    return not CHOICES.keys().isdisjoint(inspect.signature(type(module).forward).parameters)


def passing_on(module: nn.Module) -> int:
    """How many numbers behind those of its experts a module takes that only pass on what they are given."""
    return sum(getattr(module, name, 0) or 0 for name in PASS_ON)


def neurons_of_experts(module: nn.Module) -> Units | None:
    """The neurons of one expert of a module; None where it is not known how its parameters keep them.

    Places are in the entry of that expert in each parameter, which is called by its name in the module.
    """
    fused = {each.leaf: each for each in fused_parameters(module) if not each.joined}
    makers = [leaf for leaf in MAKERS if leaf in fused]
    if len(makers) != 1 or READER not in fused or len(fused) != 2:
        return None
    maker, reader = fused[makers[0]], fused[READER]
    made, count = maker.shape[1 if maker.transposed else 0], reader.shape[0 if reader.transposed else 1]
    each = torch.arange(count)
    if made == count:
        index = each[:, None]
    elif made == 2 * count:
        apart = getattr(module, "is_concatenated", True)  # gates stand before all others, or by turns with them
        index = torch.stack([each, each + count] if apart else [2 * each, 2 * each + 1], dim=1)
    else:
        return None
    places = [Place(maker.leaf, 1 if maker.transposed else 0, index)]
    if getattr(module, f"{maker.leaf}_bias", None) is not None:
        places.append(Place(f"{maker.leaf}_bias", 0, index))
    return Units((*places, Place(READER, 0 if reader.transposed else 1, each[:, None])))


def router_names(model: nn.Module) -> set[str]:
    """Full names of the modules that choose among experts, or weigh them, and of what is in them."""
    modules = dict(model.named_modules())
    beside = {name.rpartition(".")[0] for name in mixtures(model)}

    def routes(name: str, module: nn.Module) -> bool:
        owner, _, leaf = name.rpartition(".")
        return (owner in beside and leaf in GATES) or any(part in type(module).__name__ for part in ROUTERS)

    routers = tuple(f"{name}." for name, module in modules.items() if routes(name, module))
    return {name for name in modules if f"{name}.".startswith(routers)}


def run_one_by_one(model: nn.Module) -> None:
    """From now on the experts of a model of transformers run one after the other, each with its own matrix."""
    for config in _configs(model):
        config._experts_implementation_internal = EAGER


@contextmanager
def running_one_by_one(model: nn.Module) -> Iterator[None]:
    """While open, experts run one after the other; then as they did before."""
    before = [(config, config._experts_implementation_internal) for config in _configs(model)]
    run_one_by_one(model)
    try:
        yield
    finally:
        for config, implementation in before:
            config._experts_implementation_internal = implementation


def _configs(model: nn.Module) -> list[Any]:
    """The configurations that fused experts look up how to run in; each once."""
    found = {}
    for module in model.modules():
        config = getattr(module, "config", None) if keeps_transposed(module) is not None else None
        if config is not None and hasattr(config, "_experts_implementation_internal"):
            found[id(config)] = config
    return list(found.values())
