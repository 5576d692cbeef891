"""The batch norms of a model that keep statistics of what they have seen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.lazy import nn

if TYPE_CHECKING:
    from torch.nn.modules.batchnorm import _BatchNorm

MEAN, VARIANCE = "running_mean", "running_var"


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Full name -> batch norm with running statistics, in the order of the model.

    Those of several devices together (`SyncBatchNorm`) are left out: they can only count on such devices.
    """
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, kinds) and module._buffers.get(MEAN) is not None
    }
