"""OUT/hf: plain transformers loads it, and it computes what the packed folder does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from alone import logits_alone
from once import Folders
from selection import only
from written import MODELS, QUICK, data_for, logits, tensors, write

import compress
from compress import ConfigError, Eora, Gptq, Magnitude, Rtn
from compress.errors import CompressError
from compress.export import hf
from compress.models.loading import load_model
from compress.passes import Pass

PASSES: list[Pass] = [Magnitude(sparsity=0.5), Rtn(bits=3), Eora(rank=2)]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Every model, each in a folder of its own."""

    def make_folder(name: str, folder: Path) -> None:
        folder.mkdir()
        write(name, folder, PASSES, "hf")

    return Folders(tmp_path_factory.mktemp("hf"), make_folder)


def report_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / "report.json").read_text())
    return found


def test_transformers_alone_loads_it_and_computes_the_same_bits(written: Folders) -> None:
    names = ["llama", "bfloat16", "gpt2"]
    tokens, _ = data_for("llama")
    alone = logits_alone(written.root, {name: (str(written / name / "out" / "hf"), {}) for name in names}, tokens)
    for name in names:
        assert torch.equal(alone[name], logits(load_model(written / name / "out"), tokens)), name


@pytest.mark.parametrize("name", only(QUICK, MODELS))
def test_the_written_logits_are_those_in_memory(name: str, written: Folders) -> None:
    found = report_of(written / name)["verified"]["hf"]
    assert found["max_logit_difference"] == 0
    assert found["tensors_equal"] == len(tensors(written / name / "out" / "hf"))


@pytest.mark.parametrize("name", only(QUICK, MODELS))
def test_what_was_compressed_is_decompressed_and_the_rest_is_the_sources(name: str, written: Folders) -> None:
    there, source = tensors(written / name / "out" / "hf"), tensors(written / name / "model")
    packed = load_model(written / name / "out")
    specs = json.loads((written / name / "out" / "config.json").read_text())["quantization_config"]["modules"]
    assert len(specs) >= 5
    assert there.keys() <= {*source, *(n for n, _ in packed.named_buffers()), *(f"{n}.weight" for n in specs)}
    for key, value in there.items():
        site = key.removesuffix(".weight")
        if site not in specs:
            assert torch.equal(value, source[key]), key
            assert value.dtype == source[key].dtype
            continue
        meant = packed.get_submodule(site).dequantize()
        if name == "gpt2":
            meant = meant.T
        assert value.shape == source[key].shape
        assert torch.equal(value.flatten(), meant.to(value.dtype).flatten()), key


def test_its_configuration_is_the_sources_and_names_no_quantization(written: Folders) -> None:
    folder = written / "bfloat16"
    there = json.loads((folder / "out" / "hf" / "config.json").read_text())
    assert there == json.loads((folder / "model" / "config.json").read_text())
    assert there["dtype"] == "bfloat16"
    assert {p.name for p in (folder / "out" / "hf").iterdir()} == {
        "config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "manifest.json", "README.md"
    }  # fmt: skip


def test_another_type_to_compute_in_is_the_one_that_is_stored_and_loaded(tmp_path: Path) -> None:
    report = write("bfloat16", tmp_path, [Rtn(bits=4)], "hf", dtype="float32")
    assert report.verified["hf"]["max_logit_difference"] == 0
    there = tensors(tmp_path / "out" / "hf")
    assert there["model.layers.0.mlp.up_proj.weight"].dtype == torch.float32
    assert there["model.norm.weight"].dtype == torch.bfloat16
    assert load_model(tmp_path / "out" / "hf").dtype == torch.float32


def test_the_finished_folder_is_not_written_again_unless_a_file_is_missing(tmp_path: Path) -> None:
    first = write("llama", tmp_path, [Rtn(bits=4)], "hf")
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    again = write("llama", tmp_path, [Rtn(bits=4)], "hf")
    assert again == first
    assert times == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    (tmp_path / "out" / "hf" / "model.safetensors").unlink()
    with pytest.raises(compress.UsageError, match=r"is the result of this run, but .*--overwrite writes it again"):
        write("llama", tmp_path, [Rtn(bits=4)], "hf")


def test_a_damaged_tensor_is_noticed_and_nothing_gets_the_final_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damage(_: Path, folder: Path) -> None:
        data = bytearray((folder / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (folder / "model.safetensors").write_bytes(data)

    monkeypatch.setattr(hf, "copy_companions", damage)
    with pytest.raises(CompressError, match=r"hf/model\.safetensors: .* reads back differently"):
        write("llama", tmp_path, [Rtn(bits=4)], "hf")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["hf", "peft"])
def test_rounded_inputs_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"export\.(hf|peft).*plain weights cannot round .*and 14 layers do"):
        write("llama", tmp_path, [Gptq(bits=4, activation_bits=8), Eora(rank=2)], name)
    assert not (tmp_path / "out").exists()
