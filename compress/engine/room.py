"""What to do where a device has no room for a batch: go on with half of it, and say so; then give up in words."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import torch

from compress.calibration.data import batches
from compress.errors import ResourceError
from compress.logs import LOGGER

if TYPE_CHECKING:
    from collections.abc import Callable

    from compress.calibration.data import Dataset
    from compress.engine.context import Context

Made = TypeVar("Made")


def with_room(
    context: Context, data: Dataset | None, at_once: int, work: Callable[[Context], Made]
) -> tuple[Made, Context]:
    """Do work that runs the model, in smaller batches where the device has no room.

    What the work had finished and committed is not done again.

    Args:
        context: of the work.
        data: that runs through the model, if any does.
        at_once: tokens of a usual batch.
        work: what is done in a context.

    Returns:
        What it made, and the context in which there was room.

    Raises:
        ResourceError: batches cannot be divided further.
    """
    samples = 1 if data is None else len(batches(data.inputs, at_once)[0])
    while True:
        try:
            return work(context), context
        except torch.OutOfMemoryError as error:
            said = ". ".join(str(error).split(". ")[:2])
        # Only here, when the error and the tensors in its frames are gone, is their memory free again.
        torch.cuda.empty_cache()
        device, divided = context.devices.compute, 2 * context.divided
        if context.executor.world > 1:  # the others are in the middle of it
            raise ResourceError(
                f"{device} has no room ({said}), and several processes cannot divide batches while they run; what is "
                "finished is kept. Give shorter samples, a smaller batch_size, or a device with more memory"
            )
        if divided > samples:
            raise ResourceError(
                f"{device} has no room ({said}), and no batch of several samples is left to divide; what is finished "
                "is kept. Give shorter samples, a smaller batch_size, a device with more memory, or device: cpu"
            )
        context = replace(context, divided=divided)
        LOGGER.warning("%s has no room for a batch (%s); going on with parts of it, 1/%d", device, said, divided)
