"""How much a model's predictions change with what each layer puts out: the diagonal of a Fisher matrix.

Shapes: O outputs of a layer, I columns of a table, C classes (words of a vocabulary), n predictions.
"""

from __future__ import annotations

from dataclasses import replace
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
        site -> (O,) float64; none of a site whose outputs are not seen, such as an expert of a fused parameter. Under
        the name that `looked_up` gives a table, (I,) of what is looked up in it.

    Source: the true Fisher by sampled labels, block-diagonal over layers: Martens and Grosse, "Optimizing Neural
    Networks with Kronecker-factored Approximate Curvature", 2015, arXiv 1503.05671. Differs from the paper in: of the
    factor of output gradients only the diagonal is kept.
    """
    kept = context.ledger.load_tensors("s00-fisher", key)
    if kept is not None:
        return kept
    model = context.graph.model
    users = {name: s for s in sites if not s.is_expert for name in multiplies(model, s)}
    users = {name: s for name, s in users.items() if s.read_by is None or s.read_by == s.name}
    tables = {name: s for s in sites if s.looked_up for name in s.names if name not in users}
    modules = {name: model.get_submodule(name) for name in (*users, *tables)}
    sums = {s.name: context.devices.to_compute(torch.zeros(s.shape[0], dtype=torch.float64)) for s in users.values()}
    sums |= {looked_up(s): context.devices.to_compute(torch.zeros(s.shape[1]).double()) for s in tables.values()}
    wide, predictions = replace(context, dtype=torch.float32), 0

    def see(name: str, gradient: Tensor) -> None:
        site = users.get(name) or tables[name]
        last = not site.is_convolution
        by_output = gradient.flatten(0, -2) if last else gradient.transpose(0, 1).flatten(1).T
        total = sums[site.name if name in users else looked_up(site)]
        if by_output.shape[-1] == len(total):
            total += by_output.float().square().sum(0).double()

    with in_memory(wide), output_gradients(modules, see), torch.enable_grad():
        parts = torch.split(samples, _rows(context, samples))
        for number, batch in enumerate(context.bars.over(parts, len(parts), "gradients: batches", "end")):
            with learning(context.products, torch.empty(0, dtype=torch.float32)):
                out = logits_in(wide.forward(batch)).float()
                predictions += _backward(out, generator_for(context.seed, 0, number, "fisher"))
    found = {name: (each / predictions).cpu() for name, each in sums.items() if float(each.sum()) > 0}
    context.ledger.commit_tensors("s00-fisher", key, found)
    return found


def looked_up(site: Site) -> str:
    """What rows that are looked up in a table are called, beside what it makes of inputs."""
    return f"{site.name}, looked up"


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
    torch.autograd.backward(cross_entropy(rows, classes, reduction="sum"))
    return len(rows)


__all__ = ["looked_up", "output_fisher"]
