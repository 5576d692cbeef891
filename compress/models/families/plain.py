"""Any module: what is found without knowing the kind of model. The other families start from here."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from compress.lazy import nn, torch
from compress.models.experts import fused_parameters, router_names
from compress.models.site import Site, TensorRef
from compress.models.symmetry import is_transposed
from compress.models.towers import towers_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from torch import Tensor

    from compress.models.symmetry import Axis, Units
    from compress.models.towers import Tower


class Plain:
    """A module of the user's own, traced as a whole."""

    def matches(self, model: nn.Module) -> bool:
        return True

    def towers(self, model: nn.Module) -> tuple[Tower, ...]:
        return towers_of(model)

    def sites(self, model: nn.Module) -> Iterator[Site]:
        """The weight of every `Linear`, plain `Conv2d` and transformers `Conv1D`, and every expert of fused ones."""
        routers = router_names(model)
        for name, module in model.named_modules():
            site = _site(name, module)
            if site is not None:
                yield replace(site, router=name in routers)
            yield from _experts(name, module)

    def axes(self, model: nn.Module, sites: Collection[str]) -> tuple[Axis, ...]:
        return ()

    def symmetry(self, model: nn.Module, tied: Mapping[str, str]) -> Iterator[Units]:
        from compress.models.tracing import trace  # imports torch.fx

        return trace(model, "", tied)

    def export_names(self, container: str) -> Mapping[str, str]:
        return {}

    def forward(self, model: nn.Module, batch: Tensor) -> Any:
        return model(batch.clone())  # a first layer may work in place


def _site(name: str, module: nn.Module) -> Site | None:
    parameter, transposed = f"{name}.weight" if name else "weight", is_transposed(module)
    if transposed or isinstance(module, nn.Linear):
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        rows, columns = weight.T.shape if transposed else weight.shape
        return Site(name, (rows, columns), TensorRef(parameter, transposed=transposed))
    # A subclass with a forward of its own does something else with its weight.
    if isinstance(module, nn.Conv2d) and type(module).forward is nn.Conv2d.forward:
        stored = tuple(module.weight.shape)
        ref = TensorRef(parameter, stored=stored)
        return Site(name, (stored[0], math.prod(stored[1:])), ref, groups=module.groups)
    return None


def _experts(name: str, module: nn.Module) -> Iterator[Site]:
    """One matrix after the other of every parameter that holds those of all experts."""
    for fused in fused_parameters(module):
        parameter = f"{name}.{fused.leaf}" if name else fused.leaf
        first, second = fused.shape
        shape = (second, first) if fused.transposed else (first, second)
        for number in range(fused.count):
            ref = TensorRef(parameter, (number,), fused.transposed, of=fused.count, joined=fused.joined)
            yield Site(f"{parameter}.{number}", shape, ref)
