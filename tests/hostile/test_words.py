"""Words and small files that kept a command busy for ever, broke its printing, or became what they should not be."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import yaml

from compress import cli
from compress.cli import commands
from compress.config import lines, mergekit, reading
from compress.errors import CheckpointError, ConfigError, UsageError
from compress.export.packed import read_quantization
from compress.io import atomic, small_file
from compress.io.safetensors_file import read_header

LAUGHS = "\n".join(f"a{i}: &a{i} [{', '.join(f'*a{i - 1}' if i else 'x' for _ in range(10))}]" for i in range(7))


def command(*words: object) -> int:
    return cli.guarded(lambda: commands.app([str(word) for word in words], prog_name="compress", standalone_mode=False))


# --- pipelines, and options on the command line -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("passes:\n- gptq.", "p:2: passes[0].gptq."), ("passes:\n- wanda[2:4]", "p:2: passes[0].wanda[2:4]"),
        (LAUGHS, "through its aliases"), ("a: &a [*a]", "refers to itself"), ("[" * 5000, "nested too deeply"),
        ("{a: " * 5000, "nested too deeply"), ("# " + "x" * lines.MOST_LETTERS, "letters"),
        (f"passes: [rtn]\n? {'k' * 300}\n: 1", "a key has 300 letters"), ("passes: [rtn: {bits: \"4\\n5\"}]", "4\\n5"),
    ],
    ids=lambda x: x[:12],
)  # fmt: skip
def test_a_pipeline_without_end_is_answered_with_its_place(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        reading.parse(text, "p")
    assert said in str(caught.value)


@pytest.mark.parametrize("word", ["", ":", "=", "gptq.", "onnx:mode=[[[", "onnx:=", "onnx:mode=*a", "onnx:a.b=1"])
def test_a_word_that_is_no_format_is_refused(word: str) -> None:
    with pytest.raises(ConfigError):
        reading.exporters([word])


def test_a_problem_is_one_line_whatever_is_in_it() -> None:
    with pytest.raises(ConfigError) as caught:
        reading.load_pipeline({"passes": ["a\nb", "c\u2028d"]})
    assert len(str(caught.value).splitlines()) == 2


# --- mergekit files ---------------------------------------------------------------------------------------------------

LINEAR = {"merge_method": "linear", "models": [{"model": "org/a", "parameters": {"weight": 1}}] * 2}


@pytest.mark.parametrize("name", ["a\nexport: [gguf]", "a\rb", "a\x1b[2J", "a\u2028b", "a\0b"])
def test_a_name_of_another_programs_file_never_becomes_a_key(name: str, tmp_path: Path) -> None:
    file = tmp_path / "m.yaml"
    file.write_text(yaml.safe_dump({**LINEAR, "models": [{"model": name, "parameters": {"weight": 1}}] * 2}))
    with pytest.raises(ConfigError, match="control characters"):
        mergekit.convert(file)


def test_what_is_noted_of_another_programs_file_stays_a_comment(tmp_path: Path) -> None:
    file = tmp_path / "m.yaml"
    file.write_text(yaml.safe_dump({**LINEAR, "dtype": "a\nseed: 5", "out_dtype": ["b\nexport: [gguf]"]}))
    found = mergekit.convert(file)
    assert set(yaml.safe_load(found.text)) == {"passes"}


@pytest.mark.parametrize("text", ["[" * 5000, LAUGHS, "- 5", "", "merge_method: [linear]", "merge_method: {}"])
def test_a_file_that_is_none_of_mergekits_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(ConfigError):
        mergekit.convert(tmp_path / "m.yaml")


def test_a_range_of_layers_that_is_none_is_refused(tmp_path: Path) -> None:
    for layers in (5, "all", {"a": 1}, [0], ["x", 2], [[0], 2]):
        source = {"model": "org/a", "layer_range": layers, "parameters": {"weight": 1}}
        (tmp_path / "m.yaml").write_text(
            yaml.safe_dump({"merge_method": "linear", "slices": [{"sources": [source] * 2}]})
        )
        with pytest.raises(ConfigError, match="layer_range"):
            mergekit.convert(tmp_path / "m.yaml")


def test_a_new_pipeline_has_a_name_that_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("init", "a\nseed: 5.yaml") == 2
    assert command("init", tmp_path, "--force") == 2
    assert command("init", "a # b.yaml") == 0
    assert reading.load_pipeline("a # b.yaml").seed == 0
    assert {path.name for path in tmp_path.iterdir()} == {"a # b.yaml", "compress.schema.json"}


def test_names_are_printed_without_what_a_terminal_would_obey(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "\x1b[2J.yaml").write_text("passes: [rtn]")
    assert command("check", tmp_path / "\x1b[2J.yaml") == 0
    assert "\\x1b[2J.yaml: fine" in capsys.readouterr().out


def test_half_a_letter_is_spelled_out_in_a_file(tmp_path: Path) -> None:
    atomic.write_text(tmp_path / "note", "a \ud800 model")
    assert (tmp_path / "note").read_text(encoding="utf-8") == "a \\ud800 model"


# --- small files ------------------------------------------------------------------------------------------------------


def test_a_text_is_read_in_bounded_memory_from_a_regular_file_in_utf_8(tmp_path: Path) -> None:
    (tmp_path / "good").write_text("ü", encoding="utf-8")
    (tmp_path / "latin").write_bytes("ü".encode("latin-1"))
    with (tmp_path / "large").open("wb") as sparse:
        sparse.truncate(1 << 40)
    os.mkfifo(tmp_path / "pipe")
    assert small_file.read_text(tmp_path / "good") == "ü"
    for name in ("gone", "latin", "large", "pipe", ".", "a\0b"):
        with pytest.raises(UsageError, match=r"read|folder|bytes"):
            small_file.read_text(tmp_path / name, most=1000)
    with pytest.raises(UsageError):
        small_file.read_text(Path("/dev/zero"))


@pytest.mark.parametrize("text", ["", "5", "[]", "null", '{"a": 1, "a": 2}', "[" * 100_000, '{"a":' * 100_000, "{"])
def test_what_is_no_json_object_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match="here"):
        small_file.parse_object(text, "here")


def with_header(file: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 50_000, b'{"a": ' * 50_000, [], None, {"a": []},
        {"a": {"dtype": [], "shape": [], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0.0, 4.0]}},
        {"a": {"dtype": "F32", "shape": [10**30], "data_offsets": [0, 4 * 10**30]}},
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": '
        b'{"dtype": "I32", "shape": [1], "data_offsets": [0, 4]}}',
    ],
    ids=lambda header: str(header)[:60],
)  # fmt: skip
def test_a_header_that_cannot_be_is_refused(header: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"w\.safetensors"):
        read_header(with_header(tmp_path / "w.safetensors", header, bytes(4)))


def test_a_header_as_long_as_a_disk_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    with file.open("wb") as sparse:
        sparse.write(struct.pack("<Q", 1 << 39))
        sparse.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="header of"):
        read_header(file)


# --- results of another version ---------------------------------------------------------------------------------------

GOOD = {"shape": [4, 8], "layout": "compress-1", "encoding": "uniform", "bits": 4}


@pytest.mark.parametrize(
    ("section", "said"),
    [
        (None, "describes no packed weights"), ([], "describes no packed weights"), ({"quant_method": "gptq"}, "gptq"),
        ({"quant_method": "compress", "modules": [5]}, "newer version"),
        ({"quant_method": "compress", "modules": {"a": 5}}, "newer version"),
        ({"quant_method": "compress", "modules": {"a": {**GOOD, "layout": "compress-2"}}}, "a: .*newer version"),
        ({"quant_method": "compress", "modules": {"a": {**GOOD, "bits": "4"}}}, "a: bits '4'"),
        ({"quant_method": "compress", "modules": {"a": GOOD}, "added_biases": "b"}, "list of names"),
    ],
    ids=repr,
)  # fmt: skip
def test_a_folder_that_this_version_cannot_read_is_refused_by_name(section: Any, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": section} if section is not None else {}))
    with pytest.raises(UsageError, match=said):
        read_quantization(tmp_path)
    assert command("inspect", tmp_path) == 2


@pytest.mark.parametrize("layers", [None, 5, [], {"a": 5}, {"a": {"rtn": None}}, {"a": {"rtn": {"error": "x"}}}])
def test_a_damaged_report_is_not_inspected(layers: Any, tmp_path: Path) -> None:
    section = {"quant_method": "compress", "modules": {"a": GOOD}}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": section}))
    (tmp_path / "report.json").write_text(json.dumps({"layers": layers}))
    assert command("inspect", tmp_path) == 2
