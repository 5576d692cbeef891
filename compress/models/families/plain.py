"""Any module: what is found without knowing the kind of model. The other families start from here."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from compress.lazy import nn, torch
from compress.models.convolutions import is_convolution, is_filter, is_plain, is_transposed_convolution
from compress.models.experts import fused_parameters, router_names
from compress.models.members import OUT, is_attention, members
from compress.models.site import Site, TensorRef
from compress.models.symmetry import is_transposed
from compress.models.towers import towers_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from torch import Tensor

    from compress.models.norms import Norm
    from compress.models.symmetry import Axis, Units
    from compress.models.towers import Tower


class Plain:
    """A module of the user's own, traced as a whole."""

    def matches(self, model: nn.Module) -> bool:
        return True

    def towers(self, model: nn.Module) -> tuple[Tower, ...]:
        return towers_of(model)

    def sites(self, model: nn.Module) -> Iterator[Site]:
        """The weight of every `Linear`, plain convolution and transformers `Conv1D`, and every expert of fused ones.

        Also the matrices of torch's attention and recurrent layers.
        """
        routers = router_names(model)
        for name, module in model.named_modules():
            site = _site(name, module)
            if site is not None:
                yield replace(site, router=name in routers, read_by=_reader(model, name))
            yield from _experts(name, module)
            yield from _members(name, module)

    def axes(self, model: nn.Module, sites: Collection[str]) -> tuple[Axis, ...]:
        return ()

    def symmetry(self, model: nn.Module, tied: Mapping[str, str]) -> Iterator[Units]:
        from compress.models.tracing import trace  # imports torch.fx

        return trace(model, "", tied)

    def residual(self, model: nn.Module, tied: Mapping[str, str]) -> Iterator[Units]:
        return iter(())  # a trace follows what is added too

    def norms(self, model: nn.Module) -> Iterator[Norm]:
        return iter(())

    def forward(self, model: nn.Module, batch: Tensor) -> Any:
        return model(batch.clone())  # a first layer may work in place


def _site(name: str, module: nn.Module) -> Site | None:
    parameter, transposed = f"{name}.weight" if name else "weight", is_transposed(module)
    if module._parameters.get("weight") is None:  # made of other parameters when it is asked for
        return None
    if transposed or isinstance(module, nn.Linear):
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        rows, columns = weight.T.shape if transposed else weight.shape
        return Site(name, (rows, columns), TensorRef(parameter, transposed=transposed))
    if is_convolution(module) and is_plain(module):
        stored = tuple(module.weight.shape)
        shape, ref = (stored[0], math.prod(stored[1:])), TensorRef(parameter, stored=stored)
        return Site(name, shape, ref, groups=module.groups, filter=is_filter(module))
    if is_transposed_convolution(module) and is_plain(module):
        stored, groups = tuple(module.weight.shape), module.groups
        turned = (groups * stored[1], stored[0] // groups * math.prod(stored[2:]))
        return Site(name, turned, TensorRef(parameter, transposed=True, stored=stored, groups=groups), groups=groups)
    return None


def _reader(model: nn.Module, name: str) -> str | None:
    """The attention module that reads the weight of a layer, where one does."""
    owner, _, leaf = name.rpartition(".")
    return owner if leaf == OUT and is_attention(model.get_submodule(owner)) else None


def _members(name: str, module: nn.Module) -> Iterator[Site]:
    """Every matrix that a module of torch reads itself."""
    for child, leaf in members(module):
        rows, columns = module._parameters[leaf].shape  # type: ignore[union-attr]
        path = f"{name}." if name else ""
        yield Site(f"{path}{child}", (rows, columns), TensorRef(f"{path}{leaf}"), read_by=name)


def _experts(name: str, module: nn.Module) -> Iterator[Site]:
    """One matrix after the other of every parameter that holds those of all experts."""
    for fused in fused_parameters(module):
        parameter = f"{name}.{fused.leaf}" if name else fused.leaf
        first, second = fused.shape
        shape = (second, first) if fused.transposed else (first, second)
        for number in range(fused.count):
            ref = TensorRef(parameter, (number,), fused.transposed, of=fused.count, joined=fused.joined)
            yield Site(f"{parameter}.{number}", shape, ref)
