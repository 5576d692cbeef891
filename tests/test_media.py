"""Rows of files that name images and sounds: read, made into inputs by a model's own processor, or refused."""

from __future__ import annotations

import json
import wave
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers
from commands import compress_command, make_text_model
from PIL import Image
from selection import only
from tokenizers import Tokenizer, models, pre_tokenizers

import compress
from compress.api.data import Reader, read_data
from compress.calibration.data import Dataset
from compress.calibration.media import Medium, read_sound
from compress.calibration.rows import holds_media
from compress.config.pipeline import Calibration
from compress.errors import DataError, UnsupportedModelError
from compress.models import graph

SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGES = {**SIZE, "image_size": 16, "patch_size": 8}
SQUARE = {"height": 16, "width": 16}
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "user", "assistant", ":", *"abcdefghijklmnopqrstuvwxyz"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
)
Maker = Callable[..., Path]


def tokenizer(**options: Any) -> Any:
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special, **options)


def clip_images() -> Any:
    return transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=SQUARE)


def make_llava(folder: Path, template: str | None = TEMPLATE) -> Path:
    torch.manual_seed(0)
    text = transformers.LlamaConfig(**SIZE, vocab_size=len(WORDS))
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**IMAGES), text_config=text, image_token_id=4, image_seq_length=4
    )
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    transformers.LlavaProcessor(
        image_processor=clip_images(), tokenizer=tokenizer(extra_special_tokens={"image_token": "<image>"}),
        patch_size=8, vision_feature_select_strategy="default", image_token="<image>", num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def make_vit(folder: Path) -> Path:
    torch.manual_seed(0)
    names = {0: "cat", 1: "dog", 2: "owl"}
    config = transformers.ViTConfig(**IMAGES, num_labels=3, id2label=names, label2id={v: k for k, v in names.items()})
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    transformers.ViTImageProcessorPil(size=SQUARE).save_pretrained(folder)
    return folder


def make_clip(folder: Path) -> Path:
    text = {**SIZE, "vocab_size": len(WORDS), "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text, vision_config=IMAGES, projection_dim=16)
    transformers.CLIPModel(config).save_pretrained(folder)
    transformers.CLIPProcessor(image_processor=clip_images(), tokenizer=tokenizer()).save_pretrained(folder)
    return folder


def make_wav2vec2(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        **SIZE, vocab_size=len(WORDS), conv_dim=[32, 32], conv_stride=[5, 2], conv_kernel=[10, 3],
        num_feat_extract_layers=2, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
    )  # fmt: skip
    transformers.Wav2Vec2ForCTC(config).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(sampling_rate=16000).save_pretrained(folder)
    return folder


def make_whisper(folder: Path) -> Path:
    sides = {f"{side}_{what}": n for side in ("encoder", "decoder")
             for what, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))}  # fmt: skip
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        **sides, d_model=32, vocab_size=len(WORDS), num_mel_bins=8, max_source_positions=50, max_target_positions=12,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip
    transformers.WhisperForConditionalGeneration(config).save_pretrained(folder)
    extractor = transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1, n_fft=400, hop_length=160)
    extractor.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def picture(path: Path, seed: int, width: int = 24, height: int = 20) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    numbers = numpy.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=numpy.uint8)
    Image.fromarray(numbers).save(path)
    return path


def sound(path: Path, seed: int, rate: int = 16000, length: int = 800, width: int = 2, channels: int = 1) -> Path:
    numbers = numpy.random.default_rng(seed).integers(-9999, 9999, (length, channels), dtype=numpy.int16)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(numbers.tobytes() if width == 2 else bytes(length * channels * width))
    return path


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pictured(folder: Path, count: int, **more: list[Any]) -> Path:
    """Rows that name images by their paths from the file on."""
    folder.mkdir(exist_ok=True, parents=True)
    for i in range(count):
        picture(folder / "images" / f"{i}.png", i)
    extra = [{key: values[i % len(values)] for key, values in more.items()} for i in range(count)]
    return lines(folder / "rows.jsonl", [{"image": f"images/{i}.png", **extra[i]} for i in range(count)])


def read(model: Path, source: Path, samples: int = 0, **options: Any) -> Dataset:
    section = Calibration(source=str(source), samples=samples, **options)
    opened = compress.checkpoint.opening.open_model(model)
    return read_data(section, Reader(opened.tokenizer, opened.artifact.graph.model, opened.folder), "calibration")


def pipeline(folder: Path, source: Path, samples: int = 4, **more: Any) -> Path:
    section = {"source": str(source), "samples": samples}
    steps = {"calibration": section, "evaluate": section, "allow_dense": True,
             "passes": [{"gptq": {"bits": 4, "group_size": 16}}], **more}  # fmt: skip
    path = folder / "pipeline.yaml"
    path.write_text(json.dumps(steps))
    return path


