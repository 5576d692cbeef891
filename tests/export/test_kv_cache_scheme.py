"""OUT/compressed-tensors with a rounded key-value cache: what the library, transformers and vLLM read of it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from alone import logits_alone
from once import Folders
from safetensors.torch import load_file
from written import data_for, logits, tensors, write

import compress
from compress import ConfigError, KvCache, Rtn
from compress.export.packed import open_packed
from compress.models.loading import load_model
from compress.passes import Pass

library = pytest.importorskip("compressed_tensors")
pytestmark = pytest.mark.usefixtures("one_thread")

KEY = "compressed-tensors"
PEER = Path(__file__).parents[2] / ".venv-peer" / "bin" / "python"  # another version of the library and transformers
VLLM = Path(os.environ.get("VLLM_PYTHON", ".venv-vllm/bin/python"))
FOUR = Rtn(bits=4, group_size=32, symmetric=True)
CASES: dict[str, list[Pass]] = {
    "tensor": [FOUR, KvCache()],
    "head": [FOUR, KvCache(per="head")],
    "floats": [Rtn(grid="fp8", bits=8), KvCache()],
}
LAYER = "model.layers.1.self_attn"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Every case, in a folder of its own."""

    def make_folder(name: str, folder: Path) -> None:
        folder.mkdir()
        write("llama", folder, CASES[name], KEY, "entropy")

    return Folders(tmp_path_factory.mktemp("caches"), make_folder)


def section_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / KEY / "config.json").read_text())
    return found["quantization_config"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", CASES)
def test_the_library_reads_the_scheme_and_the_scales(written: Folders, name: str) -> None:
    folder = written / name
    scheme = library.quantization.QuantizationConfig.model_validate(section_of(folder)).kv_cache_scheme
    assert (scheme.type, scheme.num_bits, scheme.symmetric, scheme.dynamic) == ("float", 8, True, False)
    assert scheme.strategy == ("attn_head" if name == "head" else "tensor")
    stored, packed = tensors(folder / "out" / KEY), load_file(folder / "out" / "compress.safetensors")
    model = load_model(folder / "out" / KEY, torch.float32)
    for leaf in ("k_scale", "v_scale"):
        scale = stored[f"{LAYER}.{leaf}"]
        assert scale.shape == ((2, 1, 1) if name == "head" else (1,))
        assert torch.equal(scale.flatten(), packed[f"{LAYER}.{leaf}"])
        assert torch.equal(getattr(model.get_submodule(LAYER), leaf), scale)


@pytest.mark.parametrize("name", CASES)
def test_transformers_with_the_library_computes_what_the_packed_folder_does(written: Folders, name: str) -> None:
    folder, (inputs, _) = written / name, data_for("llama")
    report = json.loads((folder / "out" / "report.json").read_text())
    assert report["verified"][KEY]["max_logit_difference"] == 0
    assert report["verified"]["entropy"]["max_logit_difference"] == 0
    theirs = load_model(folder / "out" / KEY, torch.float32)
    ours = load_model(folder / "out", torch.float32)
    assert torch.equal(logits(theirs, inputs), logits(ours, inputs))
    with torch.no_grad():  # and what the cache of each holds are the same numbers
        kept = [m(inputs, use_cache=True).past_key_values.layers[1] for m in (theirs, ours)]
    assert torch.equal(kept[0].keys, kept[1].keys)
    assert torch.equal(kept[0].values, kept[1].values)


def alone(written: Folders, python: str | Path) -> None:
    """Let a python without this package's help load two cases; the logits are those of the packed folder."""
    asked = {name: (f"{(written / name).name}/out/{KEY}", {"dtype": "float32"}) for name in ("tensor", "head")}
    inputs, _ = data_for("llama")
    found = logits_alone(written.root, asked, inputs, python)
    for name, there in found.items():
        assert torch.equal(there, logits(load_model(written / name / "out", torch.float32), inputs)), name


@pytest.mark.real
def test_a_python_without_this_package_computes_the_same(written: Folders) -> None:
    alone(written, sys.executable)


@pytest.mark.real
@pytest.mark.skipif(not PEER.exists(), reason="needs an environment with another version in .venv-peer")
def test_an_older_library_and_transformers_compute_the_same(written: Folders) -> None:
    alone(written, PEER)


def test_the_entropy_coded_folder_keeps_the_scales(written: Folders) -> None:
    out = written / "head" / "out"
    found, again = open_packed(out).artifact.caches, open_packed(out / "entropy").artifact.caches
    assert found.keys() == again.keys() == {"model.layers.0.self_attn", LAYER}
    for name, grid in found.items():
        assert grid.form == again[name].form
        assert torch.equal(grid.k_scale, again[name].k_scale)


def test_what_engines_do_not_read_is_refused_before_the_run(tmp_path: Path) -> None:
    refused: dict[str, list[Pass]] = {
        "engines read fp8 caches alone, and kv_cache makes int8 per tensor": [FOUR, KvCache(grid="int")],
        "that of 1 is not rounded, such as model.layers.0.self_attn": [FOUR, KvCache(exclude=("*.0.*",))],
        "leaves the cache as it is where codes have zero points": [Rtn(bits=4, group_size=32), KvCache()],
        "one form for the whole cache, and the pipeline makes 2": [
            FOUR, KvCache(exclude=("*.0.*",)), KvCache(include=("*.0.*",), per="head")
        ],
    }  # fmt: skip
    for said, passes in refused.items():
        with pytest.raises(ConfigError, match=said):
            write("llama", tmp_path, passes, KEY)


def test_containers_without_a_place_for_scales_refuse_before_the_run_and_when_exporting(
    written: Folders, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as raised:
        write("llama", tmp_path, CASES["tensor"], "hf", "gguf", "gptq", "awq", "mlx", "onnx")
    for key in ("hf", "gguf", "gptq", "awq", "mlx", "onnx"):
        assert f"{key} has no place for the scales of kv_cache" in str(raised.value)
    with pytest.raises(ConfigError, match="gptq has no place for the scales of kv_cache"):
        compress.export_to(written / "tensor" / "out", [compress.GptqFormat()])


@pytest.mark.real
@pytest.mark.skipif(not VLLM.is_file(), reason="VLLM_PYTHON names no Python with vllm")
@pytest.mark.parametrize("per", ["tensor", "head"])
def test_vllm_loads_the_very_scales(tmp_path: Path, per: str) -> None:
    steps = {"calibration": {"source": "demo", "samples": 8, "length": 64}, "export": [KEY]}
    passes = [{"rtn": {"scheme": "w4g64", "symmetric": True}}, {"kv_cache": {"per": per}}]
    report = compress.run({**steps, "passes": passes}, "demo", tmp_path / "out")
    found = tmp_path / "found.json"
    script = Path(__file__).parent / "caches_in_vllm.py"
    command = [str(VLLM), str(script), str(tmp_path / "out" / KEY), str(found)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr[-3000:]
    there = json.loads(found.read_text())
    assert there == {f"{name}.attn": scales for name, scales in report.caches[0]["layers"].items()}
