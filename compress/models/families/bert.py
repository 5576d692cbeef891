"""BERT and RoBERTa: the layers of an attention lie in modules of their own."""

from __future__ import annotations

from compress.models.families.transformers_model import Language
from compress.models.residual import HEAD, POOLED, STREAM, Streams
from compress.models.symmetry import Wiring


class Bert(Language):
    """Known by its wiring."""

    wiring = Wiring(("self.query", "self.key", "self.value", "output.dense"), ("intermediate.dense", "output.dense"))
    streams = Streams(
        rows=("embeddings.LayerNorm", "output.dense", "output.LayerNorm"),
        columns=(
            *("word_embeddings", "position_embeddings", "token_type_embeddings"),
            *("query", "key", "value", "intermediate.dense", "qa_outputs"),
        ),
        # Keys and values of cross-attention read what an encoder put out, which is another stream.
        neither=("predictions.bias", "lm_head.bias", "crossattention.self.key", "crossattention.self.value"),
        between={
            **dict.fromkeys(("transform.dense", "lm_head.dense"), (HEAD, STREAM)),
            **dict.fromkeys(("transform.LayerNorm", "lm_head.layer_norm"), (HEAD, None)),
            **dict.fromkeys(("predictions.decoder", "lm_head.decoder"), (None, HEAD)),
            **dict.fromkeys(("pooler.dense", "classifier.dense"), (POOLED, STREAM)),
            **dict.fromkeys(("classifier", "seq_relationship", "classifier.out_proj"), (None, POOLED)),
        },
        unless={POOLED: ("pooler.dense", "classifier.dense")},
    )
    code = ("bert", "roberta")
