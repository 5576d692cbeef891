"""Modules of torch beside Linear and Conv2d, in models of transformers that have them: worked on, and loaded again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC, WhisperConfig, WhisperForConditionalGeneration

import compress
from compress.runtime.conv import PackedConvolution

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


def whisper() -> Any:
    config = WhisperConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=24,
        max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config).eval()


def wav2vec2() -> Any:
    config = Wav2Vec2Config(
        vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        conv_dim=(16, 16), conv_kernel=(10, 4), conv_stride=(5, 4), num_feat_extract_layers=2,
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, feat_extract_norm="group",
    )  # fmt: skip
    return Wav2Vec2ForCTC(config).eval()


CASES: dict[str, tuple[Any, Tensor, str, int]] = {  # model, inputs, pattern of convolutions, how many there are
    "whisper": (whisper, torch.randn(8, 8, 48), "*.conv?", 2),
    "wav2vec2": (wav2vec2, torch.randn(8, 800), "*.conv_layers.*.conv", 2),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", [{"rtn": {"bits": 4}}, {"gptq": {"bits": 4}}, {"wanda": {"sparsity": 0.5}}], ids=str)
def test_convolutions_over_time_are_compressed_and_load_bit_equal(
    case: str, method: dict[str, Any], tmp_path: Path
) -> None:
    build, x, pattern, count = CASES[case]
    torch.manual_seed(3)
    model = build()
    model.save_pretrained(tmp_path / "source")
    ((name, options),) = method.items()
    steps = {"passes": [{name: {**options, "include": [pattern]}}], "allow_dense": True}
    compress.run(steps, tmp_path / "source", tmp_path / "out", calibration=x)
    compress.export_to(tmp_path / "out", [compress.Hf()])
    loaded, plain = (type(model).from_pretrained(tmp_path / each).eval() for each in ("out", "out/hf"))
    packed = [n for n, m in loaded.named_modules() if isinstance(m, PackedConvolution)]
    assert len(packed) == count
    extra = {"decoder_input_ids": torch.ones(8, 3, dtype=torch.long)} if case == "whisper" else {}
    with torch.no_grad():
        mine, theirs, before = (m(x, **extra).logits for m in (loaded, plain, model))
    assert torch.equal(mine, theirs)
    assert not torch.equal(mine, before)
    for each in packed:
        assert not torch.equal(plain.get_submodule(each).weight, model.get_submodule(each).weight), each


@pytest.mark.parametrize("name", ["whisper", "wav2vec2"])
def test_gptq_fits_the_outputs_of_convolutions_over_time_better_than_rounding(name: str) -> None:
    build, x, pattern, _ = CASES[name]
    torch.manual_seed(3)
    model = build()
    first = "model.encoder.conv1" if name == "whisper" else "wav2vec2.feature_extractor.conv_layers.0.conv"
    lost = []
    seen = nn.functional.avg_pool1d(x, 5, stride=1, padding=2)  # neighbours are alike
    for pass_ in (compress.Rtn(bits=3, include=(pattern,)), compress.Gptq(bits=3, include=(pattern,))):
        made = compress.apply(model, [pass_], seen, allow_dense=True).model
        inputs = seen if name == "whisper" else seen[:, None]
        with torch.no_grad():
            change = made.get_submodule(first)(inputs) - model.get_submodule(first)(inputs)
        lost.append(float(change.square().sum()))
    assert lost[1] < 0.9 * lost[0]
