"""How much a model's predictions change with what each layer puts out: the diagonal of a Fisher matrix.

Shapes: O outputs of a layer, C classes (words of a vocabulary), n predictions.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy

from compress.calibration.collect import output_gradients
from compress.calibration.draws import draw
from compress.calibration.precision import learning
from compress.engine.model_training import in_memory
from compress.engine.stage import generator_for
from compress.models.logits import WHOLE_LEARNED, logits_in, vocabulary
from compress.models.tables import multiplies

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from compress.engine.context import Context
    from compress.models.site import Site


def output_fisher(context: Context, sites: Sequence[Site], samples: Tensor, key: str) -> dict[str, Tensor]:
    """For each output of each layer, the mean over predictions of the summed squares of their loss's gradients.

    The loss of a prediction is that of a class drawn from what the model itself predicts, so that this is the Fisher
    information of the outputs, and half of it times the squared change of an output is about the KL divergence that
    the change makes. Cross terms between outputs are left out.

    Args:
        context: of the original model.
        sites: matrices.
        samples: calibration data, a part of it is enough.
        key: of all that the result depends on, for the ledger.

    Returns:
        site -> (O,) float64; none of a site whose outputs are not seen, such as an expert of a fused parameter.

    Source: the true Fisher by sampled labels, block-diagonal over layers: Martens and Grosse, "Optimizing Neural
    Networks with Kronecker-factored Approximate Curvature", 2015, arXiv 1503.05671. Differs from the paper in: of the
    factor of output gradients only the diagonal is kept.
    """
    kept = context.ledger.load_tensors("s00-fisher", key)
    if kept is not None:
        return kept
    model = context.graph.model
    named = ((s, None if s.is_expert else multiplies(model, s)) for s in sites)
    watched = {s: name for s, name in named if name is not None and not (s.read_by and s.read_by != s.name)}
    modules = {s.name: model.get_submodule(name) for s, name in watched.items()}
    sums = {s.name: torch.zeros(s.shape[0], dtype=torch.float64, device=context.devices.compute) for s in watched}
    by_name = {s.name: s for s in watched}
    wide, predictions = replace(context, dtype=torch.float32), 0

    def see(name: str, gradient: Tensor) -> None:
        last = not by_name[name].is_convolution
        by_output = gradient.flatten(0, -2) if last else gradient.transpose(0, 1).flatten(1).T
        if by_output.shape[-1] == len(sums[name]):
            sums[name] += by_output.float().square().sum(0).double()

    with in_memory(wide), output_gradients(modules, see), torch.enable_grad():
        parts = torch.split(samples, _rows(context, samples))
        for number, batch in enumerate(context.bars.over(parts, len(parts), "gradients: batches", "end")):
            with learning(context.products, torch.empty(0, dtype=torch.float32)):
                out = logits_in(wide.forward(batch)).float()
                predictions += _backward(out, generator_for(context.seed, 0, number, "fisher"))
    found = {name: (each / predictions).cpu() for name, each in sums.items() if float(each.sum()) > 0}
    context.ledger.commit_tensors("s00-fisher", key, found)
    return found


def _rows(context: Context, samples: Tensor) -> int:
    """How many samples run at once."""
    predicted = samples[0].numel() if context.graph.takes_tokens else 1
    width = vocabulary(context.graph.model) if context.graph.is_language_model else 0
    return max(1, min(len(samples), WHOLE_LEARNED // max(1, predicted * width), 2048 // max(1, predicted)))


def _backward(out: Tensor, generator: torch.Generator) -> int:
    """Gradients of the loss of classes that are drawn from (..., C) logits; returns how many predictions they are."""
    rows = out.flatten(0, -2)
    with torch.no_grad():
        upto = torch.softmax(rows.detach(), -1).cumsum(-1)
        at = draw(generator, (len(rows), 1), "uniform", rows) * upto[:, -1:]
        classes = torch.searchsorted(upto, at, right=True).clamp(max=rows.shape[1] - 1)[:, 0]
    partial(cross_entropy, reduction="sum")(rows, classes).backward()
    return len(rows)


__all__ = ["output_fisher"]
