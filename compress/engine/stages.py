"""What runs a stage: one entry for everything that a pass may have to see at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from compress.engine.block_stage import BlockSequential
from compress.engine.cache_stage import RoundingCaches
from compress.engine.channels_stage import ScalingChannels
from compress.engine.depth_stage import Shortening
from compress.engine.experts_stage import FewerExperts
from compress.engine.merge.merging import Merging
from compress.engine.model_stage import WholeModel
from compress.engine.norms_stage import Recounting
from compress.engine.stream_stage import Turning
from compress.engine.width_stage import Narrowing

if TYPE_CHECKING:
    from compress.engine.stage import StageRunner
    from compress.passes.base import Reach

RUNNERS: Mapping[Reach, StageRunner] = {
    "matrix": BlockSequential(),
    "block": BlockSequential(),
    "model": WholeModel(),
    "merge": Merging(),
    "depth": Shortening(),
    "experts": FewerExperts(),
    "width": Narrowing(),
    "norms": Recounting(),
    "channels": ScalingChannels(),
    "stream": Turning(),
    "cache": RoundingCaches(),
}
