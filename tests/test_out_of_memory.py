"""Models that ask where they are, or read parameters of other modules, while most of them is out of memory."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from selection import only
from torch import Tensor
from transformers import PreTrainedModel

import compress

TEXT = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0, "max_position_embeddings": 64}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 16, "patch_size": 8}  # fmt: skip


def idefics3() -> PreTrainedModel:
    text = {"model_type": "llama", **TEXT}
    config = transformers.Idefics3Config(text_config=text, vision_config=VISION, image_token_id=255)
    return transformers.Idefics3ForConditionalGeneration(config)


def mllama() -> PreTrainedModel:
    text = {k: v for k, v in TEXT.items() if k != "head_dim"} | {"cross_attention_layers": [1]}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_global_layers": 1,
              "attention_heads": 2, "vision_output_dim": 64, "image_size": 16, "patch_size": 8,
              "intermediate_layers_indices": [0]}  # fmt: skip
    config = transformers.MllamaConfig(text_config=text, vision_config=vision, image_token_index=256)
    return transformers.MllamaForConditionalGeneration(config)


@pytest.mark.parametrize("make", only([idefics3], [idefics3, mllama]))
def test_a_model_of_several_parts_is_compressed_part_by_part_and_comes_out_whole(
    make: Callable[[], PreTrainedModel], tmp_path: Path, tokens: Tensor
) -> None:
    torch.manual_seed(1)
    model = make().eval()
    model.save_pretrained(tmp_path / "model")
    before = vars(PreTrainedModel).get("device")
    steps = {"passes": [{"gptq": {"bits": 4, "group_size": 16}}], "allow_dense": True}
    words = tokens.clamp(4, 250)
    compress.run(steps, tmp_path / "model", tmp_path / "out", calibration=words, evaluation=words)
    assert vars(PreTrainedModel).get("device") is before
    assert model.device == torch.device("cpu")
    # Without evaluation data: on arbitrary tokens, of those that are both looked up and predicted.
    assert compress.export_to(tmp_path / "out", [compress.Hf()])["hf"]["max_logit_difference"] == 0
    loaded = type(model).from_pretrained(tmp_path / "out")
    assert loaded(input_ids=words).logits.isfinite().all()