# --- what rows become ------------------------------------------------------------------------------------------------


def test_images_become_what_the_model_s_own_processor_makes_of_them(tmp_path: Path) -> None:
    folder, rows = make_vit(tmp_path / "vit"), pictured(tmp_path / "data", 5, label=[0, "dog", 2])
    found = read(folder, rows)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    images = [Image.open(tmp_path / "data" / "images" / f"{i}.png") for i in range(5)]
    assert torch.equal(found.inputs, processor(images=images, return_tensors="pt")["pixel_values"])
    assert found.labels is not None
    assert found.labels.tolist() == [0, 1, 2, 0, 1]


def test_a_table_with_the_bytes_of_images_reads_as_rows_with_their_paths_do(tmp_path: Path) -> None:
    folder, rows = make_vit(tmp_path / "vit"), pictured(tmp_path / "data", 5)
    paths = [str(tmp_path / "data" / "images" / f"{i}.png") for i in range(5)]
    held = [{"bytes": Path(path).read_bytes(), "path": None} for path in paths]
    for name, column in (("held", held), ("named", [{"bytes": None, "path": p} for p in paths]), ("paths", paths)):
        pyarrow.parquet.write_table(pyarrow.table({"image": column, "n": [*range(5)]}), tmp_path / f"{name}.parquet")
        assert torch.equal(read(folder, tmp_path / f"{name}.parquet").inputs, read(folder, rows).inputs)
    array = tmp_path / "rows.json"
    array.write_text(json.dumps([{"image": path} for path in paths]))
    assert torch.equal(read(folder, array).inputs, read(folder, rows).inputs)


def test_samples_are_spread_evenly_over_the_rows(tmp_path: Path) -> None:
    folder, rows = make_vit(tmp_path / "vit"), pictured(tmp_path / "data", 7)
    every = read(folder, rows).inputs
    assert torch.equal(read(folder, rows, samples=3).inputs, every[[0, 2, 4]])
    with pytest.raises(DataError, match="holds 7 rows; 8 were asked for"):
        read(folder, rows, samples=8)


def test_a_text_with_an_image_is_a_chat_where_the_processor_has_a_template(tmp_path: Path) -> None:
    folder = make_llava(tmp_path / "llava")
    picture(tmp_path / "one.png", 1)
    picture(tmp_path / "two.png", 2, width=40)
    image = {"type": "image", "image": "one.png"}
    said = {"role": "assistant", "content": [{"type": "text", "text": "c"}]}
    rows = [
        {"image": "one.png", "text": "a b"},
        {"messages": [{"role": "user", "content": [image, {"type": "text", "text": "a b"}]}]},
        {
            "image": "one.png",
            "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a b"}]}],
        },
        {"image": "one.png", "messages": [{"role": "user", "content": "a b"}]},
        {"image": "one.png", "text": "user : <image> a b"},
        {"images": ["one.png", "two.png"], "messages": [{"role": "user", "content": "a"}, said]},
        {"text": "a b"},
    ]
    first, *others, two, bare = read(folder, lines(tmp_path / "rows.jsonl", rows)).named
    words = [WORDS[i] for i in first["input_ids"][0]]
    assert words == ["user", ":", *["<image>"] * 4, "a", "b"]
    assert first["pixel_values"].shape == (1, 3, 16, 16)
    for other in others:
        assert torch.equal(other["input_ids"], first["input_ids"])
        assert torch.equal(other["pixel_values"], first["pixel_values"])
    assert two["pixel_values"].shape == (2, 3, 16, 16)
    assert [WORDS[i] for i in two["input_ids"][0]] == ["user", ":", *["<image>"] * 8, "a", "assistant", ":", "c"]
    assert "pixel_values" not in bare


def test_without_a_template_an_image_stands_in_front_of_its_text(tmp_path: Path) -> None:
    folder = make_llava(tmp_path / "llava", template=None)
    (sample,) = read(folder, pictured(tmp_path / "data", 1, text=[" a b"])).named
    assert [WORDS[i] for i in sample["input_ids"][0]] == [*["<image>"] * 4, "a", "b"]
    chat = lines(
        tmp_path / "chat.jsonl", [{"messages": [{"role": "user", "content": "a"}], "image": "data/images/0.png"}]
    )
    with pytest.raises(DataError, match="no chat template"):
        read(folder, chat)


