"""BERT and RoBERTa: the layers of an attention lie in modules of their own."""

from __future__ import annotations

from compress.models.families.transformers_model import Language
from compress.models.symmetry import Wiring


class Bert(Language):
    """Known by its wiring."""

    wiring = Wiring(("self.query", "self.key", "self.value", "output.dense"), ("intermediate.dense", "output.dense"))
    code = ("bert", "roberta")
