"""`compress export` and `compress eval --runtime`: other containers of a finished folder."""

import json
from pathlib import Path
from typing import Any

import pytest
from commands import compress_command
from selection import only
from written import data_for, write

import compress
from compress import ConfigError, Eora, Hf, Onnx, Peft, Rtn, UsageError
from compress.config.reading import exporters, parse
from compress.config.writing import dump
from compress.errors import CompressError
from compress.export import EXPORTERS, hf


@pytest.fixture(scope="module")
def demo_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in 4 bits; to be read, or exported to formats of which each test has its own."""
    out = tmp_path_factory.mktemp("exporting") / "out"
    data = {"evaluate": {"source": "demo", "samples": 2, "length": 64}}
    compress.run({**data, "passes": [{"rtn": {"bits": 4, "group_size": 64}}]}, "demo", out)
    return out


def report_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


def test_what_is_exported_later_equals_what_the_run_exports(tmp_path: Path) -> None:
    for name in ("early", "late"):
        (tmp_path / name).mkdir()
    passes = [Rtn(bits=3), Eora(rank=2)]
    write("llama", tmp_path / "early", passes, "hf", "peft")
    write("llama", tmp_path / "late", passes)
    compress.export_to(tmp_path / "late" / "out", [Hf(), Peft()])
    for file in ("hf/model.safetensors", "peft/adapter_model.safetensors", "peft/base/model.safetensors"):
        assert (tmp_path / "early/out" / file).read_bytes() == (tmp_path / "late/out" / file).read_bytes()


def test_the_export_is_noted_in_the_report_and_the_run_still_counts_as_finished(tmp_path: Path) -> None:
    write("llama", tmp_path, [Rtn(bits=4)])
    before = report_of(tmp_path / "out")
    found = compress.export_to(tmp_path / "out", [Hf()])
    after = report_of(tmp_path / "out")
    assert after["verified"] == before["verified"] | found
    assert after["rows"] == before["rows"]
    assert write("llama", tmp_path, [Rtn(bits=4)]).verified["hf"]["max_logit_difference"] == 0
    assert not (tmp_path / "out.work").exists()


def test_exporting_again_replaces_the_folder(tmp_path: Path) -> None:
    write("llama", tmp_path, [Rtn(bits=4)], "hf")
    (tmp_path / "out" / "hf" / "model.safetensors").write_bytes(b"damaged")
    compress.export_to(tmp_path / "out", [Hf()])
    assert (tmp_path / "out" / "hf" / "model.safetensors").stat().st_size > 1000


def test_a_failed_export_leaves_the_one_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("llama", tmp_path, [Rtn(bits=4)], "hf")
    before = (tmp_path / "out" / "hf" / "model.safetensors").read_bytes()

    def failing(*_: object) -> None:
        raise CompressError("no")

    monkeypatch.setattr(hf, "verify_dense", failing)
    with pytest.raises(CompressError, match="no"):
        compress.export_to(tmp_path / "out", [Hf()])
    assert (tmp_path / "out" / "hf" / "model.safetensors").read_bytes() == before
    assert not (tmp_path / "out.work").exists()


def test_without_evaluation_data_arbitrary_tokens_are_compared(tmp_path: Path) -> None:
    write("llama", tmp_path, [Rtn(bits=4)])  # evaluated on tokens from Python, which are gone
    found = compress.export_to(tmp_path / "out", [Hf()])["hf"]
    assert found["compared_on"] == [2, 128]
    assert found["max_logit_difference"] == 0


def test_evaluation_data_are_read_again(demo_out: Path) -> None:
    found = compress.export_to(demo_out, [Hf()])["hf"]
    assert found["compared_on"] == [2, 64]
    assert found["perplexity"] == pytest.approx(report_of(demo_out)["rows"][-1]["perplexity"], rel=1e-6)


def test_what_a_format_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    write("llama", tmp_path, [Rtn(bits=4, activation_bits=8)])
    with pytest.raises(ConfigError, match=r"export\.hf: plain weights .*\n.*export\.peft: plain weights"):
        compress.export_to(tmp_path / "out", [Hf(), Peft()])
    assert not (tmp_path / "out" / "hf").exists()


def test_a_folder_that_is_no_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a finished folder that compress wrote"):
        compress.export_to(tmp_path, [Hf()])
    ended = compress_command("export", tmp_path, "--to", "hf")
    assert ended.code == 2
    assert "not a finished folder" in ended.err


@pytest.mark.real
def test_the_command_says_what_was_compared(demo_out: Path) -> None:
    ended = compress_command("export", demo_out, "--to", "onnx:accuracy_level=4")
    assert ended.code == 0, ended.err
    assert "tensors read back equal; reloaded model's logits differ by" in ended.out
    assert "as shipped by" in ended.out
    data = ("--source", "demo", "--samples", 2, "--length", 64)
    measured = compress_command("eval", demo_out / "onnx", "--runtime", "onnxruntime", "--against", "demo", *data)
    assert measured.code == 0, measured.err
    assert "of memory to load" in measured.out
    assert "tokens per second" in measured.out
    found = json.loads(compress_command("eval", demo_out / "onnx", "--runtime", "onnxruntime", *data, "--json").out)
    packed = json.loads(compress_command("eval", demo_out, *data, "--json").out)
    assert found["perplexity"] == pytest.approx(packed["perplexity"], rel=0.01)
    assert found["tokens"] == packed["tokens"]
    assert found["bytes"] == sum(file.stat().st_size for file in (demo_out / "onnx").glob("model.onnx*"))
    assert found["tokens_per_second"] > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("no-such-folder", "--runtime", "onnxruntime"), "no such file or folder: no-such-folder"),
        (("demo", "--runtime", "onnx"), "--runtime onnx: known: transformers, onnxruntime"),
    ],
)
def test_eval_says_what_it_cannot_measure(arguments: tuple[str, ...], said: str) -> None:
    ended = compress_command("eval", *arguments)
    assert ended.code == 2
    assert said in ended.err


def test_eval_of_a_folder_without_one_file_says_so(demo_out: Path) -> None:
    ended = compress_command("eval", demo_out, "--runtime", "onnxruntime")
    assert ended.code == 2
    assert "0 .onnx files" in ended.err


def test_formats_on_the_command_line_take_options() -> None:
    assert exporters(["hf", "onnx:style=qdq"]) == (Hf(), Onnx(style="qdq"))
    assert exporters(["onnx:accuracy_level=1, mode=fast"]) == (Onnx(accuracy_level=1, mode="fast"),)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("onxx", "did you mean onnx"),
        ("onnx:stile=qdq", "did you mean style"),
        ("onnx:accuracy_level=3", "accuracy_level: 3 is not 1 or 4"),
        ("safetensors", "the folder already has that format"),
        ("onnx:style", "style"),
    ],
)
def test_a_wrong_format_on_the_command_line_is_answered(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        exporters([text])


def test_options_of_a_format_survive_the_resolved_pipeline() -> None:
    steps = parse("passes: [rtn]\nexport: [hf, {onnx: {mode: fast, accuracy_level: 1}}]")
    assert steps.export == (Hf(), Onnx(mode="fast", accuracy_level=1))
    assert parse(dump(steps)) == steps


def test_a_format_that_stands_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"export\[1\]: hf appears twice"):
        parse("passes: [rtn]\nexport: [hf, hf]")


@pytest.mark.parametrize("exporter", EXPORTERS, ids=lambda e: e.key)
def test_every_exporter_says_what_it_is(exporter: type[Hf]) -> None:
    assert exporter.__doc__
    assert exporter.files
    page = (Path(compress.__file__).parent.parent / "docs" / "exports.md").read_text()
    assert f"## {exporter.key}\n" in page
    assert f"`OUT/{exporter.key}" in page


@pytest.mark.parametrize("key", only(["hf"], ["hf", "onnx"]))
def test_images_are_compared_by_accuracy_too(key: str, tmp_path: Path) -> None:
    report = write("resnet", tmp_path, [Rtn(bits=4)], key)
    found = report.verified[key]
    assert found["accuracy"] == found["packed_accuracy"] == report.rows[-1].accuracy
    assert found["max_logit_difference"] <= 1e-4
    images, _ = data_for("resnet")
    assert found["compared_on"] == list(images.shape)