@pytest.mark.parametrize(
    ("section", "make"),
    [("Qwen2VLConfig", "Qwen2VLProcessor"), ("Qwen3VLConfig", "Qwen3VLProcessor")],
)
def test_a_processor_that_has_one_for_videos_works_without_torchvision(section: str, make: str, tmp_path: Path) -> None:
    pixels = {"min_pixels": 28 * 28, "max_pixels": 28 * 28 * 4, "patch_size": 14}
    transformers.Qwen2VLImageProcessorPil(**pixels).save_pretrained(tmp_path)
    places = {"image_token": "<image>", "video_token": "w", "vision_start_token": "u", "vision_end_token": "v"}
    tokenizer(extra_special_tokens=places).save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": make}))
    config = getattr(transformers, section)(
        text_config={**SIZE, "vocab_size": len(WORDS), "num_key_value_heads": 4, "head_dim": 8}, image_token_id=4
    )
    with torch.device("meta"):
        model = getattr(transformers, section.replace("Config", "ForConditionalGeneration"))(config)
    rows = pictured(tmp_path / "data", 2, text=["u <image> v a b"])
    data = read_data(Calibration(source=str(rows), samples=2), Reader(tmp_path, model), "calibration")
    sample = data.named[0]
    assert sample["image_grid_thw"].tolist() == [[1, 2, 2]]
    assert sample["pixel_values"].shape[0] == 4
    assert int((sample["input_ids"] == 4).sum()) == 1


def test_sounds_become_what_the_feature_extractor_makes_of_them(tmp_path: Path) -> None:
    folder = make_wav2vec2(tmp_path / "model")
    sound(tmp_path / "a.wav", 1)
    sound(tmp_path / "b.wav", 2, length=900, channels=2)
    rows = lines(tmp_path / "rows.jsonl", [{"audio": "a.wav"}, {"audio": "b.wav"}])
    first, second = read(folder, rows).named
    with wave.open(str(tmp_path / "a.wav")) as file:
        numbers = numpy.frombuffer(file.readframes(800), dtype="<i2").astype(numpy.float32) / 32768
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    assert torch.equal(first["input_values"], extractor(numbers, sampling_rate=16000, return_tensors="pt").input_values)
    assert second["input_values"].shape == (1, 900)
    whisper = make_whisper(tmp_path / "whisper")
    (spoken, silent) = read(
        whisper, lines(tmp_path / "said.jsonl", [{"audio": "a.wav", "text": "a b c"}, {"audio": "b.wav"}])
    ).named
    assert spoken["input_features"].shape == (1, 8, 100)
    assert [WORDS[i] for i in spoken["decoder_input_ids"][0]] == ["<s>", "a", "b"]
    assert "decoder_input_ids" not in silent


# --- whole runs ------------------------------------------------------------------------------------------------------


def test_rows_calibrate_and_judge_an_image_classifier(tmp_path: Path) -> None:
    folder, rows = make_vit(tmp_path / "vit"), pictured(tmp_path / "data", 6, label=["cat", "dog", "owl"])
    steps = pipeline(tmp_path, rows)
    planned = compress_command("plan", steps, folder)
    assert planned.code == 0, planned.err
    assert "4 of 6 rows" in planned.out
    assert "4 images, 4 labels" in planned.out
    report = compress.run(steps, folder, tmp_path / "out")
    assert report.rows[-1].accuracy is not None
    images = read(folder, rows, samples=4)
    given = compress.run(
        steps, folder, tmp_path / "given", calibration=images.inputs, evaluation=(images.inputs, images.labels)
    )
    assert [row.accuracy for row in given.rows] == [row.accuracy for row in report.rows]
    assert [row.kl for row in given.rows] == [row.kl for row in report.rows]
    measured = compress_command("eval", tmp_path / "out", "--against", folder, "--source", rows, "--samples", 4)
    assert measured.code == 0, measured.err
    assert "accuracy" in measured.out


def test_the_result_hangs_on_what_the_images_show_and_not_on_their_names(tmp_path: Path) -> None:
    folder, rows = make_vit(tmp_path / "vit"), pictured(tmp_path / "data", 4)
    steps = pipeline(tmp_path, rows)
    first = compress.run(steps, folder, tmp_path / "out")
    written = (tmp_path / "out" / "report.json").stat().st_mtime_ns
    again = compress.run(steps, folder, tmp_path / "out")
    assert again.verified == first.verified
    assert (tmp_path / "out" / "report.json").stat().st_mtime_ns == written, "it is the same run: nothing was done"
    picture(tmp_path / "data" / "images" / "2.png", 99)
    with pytest.raises(compress.UsageError, match="not the result of this run"):
        compress.run(steps, folder, tmp_path / "out")


