"""The stage that scales channels between layers, block by block: what layers read is undone in what makes it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from compress.calibration.precision import products
from compress.checkpoint.remade import settled
from compress.engine.placement import take_records
from compress.engine.stage import StageResult, StageRunner, calibration_batches, layers_changed
from compress.engine.sweep import Wanted, gradients, sweep
from compress.engine.transformed import Transformed
from compress.errors import UnsupportedModelError
from compress.io.keys import key_of
from compress.passes.transform.scaling import ChannelsSeen, ScalingPass

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from compress.calibration.data import Dataset
    from compress.calibration.statistics import Statistics
    from compress.engine.context import Context
    from compress.engine.ledger import Record
    from compress.engine.stage import Stage
    from compress.models.channels import Channels


class ScalingChannels(StageRunner):
    """Runs one pass over all channels that it scales. What it makes counts as the original."""

    def run(self, context: Context, stage: Stage, data: Dataset | None, key: str) -> StageResult:
        """Do the work, or find it done.

        Raises:
            UnsupportedModelError: the calibration data never reach a layer.
        """
        pass_ = stage.single(ScalingPass)
        context = replace(context, artifact=settled(context.artifact))
        sites = context.artifact.sites
        blocks: dict[int, list[Channels]] = {index: [] for index in range(len(context.graph.blocks))}
        for channels in pass_.chosen(context.graph):
            blocks[sites[channels.readers[0]].block or 0].append(channels)
        read = {index: [sites[name] for c in found for name in c.readers] for index, found in blocks.items()}
        needs = {site.name: pass_.needs for found in read.values() for site in found}
        wanted = Wanted(pass_.key, read, needs, frozenset(), calibrated=True, learns=False, whole=True)
        batches = context.executor.shard(calibration_batches(context, data))
        records: list[Record] = []
        with gradients(wanted):
            for index, unit in enumerate(sweep(context, wanted, batches)):
                key = key_of(key, stage.number, unit.name, pass_.key, pass_.options(), [s.name for s in unit.sites])
                file = f"{stage.unit}-{unit.name}"
                done = context.ledger.load(file, key)
                if done is None:
                    seen = unit.statistics() if unit.sites else {}
                    done = context.commit(file, key, _scaled(context, pass_, blocks[index], seen))
                records += done
                take_records(context, done)
        section = layers_changed(context.artifact, records)
        return StageResult(key, replace(context, artifact=settled(context.artifact)), section)


def _scaled(
    context: Context, pass_: ScalingPass, block: Sequence[Channels], statistics: Mapping[str, Statistics]
) -> list[Record]:
    """Everything of a block that the scales of its channels change."""
    state = Transformed(context, pass_)
    for channels in block:
        first = channels.readers[0]
        if first not in statistics:
            raise UnsupportedModelError(f"the calibration data never reach {first}, so nothing is known of its inputs")
        weights = tuple(state[name] for name in channels.readers)
        seen = ChannelsSeen(weights, channels.columns.to(weights[0].device), statistics[first])
        with products(context.products):
            found = pass_.run(seen)
        for name, weight in zip(channels.readers, found.weights, strict=True):
            state[name], state.notes[name] = weight, dict(found.notes)
        for place in channels.makers:
            rows, value = place.index[:, 0].to(weights[0].device), state[place.tensor].clone()
            offset = channels.norm.offset if channels.norm and place.tensor == channels.norm.weight else 0.0
            divisor = found.scales if value.dim() == 1 else found.scales[:, None]
            value[rows] = (value[rows] + offset) / divisor - offset
            state[place.tensor] = value
    return state.records()


__all__ = ["ScalingChannels"]
