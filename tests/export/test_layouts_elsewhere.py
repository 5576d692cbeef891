"""The folders `gptq`, `awq` and `mlx` in the programs that they are for, where LAYOUTS_PYTHON names one that has them.

It has mlx and mlx-lm, and optimum and gptqmodel beside transformers. VLLM_PYTHON names one with vllm.
"""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from written import logits

import compress
from compress import AwqFormat, GptqFormat, Mlx, Override, Pipeline, Rtn
from compress.models.loading import load_model
from compress.passes import Pass

SCRIPT = Path(__file__).parent / "layouts_in_others.py"
PYTHON = Path(os.environ.get("LAYOUTS_PYTHON", ".venv-layouts/bin/python"))
VLLM = Path(os.environ.get("VLLM_PYTHON", ".venv-vllm/bin/python"))
needs_layouts = pytest.mark.skipif(not PYTHON.is_file(), reason="LAYOUTS_PYTHON names no Python with mlx and gptqmodel")
needs_vllm = pytest.mark.skipif(not VLLM.is_file(), reason="VLLM_PYTHON names no Python with vllm")
pytestmark = [pytest.mark.real, pytest.mark.usefixtures("one_thread")]

OTHERS = (Override("*.0.mlp.*", {"bits": 8, "group_size": 32}),)
CASES: dict[str, list[Pass]] = {
    "symmetric": [Rtn(bits=4, group_size=64, symmetric=True)],
    "asymmetric": [Rtn(bits=4, group_size=32)],
    "differing": [Rtn(bits=4, group_size=64, symmetric=True, exclude=("*.1.mlp.*",), overrides=OTHERS)],
    "three": [Rtn(bits=3, group_size=64)],
    "tables": [Rtn(bits=3, group_size=64, embeddings={"bits": 8, "group_size": 64})],
}
V2 = ("asymmetric", "three")  # without symmetry GPTQModel takes version 1 from itself alone


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in every case, each in a folder of its own, and some tokens; to be read only."""
    folder = tmp_path_factory.mktemp("layouts")
    for name, passes in CASES.items():
        compress.run(Pipeline(passes=tuple((p,) for p in passes)), "demo", folder / name)
        exporters = [Mlx()]
        if name != "tables":
            exporters.append(GptqFormat(checkpoint_format="gptq_v2" if name in V2 else "gptq"))
        if name.endswith("metric"):
            exporters.append(AwqFormat())
        compress.export_to(folder / name, exporters)
    tokens = torch.randint(1, 1000, (4, 24), generator=torch.Generator().manual_seed(1))
    save_file({"tokens": tokens}, folder / "tokens.safetensors")
    return folder


def found_by(program: str, folder: Path, python: Path = PYTHON) -> dict[str, Tensor]:
    tokens, found = folder.parent.parent / "tokens.safetensors", folder.parent / "found.safetensors"
    command = [str(python), str(SCRIPT), program, str(folder), str(tokens), str(found)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return load_file(found)


def expected(folder: Path) -> Tensor:
    tokens = load_file(folder.parent / "tokens.safetensors")["tokens"]
    return logits(load_model(folder, torch.float32), tokens)


@needs_layouts
@pytest.mark.parametrize("name", CASES)
def test_mlx_lm_unpacks_the_very_weights_and_computes_the_same(name: str, written: Path) -> None:
    found, packed = found_by("mlx", written / name / "mlx"), load_model(written / name)
    assert len(found) == {"differing": 40, "tables": 44}.get(name, 43)
    torch.testing.assert_close(found.pop("logits"), expected(written / name), rtol=0, atol=0.15)
    for layer, weight in found.items():
        assert torch.equal(weight, packed.get_submodule(layer).dequantize()), layer


@needs_layouts
@pytest.mark.parametrize("name", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("program", ["mlx", "transformers"])
def test_awq_folders_load_and_compute_the_same(program: str, name: str, written: Path) -> None:
    found = found_by(program, written / name / "awq")
    torch.testing.assert_close(found["logits"], expected(written / name), rtol=0, atol=0.15)


@needs_layouts
@pytest.mark.parametrize("name", ["symmetric", "asymmetric", "three"])
def test_transformers_loads_gptq_folders_and_computes_the_same(name: str, written: Path) -> None:
    found = found_by("transformers", written / name / "gptq")
    torch.testing.assert_close(found["logits"], expected(written / name), rtol=0, atol=0.15)


@needs_layouts
@pytest.mark.parametrize("name", ["symmetric", "asymmetric", "differing", "three"])
def test_gptqmodel_unpacks_the_weights_rounded_once_to_float16(name: str, written: Path) -> None:
    found, packed = found_by("gptqmodel", written / name / "gptq"), load_model(written / name)
    assert len(found) == (39 if name == "differing" else 42)
    for layer, weight in found.items():
        torch.testing.assert_close(weight, packed.get_submodule(layer).dequantize(), rtol=2**-10, atol=1e-7)


@needs_vllm
@pytest.mark.parametrize("key", ["gptq", "awq"])
def test_vllm_loads_and_chooses_the_same_tokens(key: str, written: Path) -> None:
    found = found_by("vllm", written / "symmetric" / key, VLLM)
    assert found["chosen"].tolist() == expected(written / "symmetric")[:, -1].argmax(-1).tolist()