def test_both_towers_learn_from_rows_with_images(tmp_path: Path) -> None:
    folder, rows = make_llava(tmp_path / "llava"), pictured(tmp_path / "data", 6, text=["a b c", "d e", "f"])
    steps = pipeline(tmp_path, rows, towers=["language", "vision"])
    planned = compress_command("plan", steps, folder)
    assert "4 of 6 rows" in planned.out, planned.err
    assert "4 images, 4 texts" in planned.out
    report = compress.run(steps, folder, tmp_path / "out")
    samples = list(read(folder, rows, samples=4).named)
    given = compress.run(steps, folder, tmp_path / "given", calibration=samples, evaluation=samples)
    assert [row.perplexity for row in given.rows] == [row.perplexity for row in report.rows]
    assert report.data["windows"] == 4
    assert "protocol" not in report.data
    measured = compress_command("eval", tmp_path / "out", "--against", folder, "--source", rows, "--samples", 4)
    assert measured.code == 0, measured.err
    assert "4 rows" in measured.out
    assert f"{report.rows[-1].perplexity:.3f}" in measured.out


def test_a_file_without_images_is_a_text_to_a_model_of_both(tmp_path: Path) -> None:
    folder = make_llava(tmp_path / "llava")
    text = lines(tmp_path / "text.jsonl", [{"text": "a b c d e f g h " * 4}] * 4)
    data = read(folder, text, samples=2, length=16)
    assert data.inputs.shape == (2, 16)
    assert not data.named


@pytest.mark.parametrize("place", [16, 19, 40, 43])
def test_a_damaged_header_of_a_sound_is_one_sentence(place: int, tmp_path: Path) -> None:
    sound(tmp_path / "a.wav", 1)
    data = bytearray((tmp_path / "a.wav").read_bytes())
    data[place] = 0xFF
    (tmp_path / "a.wav").write_bytes(data)
    medium = Medium("a.wav", tmp_path / "a.wav")
    with suppress(DataError):  # some damage still leaves a sound; nothing else is raised
        read_sound(medium, 16000)


def test_columns_of_nothing_are_no_media(tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["a b", "c d"], "image": pyarrow.array([None, None], pyarrow.string())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert not holds_media(str(tmp_path / "a.parquet"), "text")
    later = table.set_column(1, "image", pyarrow.array([None, "b.png"], pyarrow.string()))
    pyarrow.parquet.write_table(later, tmp_path / "b.parquet")
    assert holds_media(str(tmp_path / "b.parquet"), "text")


@pytest.mark.parametrize(
    "make",
    only([make_whisper], [make_clip, make_wav2vec2, make_whisper]),
    ids=["clip", "wav2vec2", "whisper"],
)
def test_models_of_several_kinds_learn_from_their_rows(make: Maker, tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    if make is make_clip:
        rows = pictured(tmp_path / "data", 4, text=["a b", "c", "d e f"])
    else:
        names = [sound(tmp_path / f"{i}.wav", i, length=800 + 100 * i).name for i in range(4)]
        rows = lines(tmp_path / "rows.jsonl", [{"audio": name, "text": "a b"} for name in names])
    gptq = {"bits": 4, "group_size": 16, "include": ["*encoder.layers*"] if make is make_wav2vec2 else []}
    report = compress.run(pipeline(tmp_path, rows, passes=[{"gptq": gptq}]), folder, tmp_path / "out")
    assert 0 < (report.rows[-1].relative_error or 0) < 1
    measured = compress_command("eval", tmp_path / "out", "--against", folder, "--source", rows, "--samples", 4)
    assert measured.code == 0, measured.err
    assert "error" in measured.out


# --- what is refused -------------------------------------------------------------------------------------------------


REFUSED: list[tuple[str, Maker, Any, str]] = [
    ("missing file", make_vit, {"image": "nowhere.png"}, r"rows\.jsonl:3: 'image' names .*nowhere\.png.*no such file"),
    ("no image", make_vit, {"picture": "0.png"}, r"rows\.jsonl:3 names no image.*it has picture"),
    ("no object", make_vit, ["images/0.png"], r"rows\.jsonl:3 is a list"),
    ("two images", make_vit, {"images": ["images/0.png", "images/0.png"]}, "names 2 images.*takes one at a time"),
    ("not an image", make_vit, {"image": "rows.jsonl"}, r"rows\.jsonl:3: .*no image that Pillow knows"),
    ("an address", make_vit, {"image": "https://a.b/c.png"}, "is the address https://a.b/c.png, and nothing"),
    ("a number", make_vit, {"image": 3}, "is a number; it must be the path"),
    ("no class", make_vit, {"image": "images/0.png", "label": "fox"}, "label 'fox' is none of the 3 classes"),
    ("one label more", make_vit, {"image": "images/0.png", "label": 1}, "has no label, and 1 of 3 rows have"),
    ("sound", make_vit, {"audio": "0.wav"}, "names a sound, and a ViTForImageClassification takes none"),
    ("no text", make_llava, {"image": "images/0.png"}, r"rows\.jsonl:3 has no text.*it has image"),
    ("a place more", make_llava, {"image": "images/0.png", "text": "<image> <image> a"}, "holds 1 of image, and"),
    ("a place too few", make_llava, {"images": ["images/0.png"] * 2, "text": "<image> a"}, "holds 2 of image, and its"),
    ("no image to show", make_clip, {"text": "a"}, "names no image, and a CLIPModel needs one"),
    ("long text", make_clip, {"image": "images/0.png", "text": "a " * 40}, "becomes 40 tokens, and the model has 16"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "row", "words"), [each[1:] for each in REFUSED], ids=[each[0] for each in REFUSED])
def test_a_row_that_cannot_be_used_is_named(make: Maker, row: Any, words: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    more: dict[str, list[Any]] = {} if make is make_vit else {"text": ["a"]}
    more = {"label": [0]} if row == {"image": "images/0.png", "label": "fox"} else more
    rows = pictured(tmp_path / "data", 2, **more)
    sound(tmp_path / "data" / "0.wav", 1)
    rows.write_text(rows.read_text() + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=words):
        read(folder, rows)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"rate": 8000}, "has 8000 samples a second, and the model is made for 16000"), ({"width": 1}, "8 bits")],
)
def test_sounds_are_not_resampled(change: dict[str, int], words: str, tmp_path: Path) -> None:
    sound(tmp_path / "a.wav", 1, **change)
    rows = lines(tmp_path / "rows.jsonl", [{"audio": "a.wav"}])
    with pytest.raises(DataError, match=words):
        read(make_wav2vec2(tmp_path / "model"), rows)
    (tmp_path / "a.wav").write_bytes(b"ID3")
    with pytest.raises(DataError, match=r"a\.wav is no \.wav file"):
        read(make_wav2vec2(tmp_path / "model"), rows)


