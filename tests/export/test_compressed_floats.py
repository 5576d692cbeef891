"""OUT/compressed-tensors with floats: the library of that name and transformers read the very numbers."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from alone import logits_alone
from conftest import make_llama
from expert_models import make_mixture
from once import Folders
from selection import only
from written import data_for, logits, tensors, write

from compress import ConfigError, Gptq, Magnitude, Override, Rtn
from compress.models.loading import load_model
from compress.passes import Pass
from compress.runtime.linear import unpack_all

library = pytest.importorskip("compressed_tensors")
pytestmark = pytest.mark.usefixtures("one_thread")

KEY = "compressed-tensors"
PEER = Path(__file__).parents[2] / ".venv-peer" / "bin" / "python"  # another version of the library and transformers
FP8: dict[str, Any] = {"grid": "fp8", "bits": 8}
NVFP4: dict[str, Any] = {"grid": "nvfp4", "bits": 4, "group_size": 16}
MXFP4: dict[str, Any] = {"grid": "mxfp4", "bits": 4, "group_size": 32}
ROUNDED: dict[str, Any] = {"activation_bits": 8, "activation_grid": "fp8"}
MIXED = (
    Override("*.0.mlp.*", {**FP8, "group_size": None}),
    Override("*.1.self_attn.*", {"grid": "int", "bits": 4, "group_size": 32}),
)
CASES: dict[str, list[Pass]] = {
    "fp8_tensor": [Rtn(**FP8, granularity="tensor", scale_search="mse")],
    "fp8_rows": [Gptq(**FP8)],
    "fp8_dynamic": [Rtn(**FP8, **ROUNDED)],
    "fp8_static": [Rtn(**FP8, granularity="tensor", activation_scale="tensor", **ROUNDED)],
    "fp8_block": [Rtn(**FP8, granularity="block")],
    "nvfp4": [Gptq(**NVFP4, scale_search="weighted")],
    "mxfp4": [Rtn(**MXFP4, scale_search="mse")],
    "sparse": [Magnitude(sparsity="2:4"), Rtn(**NVFP4)],
    "mixed": [Rtn(**NVFP4, overrides=MIXED)],
}
QUICK = ("fp8_rows", "fp8_static", "fp8_block", "nvfp4", "mxfp4")
IN_BFLOAT16 = ("nvfp4", "mxfp4", "sparse", "mixed")  # the library makes nothing else of 4 bits
BLOCKS = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
FORMATS = {"fp8": "float-quantized", "nvfp4": "nvfp4-pack-quantized", "mxfp4": "mxfp4-pack-quantized"}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Every case, in a folder of its own."""

    def make_folder(name: str, folder: Path) -> None:
        folder.mkdir()
        if name == "fp8_block":
            make_llama(**BLOCKS).save_pretrained(folder / "model")
        write("llama", folder, CASES[name], KEY)

    return Folders(tmp_path_factory.mktemp("packed"), make_folder)


def section_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / KEY / "config.json").read_text())
    return found["quantization_config"]  # type: ignore[no-any-return]


def computed(written: Folders, python: str | Path) -> None:
    """Let a python without this package's help load every case; the logits are those of the packed folder."""
    dtypes = {name: "bfloat16" if name in IN_BFLOAT16 else "float32" for name in CASES}
    asked: dict[str, tuple[str, dict[str, Any]]] = {
        name: (str(written / name / "out" / KEY), {"dtype": dtype}) for name, dtype in dtypes.items()
    }
    tokens = data_for("llama")[0]
    alone = logits_alone(written.root, asked, tokens, python)
    for name, dtype in dtypes.items():
        packed = load_model(written / name / "out", getattr(torch, dtype))
        unpack_all(packed)
        meant = logits(packed, tokens)
        if name == "mixed":  # the library rounds the scales of its other layers to bfloat16
            assert float((alone[name] - meant).abs().max()) < 0.05 * float(meant.abs().max())
        else:
            assert torch.equal(alone[name], meant), name


@pytest.mark.real
def test_transformers_loads_every_case_without_this_package_and_computes_the_same_bits(written: Folders) -> None:
    computed(written, sys.executable)


@pytest.mark.real
@pytest.mark.skipif(not PEER.exists(), reason="needs an environment with another version in .venv-peer")
def test_another_version_of_the_library_and_of_transformers_computes_the_same_bits(written: Folders) -> None:
    computed(written, PEER)


@pytest.mark.parametrize("name", only(QUICK, CASES))
def test_the_library_unpacks_the_very_weights(name: str, written: Folders) -> None:
    packed, there = load_model(written / name / "out"), tensors(written / name / "out" / KEY)
    config = library.quantization.QuantizationConfig.model_validate(section_of(written / name))
    count = 0
    for scheme in config.config_groups.values():
        compressor = library.BaseCompressor.load_from_registry(scheme.format)
        for target in scheme.targets:
            site = target.removeprefix("re:").removesuffix("$").replace("\\", "")
            leaves = {key.rpartition(".")[2]: value for key, value in there.items() if key.startswith(f"{site}.")}
            if leaves["weight_scale"].dtype == torch.float16:
                leaves["weight_scale"] = leaves["weight_scale"].float()
            found = compressor.decompress(leaves, scheme)["weight"]
            assert torch.equal(found.float(), packed.get_submodule(site).dequantize())
            count += 1
    assert count == 14


