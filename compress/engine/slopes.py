"""How much the loss of a model depends on its neurons and heads: one gradient, with the whole model in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from compress.calibration.training import TrainingStore
from compress.engine.model_training import in_memory, model_data
from compress.io.keys import key_of

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from torch import Tensor

    from compress.calibration.data import Dataset
    from compress.engine.context import Context
    from compress.engine.stage import Stage
    from compress.models.narrow import Coupled, Width


def slopes_of(
    context: Context, stage: Stage, widths: Sequence[Width], data: Dataset | None, key: str
) -> dict[str, Tensor]:
    """Reader -> (units,) float64: the sum of |weight * gradient| over all matrices that have something of a unit.

    The loss is that of the next token, the mean over all samples. Kept in the ledger.
    """
    assert data is not None
    unit, key = f"{stage.unit}-slopes", key_of(key, "slopes")
    row = context.ledger.load_row(unit, key)
    if row is None:
        coupled = [c for width in widths for c in width.coupled]
        parameters = {p.tensor for c in coupled for p in (*c.makers, c.units.places[-1])}
        sites = [site for site in context.graph.sites if site.parameter in parameters]
        with in_memory(context):
            products = _products(context, [site.name for site in sites], data.inputs)
        by_parameter = {s.parameter: s.ref.laid(products.pop(s.name)) for s in sites}
        row = {c.reader: _of_units(c, by_parameter).tolist() for c in coupled}
        context.ledger.commit_row(unit, key, row)
    return {name: torch.tensor(values, dtype=torch.float64, device="cpu") for name, values in row.items()}


def _products(context: Context, names: Sequence[str], samples: Tensor) -> dict[str, Tensor]:
    """Site -> (out, in) |weight * gradient|."""
    sites = context.artifact.sites
    weights = {n: context.weight(sites[n]).dequantize().clone().requires_grad_() for n in names}
    data = model_data(context, samples, "next_token", True, TrainingStore())
    sums = {name: torch.zeros_like(value) for name, value in weights.items()}

    def make(wanted: Collection[str]) -> Mapping[str, Tensor]:
        return {name: weights[name] for name in wanted if name in weights}

    numbers = torch.split(torch.arange(data.count, device="cpu"), 1)
    for number in context.bars.over(numbers, len(numbers), "taylor: samples"):
        with torch.enable_grad():
            data.backward(make, number, list(weights.values()))
        for name, weight in weights.items():
            if weight.grad is not None:
                sums[name] += weight.grad
                weight.grad = None
    return {name: (weight.detach() * sums[name]).abs() / data.count for name, weight in weights.items()}


def _of_units(coupled: Coupled, products: Mapping[str, Tensor]) -> Tensor:
    total = torch.zeros(coupled.units.count, dtype=torch.float64)
    for place in (*coupled.makers, coupled.units.places[-1]):
        value = products[place.tensor].double().sum(1 - place.axis)
        total = total + value[place.index.to(value.device)].sum(1)
    return total


__all__ = ["slopes_of"]
