"""OPT: learned positions, a plain MLP."""

from __future__ import annotations

from compress.models.families.transformers_model import Language
from compress.models.symmetry import Wiring


class Opt(Language):
    """Known by its wiring."""

    wiring = Wiring(("q_proj", "k_proj", "v_proj", "out_proj"), ("fc1", "fc2"))
    code = ("opt",)