@pytest.mark.parametrize("name", only(QUICK, CASES))
def test_the_written_logits_are_those_of_the_packed_model(name: str, written: Folders) -> None:
    found = json.loads((written / name / "out" / "report.json").read_text())["verified"][KEY]
    assert found["max_logit_difference"] == 0
    assert found["tensors_equal"] == len(tensors(written / name / "out" / KEY))


# --- keys -------------------------------------------------------------------------------------------------------------

TOKEN = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None}
FLOAT4 = {"num_bits": 4, "type": "float", "symmetric": True}
# name -> weights, inputs, and type and shape of the tensors of a layer of 128 rows and 64 columns (blocks: 128)
STATED: dict[str, tuple[dict[str, Any], dict[str, Any] | None, dict[str, tuple[torch.dtype, tuple[int, ...]]]]] = {
    "fp8_tensor": ({**FLOAT8, "strategy": "tensor"}, None,
                   {"weight": (torch.float8_e4m3fn, (128, 64)), "weight_scale": (torch.float16, (1,))}),
    "fp8_rows": ({**FLOAT8, "strategy": "channel"}, None,
                 {"weight": (torch.float8_e4m3fn, (128, 64)), "weight_scale": (torch.float16, (128, 1))}),
    "fp8_dynamic": ({**FLOAT8, "strategy": "channel"}, TOKEN,
                    {"weight": (torch.float8_e4m3fn, (128, 64)), "weight_scale": (torch.float16, (128, 1))}),
    "fp8_static": ({**FLOAT8, "strategy": "tensor"}, {**TOKEN, "strategy": "tensor", "dynamic": False},
                   {"weight": (torch.float8_e4m3fn, (128, 64)), "weight_scale": (torch.float16, (1,)),
                    "input_scale": (torch.float32, (1,))}),
    "fp8_block": ({**FLOAT8, "strategy": "block", "block_structure": [128, 128]}, None,
                  {"weight": (torch.float8_e4m3fn, (128, 128)), "weight_scale": (torch.float16, (1, 1))}),
    "nvfp4": ({**FLOAT4, "strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}, None,
              {"weight_packed": (torch.uint8, (128, 32)), "weight_scale": (torch.float8_e4m3fn, (128, 4)),
               "weight_global_scale": (torch.float32, (1,))}),
    "mxfp4": ({**FLOAT4, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}, None,
              {"weight_packed": (torch.uint8, (128, 32)), "weight_scale": (torch.uint8, (128, 2))}),
}  # fmt: skip


@pytest.mark.parametrize("name", only(QUICK, STATED))
def test_keys_and_tensors_are_those_of_the_format(name: str, written: Folders) -> None:
    weights, inputs, leaves = STATED[name]
    section, there = section_of(written / name), tensors(written / name / "out" / KEY)
    (group,) = section["config_groups"].values()
    stated = FORMATS[name.partition("_")[0]]
    assert section["format"] == group["format"] == stated
    assert section["quantization_status"] == "compressed"
    assert section["ignore"] == ["lm_head"]
    assert group["weights"] == weights
    assert group["input_activations"] == inputs
    site = "model.layers.0.mlp.up_proj."
    found = {key.removeprefix(site): (t.dtype, tuple(t.shape)) for key, t in there.items() if key.startswith(site)}
    assert found == leaves


def test_layers_of_several_formats_are_groups_of_their_own(written: Folders) -> None:
    section = section_of(written / "mixed")
    assert section["format"] == "mixed-precision"
    formats = {group["format"] for group in section["config_groups"].values()}
    assert formats == {"float-quantized", "nvfp4-pack-quantized", "pack-quantized"}
    symmetric = [g["weights"]["symmetric"] for g in section["config_groups"].values()]
    assert all(symmetric), "beside other formats zero points cannot be read"


# --- refused ----------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Pass, str]] = {
    "groups of fp8": (Rtn(**FP8, group_size=32), "the library knows fp8 with .*14 layers are otherwise"),
    "rows of mxfp4": (Rtn(grid="mxfp4", bits=4, group_size=32, fallback="channel"), "12 layers are otherwise"),
    "integer inputs": (Rtn(**FP8, activation_bits=8), "leave activation_bits out"),
    "inputs of nvfp4": (Rtn(**NVFP4, **ROUNDED), "leave activation_bits out"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_hold_is_refused_before_any_work(name: str, tmp_path: Path) -> None:
    pass_, message = REFUSED[name]
    if name == "rows of mxfp4":
        make_llama(hidden_size=48, num_attention_heads=3, num_key_value_heads=3).save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=f"export\\.compressed-tensors: .*{message}"):
        write("llama", tmp_path, [pass_], KEY)
    assert not (tmp_path / "out").exists()


def test_experts_that_are_floats_are_refused(tmp_path: Path) -> None:
    make_mixture("Mixtral").save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"reads experts of even steps only, and \d+ are floats, such as .*grid: int"):
        write("llama", tmp_path, [Rtn(**NVFP4)], KEY)
