"""Vision transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from compress.models.families.transformers_model import Images
from compress.models.residual import Streams
from compress.models.symmetry import Wiring

if TYPE_CHECKING:
    from collections.abc import Mapping


class Vit(Images):
    """Known by its wiring."""

    wiring = Wiring(("q_proj", "k_proj", "v_proj", "o_proj"), ("fc1", "fc2"))
    streams = Streams(
        rows=("o_proj", "fc2", "projection", "layernorm_before", "layernorm_after", "layernorm"),
        columns=(
            *("cls_token", "mask_token", "position_embeddings", "q_proj", "k_proj", "v_proj", "fc1", "classifier"),
        ),
    )
    code = ("vit",)
    reads: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "layernorm_before": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        "layernorm_after": ("mlp.fc1",),
    }
