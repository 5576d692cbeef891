"""Whether the written folder, loaded again, computes what the result in memory does."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from compress.engine.devices import Devices
from compress.engine.measure import logits
from compress.engine.placement import streamed
from compress.errors import CompressError
from compress.models import loading
from compress.models.logits import pieces, tensors_in
from compress.runtime.linear import unpack_all
from compress.runtime.packed import PackedModule

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from compress.engine.context import Context
    from compress.planning.places import Places

# On the processor both multiply the same numbers in the same order. The kernels of a device sum up in another: largest
# difference allowed there, as a share of the largest logit.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}

# A sum that is off by rounding may make an input fall on the next level, and all layers that follow see other inputs.
ROUNDED_INPUTS = 5e-2

# Model types whose code goes another way where no layer is packed (it multiplies with `dt_proj.weight`): the same
# weights in a plain folder compute the same up to rounding, within these shares of the largest logit.
ANOTHER_WAY = ("falcon_mamba", "jamba")


def plain_tolerance(model: nn.Module, dtype: torch.dtype) -> float:
    """How far plain weights may be from the packed ones in what they compute, as a share of the largest logit."""
    config = getattr(model, "config", None)
    return TOLERANCES.get(dtype, 0.0) if getattr(config, "model_type", "") in ANOTHER_WAY else 0.0


def device_tolerance(model: nn.Module, dtype: torch.dtype) -> float:
    """How far a packed model on a device may be from the result, as a share of the largest logit."""
    rounds = any(isinstance(m, PackedModule) and m.spec.inputs is not None for m in model.modules())
    return max(TOLERANCES.get(dtype, 0.0), ROUNDED_INPUTS if rounds else 0.0)


def logit_difference(context: Context, folder: Path, inputs: Tensor, where: Places) -> float:
    """Largest difference of a written model's logits from the result's.

    Args:
        context: of the result.
        folder: the written model.
        inputs: a few samples.
        where: the run computes. A model that its memory does not hold whole is compared on the processor.

    Raises:
        CompressError: they differ; on the processor, at all.
    """
    loaded = loading.load_model(folder, context.dtype)
    packed = sum(tensor.nbytes for tensor in (*loaded.parameters(), *loaded.buffers()))
    fits = where.device_limit is not None and 2 * packed < where.device_limit
    here = context if fits else replace(context, devices=Devices())
    written = replace(here, artifact=replace(here.artifact, graph=replace(here.graph, model=loaded)))
    difference = largest = 0.0
    with here.devices.scope(), torch.no_grad(), streamed(here) as hold:
        loaded.to(here.devices.compute)
        if not fits:
            unpack_all(loaded)
        if context.graph.is_language_model:
            pairs = zip(pieces(logits(written, inputs)), pieces(logits(here, inputs, hold)), strict=True)
        else:  # whatever it returns
            pairs = zip(tensors_in(written.forward(inputs)), tensors_in(here.forward(inputs)), strict=True)
        for there, meant in pairs:
            difference = max(difference, float((there - meant).abs().max()))
            largest = max(largest, float(meant.abs().max()))
    allowed = device_tolerance(loaded, context.dtype) * max(1.0, largest) if fits else 0.0
    if not difference <= allowed:
        more = f", more than {allowed:.3g}" if allowed else ""
        raise CompressError(f"the written model's logits differ by {difference:.3g} from the in-memory result's{more}")
    return difference
