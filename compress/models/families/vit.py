"""Vision transformers."""

from __future__ import annotations

from compress.models.families.transformers_model import Images
from compress.models.symmetry import Wiring


class Vit(Images):
    """Known by its wiring."""

    wiring = Wiring(("q_proj", "k_proj", "v_proj", "o_proj"), ("fc1", "fc2"))
    code = ("vit",)
