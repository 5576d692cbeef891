"""How much the predictions of models depend on each of their numbers: the diagonal of the Fisher information.

Of each sample one answer is drawn from the model's own predictions, so no labels are needed; the gradients of its
log-likelihood are squared, and their mean is taken over the samples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.calibration.draws import draw
from compress.calibration.samples import forked
from compress.lazy import functional, torch

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from torch import Tensor

    from compress.passes.merge.models import Models, Running

FLOOR = 1e-6  # under the information, as a share of the largest mean of the tensor's in any model
LEAST = 1e-30  # that a logarithm is taken of, and that is divided by


def informations(models: Models, count: int) -> Mapping[str, Sequence[Tensor]]:
    """Tensor -> the information of each of the first so many models, above zero, of the tensor's shape."""
    with models.running() as running:
        each = [_information(models, running, k) for k in range(count)]
        found = {}
        for name in running.names:
            mine = [information[name] for information in each]
            floor = max(LEAST, FLOOR * max(float(one.mean()) for one in mine))
            found[name] = [one.add_(floor) for one in mine]
    return found


def _information(models: Models, running: Running, model: int) -> dict[str, Tensor]:
    values = {name: models.value(model, name).clone().requires_grad_() for name in running.names}
    total = {name: torch.zeros_like(value) for name, value in values.items()}
    # The same draws for every model, and whenever it is asked for.
    generator = forked(models.generator, "fisher")

    def make(names: Collection[str]) -> dict[str, Tensor]:
        return {name: values[name] for name in names}

    for number in models.over(range(running.count), running.count, f"Fisher information {model}"):
        with torch.enable_grad():
            logits = running.logits(make, torch.tensor([number]))
            uniform = draw(generator, tuple(logits.shape), "uniform", logits, (0.0, 1.0)).clamp(LEAST, 1 - 1e-7)
            answers = (logits.detach() - (-uniform.log()).log()).argmax(-1)  # drawn with the predicted probabilities
            loss = functional.cross_entropy(logits, answers, reduction="sum")
            gradients = torch.autograd.grad(loss, list(values.values()), allow_unused=True)
        for name, gradient in zip(values, gradients, strict=True):
            if gradient is not None:
                total[name].add_(gradient.square(), alpha=1 / running.count)
    return {name: value.detach() for name, value in total.items()}
