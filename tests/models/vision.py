"""Models of images and of sound."""

from __future__ import annotations

from typing import Any

from entry import Entry

EDGES = ("*patch_embed*", "*classifier*", "*embedder.*")  # what a large model has little of
IMAGES: dict[str, Any] = {"inputs": "images", "apart": EDGES}
CONVNEXT: dict[str, Any] = {**IMAGES, "apart": (*EDGES, "*dwconv*", "*downsampling*", "*grn*")}
SIGLIP: dict[str, Any] = {**IMAGES, "apart": (*EDGES, "*head.*", "*text_model*")}
TWO_STAGES = {"hidden_sizes": [32, 64], "depths": [2, 2]}
PYRAMID = {
    **TWO_STAGES, "num_encoder_blocks": 2, "num_attention_heads": [2, 4], "mlp_ratios": [2, 2], "strides": [4, 2],
}  # fmt: skip
WINDOWS = {"depths": [2, 2], "num_heads": [2, 4], "embed_dim": 32, "window_size": 4, "patch_size": 4}
SEGFORMER = ("*patch_embeddings.proj", "*dwconv*")
SOUND = ("*feature_extractor*", "*pos_conv_embed*", "*feature_projection*", "*lm_head*")
CONVOLUTIONS = {"conv_dim": [32, 32], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2,
                "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}  # fmt: skip

VISION = (
    Entry("ViTForImageClassification", **IMAGES, quick=True),
    Entry("ViTModel", **IMAGES),
    Entry("BeitForImageClassification", **IMAGES),
    Entry("CLIPModel", inputs="pairs", apart=(*EDGES, "*projection.weight", "*head.*")),
    Entry("CLIPForImageClassification", **IMAGES),
    Entry("ConvNextForImageClassification", {**TWO_STAGES, "num_stages": 2}, exclude=("*dwconv",), **CONVNEXT),
    Entry("ConvNextV2ForImageClassification", {**TWO_STAGES, "num_stages": 2}, exclude=("*dwconv",), **CONVNEXT),
    Entry("Data2VecVisionForImageClassification", **IMAGES),
    Entry("DeiTForImageClassification", **IMAGES),
    Entry("Dinov2ForImageClassification", **IMAGES),
    Entry(
        "FocalNetForImageClassification",
        {
            **TWO_STAGES,
            "embed_dim": 32,
            "focal_levels": [2, 2],
            "focal_windows": [3, 3],
            "patch_size": 4,
        },
        exclude=("*focal_layers*",),
        **IMAGES,
    ),
    Entry(
        "PoolFormerForImageClassification",
        {
            **TWO_STAGES,
            "num_encoder_blocks": 2,
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "padding": [2, 1],
            "mlp_ratio": 2.0,
        },
        exclude=("*patch_embeddings*",),
        **IMAGES,
    ),
    Entry(
        "PvtForImageClassification",
        {
            **PYRAMID,
            "sequence_reduction_ratios": [2, 1],
            "patch_sizes": [4, 2],
        },
        exclude=("*patch_embeddings*",),
        **IMAGES,
    ),
    Entry(
        "RegNetForImageClassification",
        {**TWO_STAGES, "embedding_size": 32, "groups_width": 16},
        share=0.4,  # the second convolution of a block is left out: its groups have few columns
        exclude=("*attention.2", "*layer.1.convolution"),
        tolerance=1e-6,
        **IMAGES,
    ),
    Entry("ResNetForImageClassification", {**TWO_STAGES, "embedding_size": 32, "layer_type": "basic"}, **IMAGES),
    Entry(
        "SegformerForImageClassification",
        {**PYRAMID, "sr_ratios": [2, 1], "patch_sizes": [7, 3]},
        exclude=SEGFORMER,
        **IMAGES,
    ),
    Entry(
        "SegformerForSemanticSegmentation",
        {
            **PYRAMID,
            "sr_ratios": [2, 1],
            "patch_sizes": [7, 3],
            "decoder_hidden_size": 32,
        },
        exclude=SEGFORMER,
        **IMAGES,
    ),
    Entry("SiglipModel", inputs="pairs", apart=(*EDGES, "*projection.weight", "*head.*")),
    Entry("SiglipForImageClassification", **SIGLIP),
    Entry("SwinForImageClassification", WINDOWS, **IMAGES),
    Entry("Swinv2ForImageClassification", WINDOWS, exclude=("*continuous_position_bias_mlp*",), **IMAGES),
    Entry(
        "YolosForObjectDetection",
        {"image_size": [32, 32], "num_detection_tokens": 10},
        inputs="images",
        apart=(*EDGES, "*bbox_predictor*", "*position_embeddings*"),
    ),
    Entry("Wav2Vec2ForCTC", CONVOLUTIONS, inputs="waves", apart=SOUND),
    Entry("HubertForCTC", CONVOLUTIONS, inputs="waves", apart=SOUND),
)