def test_an_image_that_is_cut_off_is_named(tmp_path: Path) -> None:
    folder, rows = make_vit(tmp_path / "vit"), pictured(tmp_path / "data", 2)
    cut = tmp_path / "data" / "images" / "1.png"
    cut.write_bytes(cut.read_bytes()[:400])
    with pytest.raises(DataError, match=r"rows\.jsonl:2: .*1\.png is an image that cannot be read"):
        read(folder, rows)


@pytest.mark.parametrize("command", ["check", "plan"])
def test_what_is_missing_is_said_before_a_run(command: str, tmp_path: Path) -> None:
    folder, rows = make_vit(tmp_path / "vit"), pictured(tmp_path / "data", 4)
    steps = pipeline(tmp_path, rows)
    assert compress_command(command, steps, folder).code == 0
    (tmp_path / "data" / "images" / "3.png").unlink()
    ended = compress_command(command, steps, folder)
    assert ended.code == 2
    assert "rows.jsonl:4: 'image' names" in ended.err
    (folder / "preprocessor_config.json").unlink()  # found before rows are read
    assert "has no processor" in compress_command(command, steps, folder).err


def test_missing_pillow_is_said_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, rows = make_vit(tmp_path / "vit"), pictured(tmp_path / "data", 2)
    monkeypatch.setitem(__import__("sys").modules, "PIL.Image", None)
    with pytest.raises(DataError, match=r"pip install 'compress-pipeline\[images\]'"):
        read(folder, rows)


def test_a_model_of_text_takes_no_images(tmp_path: Path) -> None:
    folder, rows = make_text_model(tmp_path / "text"), pictured(tmp_path / "data", 4)
    ended = compress_command("plan", pipeline(tmp_path, rows), folder)
    assert ended.code == 2
    assert "LlamaForCausalLM takes neither" in ended.err


# --- towers of models that have one ----------------------------------------------------------------------------------


def test_the_one_tower_of_a_language_model_is_the_language(tmp_path: Path) -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZE, vocab_size=64))
    whole = graph.find(model)
    assert graph.chosen(whole, ["language"]) is whole
    with pytest.raises(UnsupportedModelError, match=r"has no tower 'vision'; it has 'language'$"):
        graph.chosen(whole, ["vision"])
    with pytest.raises(UnsupportedModelError, match=r"has no tower 'vision'; it has 'language'$"):
        graph.chosen(whole, ["language", "vision"])
