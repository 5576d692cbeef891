"""What each group of layers would lose with each option of a quantizer, by one of several measures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from compress.engine.fit.divergence import divergences
from compress.engine.fit.errors import sweep_options
from compress.engine.fit.gradients import output_fisher
from compress.engine.sweep import sites_by_block
from compress.errors import UsageError
from compress.io.keys import key_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from compress.engine.context import Context
    from compress.engine.fit.errors import Swept
    from compress.models.site import Site
    from compress.passes.base import LinearPass

Sensitivity = Literal["kl", "fisher", "error"]
Groups = Literal["site", "fused", "block"]
GRADIENT_TOKENS = 8192  # of calibration data that the gradients of outputs are taken on
DIVERGENCE_TOKENS = 2048  # that divergences are measured on


@dataclass(frozen=True)
class Losses:
    """What was found.

    Attributes:
        groups: sites that are given the same option.
        losses: for each group, of each option; of `kl` and `fisher` about nats per prediction.
        swept: what every option does to each layer by itself.
    """

    groups: list[list[Site]]
    losses: list[list[float]]
    swept: Swept


def find_losses(
    context: Context,
    passes: Sequence[LinearPass],
    samples: Tensor,
    batches: Sequence[Tensor],
    sensitivity: Sensitivity,
    groups: Groups,
    key: str,
) -> Losses:
    """Sweep over the layers of the original model.

    Args:
        context: of the original model.
        passes: a quantizer with each of its options; all work on the same layers.
        samples: calibration data.
        batches: the same in the portions that run through the model at once.
        sensitivity: `error` compares what each layer puts out with what it should; `fisher` weighs that by how much
            predictions change with it; `kl` by what they change when the layer is quantized with one of the options,
            which is measured.
        groups: which layers are given the same option: none, those with the same inputs, or those of a block.
        key: of the model, the data, the threads and the code.

    Raises:
        UsageError: gradients of what some layer puts out are not seen.
    """
    by_block = sites_by_block(context.graph, passes[:1])
    every = [s for each in by_block.values() for s in each]
    importance: dict[str, Tensor] = {}
    if sensitivity == "fisher":
        some = _some(samples, GRADIENT_TOKENS)
        importance = output_fisher(context, every, some, key_of(key, "fisher", [s.name for s in every], len(some)))
        lost = next((s.name for s in every if s.name not in importance), None)
        if lost is not None:
            raise UsageError(
                f"sensitivity fisher: no gradient of what {lost} puts out is seen (as of an expert of a fused "
                "parameter, or a layer that nothing reaches); give sensitivity kl or error"
            )
    number = reference(passes) if sensitivity == "kl" else None
    swept = sweep_options(context, passes, batches, importance, number, key_of(key, "errors", sensitivity))
    chosen = grouped(every, swept, groups)
    shares = [[_sum(swept, sites, i, sensitivity) for i in range(len(passes))] for sites in chosen]
    if number is None:
        return Losses(chosen, shares, swept)
    few = _some(samples, DIVERGENCE_TOKENS)
    names = [[s.name for s in sites] for sites in chosen]
    own = key_of(key, "kl", names, passes[number].key, passes[number].options(), len(few))
    measured = divergences(context, chosen, swept.kept, few, own)
    losses = [
        [kl * each / (errors[number] or 1.0) for each in errors] for kl, errors in zip(measured, shares, strict=True)
    ]
    return Losses(chosen, losses, swept)


def reference(passes: Sequence[LinearPass]) -> int:
    """Number of the option that divergences are measured with: the first with the second fewest bits."""
    bits = [int(vars(pass_)["bits"]) for pass_ in passes]
    wanted = sorted(set(bits))[:2][-1]
    return bits.index(wanted)


def grouped(sites: Sequence[Site], swept: Swept, groups: Groups) -> list[list[Site]]:
    """Sites that are given the same option, in order."""
    name_of: dict[Groups, Callable[[Site], object]] = {
        "site": lambda site: site.name,
        "fused": lambda site: swept.sites[site.name].fed,
        "block": lambda site: site.name if site.block is None else site.block,
    }
    found: dict[object, list[Site]] = {}
    for site in sites:
        found.setdefault(name_of[groups](site), []).append(site)
    return list(found.values())


def _sum(swept: Swept, sites: Sequence[Site], option: int, sensitivity: Sensitivity) -> float:
    """What an option does to the outputs of some sites."""
    each = [swept.sites[site.name].options[option] for site in sites]
    if sensitivity == "fisher":
        return sum(found.weighted or 0.0 for found in each)
    return sum(found.relative for found in each)


def _some(samples: Tensor, tokens: int) -> Tensor:
    """Some samples, evenly spread; about so many tokens of text, and a tenth as many samples of other models."""
    text = samples.dim() == 2 and not samples.is_floating_point()
    count = max(1, min(len(samples), tokens // (samples.shape[1] if text else 10)))
    chosen = samples[[i * len(samples) // count for i in range(count)]]
    return chosen.float() if chosen.is_floating_point() else chosen


__all__ = ["Groups", "Losses", "Sensitivity", "find_losses", "grouped", "reference"]
