"""Models with several inputs: text with images, sound with text, towers that are worked on one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from commands import compress_command
from safetensors.torch import save_file
from torch import Tensor, nn

import compress
from compress import FlexRound, Gptq, Rtn, UnsupportedModelError, Wanda
from compress.errors import DataError
from compress.models import graph
from compress.models.named import predicted_tokens

SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGES = {**SIZE, "image_size": 16, "patch_size": 8}
IMAGE = 60  # the token in whose place an image stands
Sample = dict[str, Tensor]


def random(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clip() -> transformers.PreTrainedModel:
    text = {**SIZE, "vocab_size": 64, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text, vision_config=IMAGES, projection_dim=16)
    return transformers.CLIPModel(config).eval()


def pairs(count: int = 8) -> Sample:
    g = random()
    ids, images = torch.randint(3, 64, (count, 10), generator=g), torch.randn(count, 3, 16, 16, generator=g)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": images}


def llava() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    text = transformers.LlamaConfig(**SIZE, vocab_size=64)
    vision = transformers.CLIPVisionConfig(**IMAGES)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=4)
    return transformers.LlavaForConditionalGeneration(config).eval()


def pictured(*lengths: int) -> list[Sample]:
    """Texts of these lengths, each behind an image."""
    g, found = random(2), []
    for length in lengths:
        ids = torch.cat([torch.full((1, 4), IMAGE), torch.randint(3, IMAGE, (1, length), generator=g)], 1)
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids),
                      "pixel_values": torch.randn(1, 3, 16, 16, generator=g)})  # fmt: skip
    return found


def whisper() -> transformers.PreTrainedModel:
    sides = {f"{side}_{what}": n for side in ("encoder", "decoder")
             for what, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))}  # fmt: skip
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        **sides, **tokens, d_model=32, vocab_size=64, num_mel_bins=8, max_source_positions=20,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config).eval()


def spoken(count: int) -> list[Sample]:
    g = random(3)
    return [{"input_features": torch.randn(1, 8, 40, generator=g),
             "decoder_input_ids": torch.randint(3, 60, (1, 7), generator=g)} for _ in range(count)]  # fmt: skip


def errors(model: Any, data: Any, *passes: Any, **options: Any) -> list[float]:
    """Mean relative errors of the outputs."""
    results = (compress.apply(model, [p], calibration=data, evaluation=data, **options) for p in passes)
    return [result.report.rows[-1].relative_error or 0.0 for result in results]


@pytest.mark.parametrize(
    ("make", "data", "layers"),
    [(clip, pairs(), 24), pytest.param(whisper, spoken(6), 32, marks=pytest.mark.real)],
    ids=["clip", "whisper"],
)
def test_both_towers_learn_from_what_goes_with_each_other(make: Any, data: Any, layers: int) -> None:
    model = make()
    result = compress.apply(model, [Gptq(bits=3, group_size=16)], calibration=data, evaluation=data, allow_dense=True)
    assert len(result.weights) == layers
    rounded, learned = errors(model, data, Rtn(bits=3, group_size=16), Gptq(bits=3, group_size=16), allow_dense=True)
    assert learned < rounded, "statistics are those of each tower's own inputs"
    assert errors(model, data, FlexRound(bits=4, group_size=16, steps=2), allow_dense=True)[0] > 0
    assert compress.evaluate(model, data, against=model).relative_error == 0.0


def test_a_model_of_text_and_images_learns_from_texts_of_any_length_with_their_images() -> None:
    model, data = llava(), pictured(8, 12, 8, 10)
    both = compress.apply(
        model, [Gptq(bits=4, group_size=16)], calibration=data, evaluation=data, towers=["language", "vision"],
        allow_dense=True,
    )  # fmt: skip
    assert len(both.weights) == 14 + 12
    row = both.report.rows[-1]
    assert row.perplexity is not None
    assert row.kl is not None
    language = compress.apply(model, [Wanda(sparsity=0.5)], calibration=data, evaluation=data, allow_dense=True)
    assert len(language.weights) == 14
    assert language.report.dense["the vision tower"] > 0
    assert "left dense" in compress.report.report.caption(language.report)
    with pytest.raises(UnsupportedModelError, match="no tower 'audio'; it has"):
        compress.apply(model, [Rtn()], towers=["audio"])


def test_the_language_alone_learns_from_text_alone() -> None:
    text = torch.randint(3, IMAGE, (4, 12), generator=random())
    result = compress.apply(llava(), [Gptq(bits=4, group_size=16)], calibration=text, evaluation=text, allow_dense=True)
    assert len(result.weights) == 14


def test_perplexity_is_that_of_the_text_and_not_of_the_places_of_images() -> None:
    model, (sample,) = llava(), pictured(9)
    wanted = predicted_tokens(model, sample)
    assert (wanted[0, :4] == -100).all()
    assert torch.equal(wanted[0, 4:], sample["input_ids"][0, 4:])
    with torch.no_grad():
        logits = model(**sample).logits[0, 3:-1]
    loss = torch.nn.functional.cross_entropy(logits, sample["input_ids"][0, 4:]).exp().item()
    assert compress.evaluate(model, [sample]).perplexity == pytest.approx(loss, rel=1e-5)


def test_towers_of_several_models_are_found_by_where_their_lists_lie() -> None:
    names = {type(model).__name__: [t.name for t in graph.find(model).towers] for model in (clip(), llava(), whisper())}
    assert names == {
        "CLIPModel": ["language", "vision"],
        "LlavaForConditionalGeneration": ["vision", "language"],
        "WhisperForConditionalGeneration": ["encoder", "decoder"],
    }


def test_a_folder_is_compressed_and_loads_as_what_it_was(tmp_path: Path) -> None:
    llava().save_pretrained(tmp_path / "in")
    steps = {"passes": [{"gptq": {"bits": 4, "group_size": 16}}], "towers": ["vision", "language"], "allow_dense": True}
    data = pictured(8, 9)
    report = compress.run(steps, tmp_path / "in", tmp_path / "out", calibration=data, evaluation=data)
    assert report.verified["max_logit_difference"] == 0.0
    found: Any = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    loaded, info = found
    assert type(loaded).__name__ == "LlavaForConditionalGeneration"
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    again = compress.run(steps, tmp_path / "in", tmp_path / "out", calibration=data, evaluation=data)
    assert [row.perplexity for row in again.rows] == [row.perplexity for row in report.rows]


def test_a_file_may_hold_inputs_by_name(tmp_path: Path) -> None:
    clip().save_pretrained(tmp_path / "in")
    save_file(pairs(), tmp_path / "pairs.safetensors")
    pipeline = tmp_path / "p.yaml"
    source = f"{{source: {tmp_path / 'pairs.safetensors'}, samples: 6}}"
    pipeline.write_text(
        f"calibration: {source}\nevaluate: {source}\nallow_dense: true\n"
        "passes: [{gptq: {bits: 4, group_size: 16}}]\n"
    )
    ended = compress_command("run", pipeline, tmp_path / "in", "-o", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert "error" in ended.out
    assert "cosine" in ended.out


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (torch.randint(3, 60, (4, 10)), "called with text and images, and calibration has one input"),
        ({**pairs(4), "input_ids": torch.full((4, 10), 70)}, r"token ids outside 0\.\.63, such as 70"),
        ({**pairs(4), "pixel_values": torch.full((4, 3, 16, 16), torch.nan)}, "pixel_values holds NaN or infinity"),
        ({**pairs(4), "pixel_values": torch.zeros(5, 3, 16, 16)}, "some inputs have no entry for each"),
        ([{**pairs(1), "sound": torch.zeros(1, 3)}], "has sound, which CLIPModel does not take"),
    ],
    ids=["text alone", "unknown token", "NaN", "one image more", "another input"],
)
def test_what_does_not_fit_is_said_before_any_work(data: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        compress.apply(clip(), [Gptq()], calibration=data, allow_dense=True)


def test_samples_of_different_lengths_cannot_be_mixed_to_learn_from() -> None:
    passes = [FlexRound(bits=4, group_size=16, steps=2)]
    with pytest.raises(UnsupportedModelError, match="other arguments from batch to batch"):
        compress.apply(llava(), passes, calibration=pictured(8, 12), allow_dense=True)


def test_passes_over_whole_models_want_one_input() -> None:
    passes = [Wanda(sparsity=0.5), compress.Perp(steps=1)]
    with pytest.raises(DataError, match="perp learns from tokens or images alone"):
        compress.apply(llava(), passes, calibration=pictured(8, 8), allow_dense=True)


def test_batch_norms_want_samples_that_run_in_batches() -> None:
    model = clip()
    model.visual_projection = nn.Sequential(nn.Linear(32, 16), nn.BatchNorm1d(16))
    with pytest.raises(DataError, match="recalibrate_norms counts what batches of samples have together"):
        compress.apply(model, [compress.RecalibrateNorms(batch_size=4)], calibration=pairs(8))
