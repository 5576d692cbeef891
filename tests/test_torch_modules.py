"""Modules of torch beside Linear and Conv2d, in models of transformers that have them: worked on, and loaded again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from selection import only
from torch import Tensor, nn
from transformers import (
    EncodecConfig,
    EncodecModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperForConditionalGeneration,
)  # fmt: skip

import compress
from compress import ConfigError
from compress.calibration import collect
from compress.encodings import Spec, pack
from compress.runtime.conv import PackedConvolution
from compress.runtime.register import replace_modules

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
@pytest.mark.parametrize(
    "method",
    only([{"gptq": {"bits": 4}}], [{"rtn": {"bits": 4}}, {"gptq": {"bits": 4}}, {"wanda": {"sparsity": 0.5}}]),
    ids=str,
)
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


# --- attention --------------------------------------------------------------------------------------------------------


class Attending(nn.Module):
    """Attention of one tensor on itself, and a layer behind it."""

    def __init__(self, batch_first: bool = True, **options: Any):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=batch_first, **options)
        self.last = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.last(self.attention(x, x, x, need_weights=False)[0])
        return made


class Crossing(nn.Module):
    """Attention of one tensor on another, of other width where `kdim` and `vdim` say so."""

    def __init__(self, **options: Any):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True, **options)
        self.width = options.get("kdim", 16)

    def forward(self, x: Tensor) -> Tensor:
        other = x.flip(1)[..., : self.width] * 2
        made: Tensor = self.attention(x, key=other, value=other)[0]
        return made


def tokens(count: int = 24) -> Tensor:
    x = torch.randn(count, 12, 16, generator=torch.Generator().manual_seed(6))
    return x @ (torch.eye(16) + 0.9 * torch.ones(16, 16) / 4)  # channels are alike


def packed_copy(model: nn.Module, weights: dict[str, Any]) -> nn.Module:
    """A copy of a module that holds what is stored of these weights."""
    made = copy.deepcopy(model)
    parts = {name: pack(weight) for name, weight in weights.items()}
    replace_modules(made, {name: Spec.from_json(spec.to_json()) for name, (spec, _) in parts.items()})
    for name, (_, tensors) in parts.items():
        for leaf, value in tensors.items():
            dict(made.named_buffers())[f"{name}.{leaf}"].copy_(value)
        layer = dict(model.named_modules()).get(name)
        if layer is not None and layer.bias is not None:
            dict(made.named_parameters())[f"{name}.bias"].data.copy_(layer.bias)
    return made


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("pass_", [compress.Rtn(bits=3), compress.Gptq(bits=3), compress.Wanda()], ids=lambda p: p.key)
def test_attention_is_compressed_and_computes_packed_what_it_does_dense(pass_: Any, batch_first: bool) -> None:
    torch.manual_seed(1)
    model = Attending(batch_first).eval()
    result = compress.apply(model, [pass_], tokens())
    assert result.weights.keys() == {"attention.in_proj", "attention.out_proj", "last"}
    assert not result.report.fallbacks
    made = packed_copy(model, result.weights)
    assert "attention.in_proj_weight" not in dict(made.named_parameters())
    assert made.attention.in_proj_weight.shape == (48, 16)
    with torch.no_grad():
        assert torch.equal(made(tokens()), result.model(tokens()))
        assert not torch.equal(made(tokens()), model(tokens()))


@pytest.mark.parametrize("batch_first", [True, False])
def test_statistics_of_attention_are_those_of_what_is_multiplied(batch_first: bool) -> None:
    torch.manual_seed(1)
    model, x = Attending(batch_first).eval(), tokens(3)
    names = ("attention.in_proj", "attention.out_proj")
    with torch.no_grad():
        found = collect.statistics(
            dict.fromkeys(names, model.attention), dict.fromkeys(names, "gram"), [lambda: model(x)]
        )
        weights = nn.functional.linear(x, model.attention.in_proj_weight, model.attention.in_proj_bias)
        q, k, v = (part.unflatten(-1, (2, 8)) for part in weights.chunk(3, -1))
        q, k, v = ((p if batch_first else p.transpose(0, 1)).transpose(1, 2) for p in (q, k, v))
        inner = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 16)
    for name, inputs in zip(names, (x.reshape(-1, 16), inner), strict=True):
        assert found[name].tokens == 36
        assert torch.allclose(found[name].gram, inputs.T @ inputs, rtol=1e-4, atol=1e-3)


def test_gptq_loses_less_of_attention_than_rounding() -> None:
    torch.manual_seed(1)
    model = Attending().eval()
    lost = []
    for pass_ in (compress.Rtn(bits=3), compress.Gptq(bits=3)):
        with torch.no_grad():
            lost.append(float((compress.apply(model, [pass_], tokens()).model(tokens()) - model(tokens())).norm()))
    assert lost[1] < 0.8 * lost[0]


def test_attention_of_one_tensor_on_another_is_worked_on_and_the_report_says_where_nothing_was_learned() -> None:
    torch.manual_seed(1)
    result = compress.apply(Crossing().eval(), [compress.Gptq(bits=4)], tokens())
    (said,) = result.report.fallbacks
    assert said.startswith("attention.in_proj: rtn instead of gptq")
    assert said.endswith("its queries, keys and values were not one tensor")
    model = Crossing(kdim=8, vdim=8).eval()
    result = compress.apply(model, [compress.Gptq(bits=4)], tokens())
    names = {f"attention.{part}" for part in ("q_proj", "k_proj", "v_proj", "out_proj")}
    assert result.weights.keys() == names
    assert not result.report.fallbacks
    with torch.no_grad():
        assert torch.equal(packed_copy(model, result.weights)(tokens()), result.model(tokens()))


def test_an_encoder_of_torch_is_reached_whole_and_learned_block_by_block() -> None:
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.Sequential(layer, copy.deepcopy(layer)).eval()
    for pass_ in (compress.Gptq(bits=4), compress.FlexRound(bits=3, steps=10)):
        result = compress.apply(model, [pass_], tokens())
        assert len(result.weights) == 8
        assert not result.report.fallbacks
        assert set(result.report.dense) == {"norms and biases"}
        made = packed_copy(model, result.weights)
        with torch.no_grad():
            assert torch.equal(made(tokens()), result.model(tokens()))


def test_what_has_no_place_at_matrices_of_attention_is_refused() -> None:
    model = Attending().eval()
    with pytest.raises(ConfigError, match=r"attention.in_proj, attention.out_proj: .* inputs cannot be rounded"):
        compress.apply(model, [compress.Rtn(bits=8, activation_bits=8)])
    with pytest.raises(ConfigError, match=r"attention.in_proj: no layers, so they can be given no bias"):
        compress.apply(model, [compress.Rtn(bits=3), compress.Eora(rank=2, bias=True)], tokens())


# --- recurrent layers -------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """A recurrent layer, and one behind it."""

    def __init__(self, kind: Any, **options: Any):
        super().__init__()
        self.inner = kind(16, 24, **options)
        self.last = nn.Linear(24 * (2 if options.get("bidirectional") else 1), 8)

    def forward(self, x: Tensor) -> Tensor:
        made = self.inner(x)
        made = made[0] if isinstance(made, tuple) else made
        return self.last(made)  # type: ignore[no-any-return]


RECURRENT: list[tuple[Any, dict[str, Any], int]] = [  # class, options, matrices
    (nn.LSTM, {"batch_first": True, "num_layers": 2, "bidirectional": True}, 8),
    (nn.GRU, {"batch_first": True}, 2),
    (nn.RNN, {"batch_first": True, "bias": False}, 2),
    (nn.LSTMCell, {}, 2),
    (nn.GRUCell, {}, 2),
]


@pytest.mark.parametrize(("kind", "options", "count"), RECURRENT, ids=lambda v: getattr(v, "__name__", ""))
def test_recurrent_layers_are_compressed_and_compute_packed_what_they_do_dense(
    kind: Any, options: dict[str, Any], count: int
) -> None:
    torch.manual_seed(1)
    model = Recurrent(kind, **options).eval()
    x = tokens(2)[:, 0] if kind in (nn.LSTMCell, nn.GRUCell) else tokens(2)
    for pass_ in (compress.Rtn(bits=3, group_size=8), compress.Magnitude(sparsity=0.5)):
        result = compress.apply(model, [pass_])
        assert len(result.weights) == count + 1
        assert "inner.ih_l0" in result.weights or "inner.ih" in result.weights
        assert set(result.report.dense) <= {"norms and biases"}
        made = packed_copy(model, result.weights)
        with torch.no_grad():
            expected = result.model(x)
            assert not torch.equal(expected, model(x))
            assert torch.equal(made(x), expected)
            assert made.double()(x.double()).dtype == torch.float64
        held = sum(t.numel() * t.element_size() for t in getattr(made.inner, "_flat_weights", []) if t is not None)
        assert held == 0


def test_a_pass_that_learns_from_inputs_says_that_it_cannot_see_into_recurrent_layers() -> None:
    model = Recurrent(nn.LSTM, batch_first=True).eval()
    for pass_ in (compress.Gptq(), compress.Wanda(), compress.Magnitude(allocate="owl")):
        with pytest.raises(ConfigError, match=r"inner.ih_l0, inner.hh_l0: matrices of an LSTM, in which nobody sees"):
            compress.apply(model, [pass_], tokens())
    result = compress.apply(
        model, [[compress.Gptq(bits=4, include=("last",)), compress.Rtn(bits=8, include=("inner.*",))]], tokens()
    )
    assert {name: w.encoding.bits for name, w in result.weights.items()} == {
        "last": 4,
        "inner.ih_l0": 8,
        "inner.hh_l0": 8,
    }


# --- in models of transformers ----------------------------------------------------------------------------------------


def siglip() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=16, patch_size=8)).eval()


def encodec() -> Any:
    return EncodecModel(
        EncodecConfig(
            hidden_size=16, num_filters=4, num_residual_layers=1, upsampling_ratios=[4, 2], codebook_size=16,
            codebook_dim=16, target_bandwidths=[1.5], kernel_size=3, last_kernel_size=3, residual_kernel_size=3,
        )
    ).eval()  # fmt: skip


@pytest.mark.parametrize("method", [{"rtn": {"bits": 4}}, {"gptq": {"bits": 4}}], ids=str)
def test_attention_of_torch_in_a_model_loads_bit_equal(method: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(3)
    model, x = siglip(), torch.randn(6, 3, 16, 16)
    model.save_pretrained(tmp_path / "source")
    ((name, options),) = method.items()
    patterns = ["*.attention.in_proj", "*.attention.out_proj", "*.mlp.*"]
    steps = {"passes": [{name: {**options, "include": patterns}}], "allow_dense": True}
    report = compress.run(steps, tmp_path / "source", tmp_path / "out", calibration=x)
    (said,) = report.fallbacks if name == "gptq" else ["its queries, keys and values were not one tensor"]
    assert said.endswith("its queries, keys and values were not one tensor")  # a learned query looks at the image
    compress.export_to(tmp_path / "out", [compress.Hf()])
    loaded, plain = (SiglipVisionModel.from_pretrained(tmp_path / each).eval() for each in ("out", "out/hf"))
    attention = next(module for name, module in loaded.named_modules() if name.endswith("head.attention"))
    assert {name for name, _ in attention.named_parameters()} == {"in_proj_bias", "out_proj.bias"}
    with torch.no_grad():
        mine, theirs, before = (m(pixel_values=x).pooler_output for m in (loaded, plain, model))
    assert torch.equal(mine, theirs)
    assert not torch.equal(mine, before)
    with pytest.raises(compress.CompressError, match="read by a module of torch itself, such as"):
        compress.export_to(tmp_path / "out", [compress.CompressedTensors()])


def test_recurrent_layers_in_a_model_load_bit_equal(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model, x = encodec(), torch.randn(2, 1, 64)
    model.save_pretrained(tmp_path / "source")
    steps = {"passes": [{"rtn": {"bits": 4, "include": ["*.lstm.*"]}}], "allow_dense": True}
    compress.run(steps, tmp_path / "source", tmp_path / "out")
    compress.export_to(tmp_path / "out", [compress.Hf()])
    loaded, plain = (EncodecModel.from_pretrained(tmp_path / each).eval() for each in ("out", "out/hf"))
    with torch.no_grad():
        mine, theirs, before = (m.encoder(x) for m in (loaded, plain, model))
    assert torch.equal(mine, theirs)
    assert not torch.equal(mine, before)
    assert not any("lstm.weight" in name for name, _ in loaded.named_parameters())
