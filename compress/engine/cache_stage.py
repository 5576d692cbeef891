"""The stage that fits the rounding of key-value caches, in one sweep over the blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from compress.calibration.cache_ranges import CacheRanges, joined
from compress.calibration.precision import calibrating
from compress.engine.chains import chain_of
from compress.engine.placement import present, streamed
from compress.engine.stage import StageResult, StageRunner, calibration_batches
from compress.io.keys import key_of
from compress.passes.quantize.kv_cache import KvCache
from compress.report.sections import CachesRounded
from compress.runtime.cache import cached_layers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from compress.calibration.cache_ranges import Seen
    from compress.calibration.data import Dataset
    from compress.engine.context import Context
    from compress.engine.stage import Stage
    from compress.models.towers import Tower


class RoundingCaches(StageRunner):
    """Runs one pass over the attention layers of the model."""

    def run(self, context: Context, stage: Stage, data: Dataset | None, key: str) -> StageResult:
        """Do the work, or find it done.

        Raises:
            NonFiniteError: keys or values are NaN or infinite.
        """
        pass_ = stage.single(KvCache)
        every = cached_layers(context.graph.model)
        layers = {name: every[name] for name in pass_.chosen(every)}
        key = key_of(key, stage.number, pass_.key, pass_.options(), list(layers))
        unit = f"{stage.unit}-cache"
        seen = context.ledger.load_row(unit, key)
        if seen is None:
            batches = context.executor.shard(calibration_batches(context, data))
            seen = joined(context.executor.gathered(_seen(context, layers, batches)))
            context.ledger.commit_row(unit, key, seen)
        largest = {name: [torch.tensor(seen[name][what], device="cpu") for what in ("keys", "values")] for name in seen}
        caches = {name: pass_.run(*largest[name]) for name in layers if name in seen}
        artifact = replace(context.artifact, caches={**context.artifact.caches, **caches})
        numbers = sum(int(seen[name]["numbers"][0]) for name in caches)
        section = CachesRounded(
            pass_.key,
            pass_.words,
            {name: {leaf: value.tolist() for leaf, value in grid.tensors().items()} for name, grid in caches.items()},
            [name for name in layers if name not in caches],
            (2 * numbers, numbers * pass_.bits // 8),
        )
        return StageResult(key, replace(context, artifact=artifact), section)


def _seen(context: Context, layers: Mapping[str, nn.Module], batches: Sequence[Tensor]) -> Seen:
    """The largest keys and values of every layer, block by block where blocks can be run one by one."""
    ranges, towers = CacheRanges(), [t for t in context.graph.towers if _holds(t, layers)]
    with torch.no_grad(), calibrating(context.products, context.dtype, context.devices.compute):
        chain = chain_of(context, towers[0], batches) if len(towers) == 1 else None
        if chain is None:
            with streamed(context), ranges.watching(layers):
                for batch in context.bars.over(batches, len(batches), "kv_cache: batches"):
                    context.forward(batch)
            return ranges.seen()
        numbers = towers[0].numbers
        for index in context.bars.over(numbers, len(numbers), "kv_cache: block", "each"):
            block = context.graph.model.get_submodule(context.graph.blocks[index])
            with present(context, index), ranges.watching(layers):
                forwards = chain.forwards(block, index=index)
                for number, made in enumerate(context.bars.over(forwards, len(batches), "kv_cache: batches")):
                    chain.keep(number, made().to(context.dtype))
    return ranges.seen()


def _holds(tower: Tower, layers: Mapping[str, nn.Module]) -> bool:
    """Whether any of the layers lies in a block of the tower."""
    inside = tuple(f"{name}." if name else "" for name in tower.blocks)
    return any(name.startswith(inside) for name in layers)


__all__ = ["RoundingCaches"]
