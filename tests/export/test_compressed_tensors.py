"""OUT/compressed-tensors: transformers with that library loads it, without this package, and computes the same."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from alone import logits_alone
from conftest import make_llama
from once import Folders
from selection import only
from torch import Tensor, nn
from written import data_for, logits, tensors, write

from compress import Codebook, ConfigError, Eora, Gptq, LowRank, Magnitude, Olive, Override, PowerQuant, Rtn
from compress.config.reading import parse
from compress.errors import CompressError
from compress.export import compressed_tensors, pack_quantized
from compress.export.packed import open_packed, specs_in
from compress.models import graph as graphs
from compress.models.loading import load_model
from compress.passes import Pass
from compress.planning import plan
from compress.runtime.linear import unpack_all

library = pytest.importorskip("compressed_tensors")
pytestmark = pytest.mark.usefixtures("one_thread")

KEY = "compressed-tensors"
BY_LAYER = (Override("*.0.mlp.*", {"bits": 3, "group_size": None}), Override("*.1.self_attn.*", {"bits": 8}))
CASES: dict[str, list[Pass]] = {
    **{f"symmetric{bits}": [Rtn(bits=bits, group_size=32, symmetric=True)] for bits in range(2, 9)},
    **{f"asymmetric{bits}": [Rtn(bits=bits, group_size=32)] for bits in range(2, 9)},
    "rows": [Rtn(bits=3, symmetric=True)],
    "tensor": [Rtn(bits=4, granularity="tensor")],
    "mixed": [Rtn(bits=4, group_size=32, symmetric=True, overrides=BY_LAYER)],
    "mixed_asymmetric": [Rtn(bits=4, group_size=16, overrides=BY_LAYER[:1])],
    "sparse": [Magnitude(sparsity="2:4"), Rtn(bits=4, group_size=16, symmetric=True)],
    "sparse_asymmetric": [Magnitude(sparsity=0.5), Rtn(bits=3)],
    "some": [Magnitude(sparsity=0.5), Rtn(bits=4, exclude=("*.mlp.*",))],
    "bfloat16_factors": [
        LowRank(ratio=0.7, steps=2, include=("*.mlp.*",)),
        Rtn(bits=4, symmetric=True, exclude=("*.mlp.*",)),
    ],
    "odd": [Rtn(bits=3)],
    "odd_symmetric": [Rtn(bits=5, symmetric=True)],
    "odd_mixed": [Rtn(bits=3, overrides=(Override("*.k_proj", {"bits": 7}),))],
    "bfloat16": [Rtn(bits=4, group_size=32, symmetric=True)],
    "bfloat16_asymmetric": [Rtn(bits=4, group_size=32)],
}
ODD = {"hidden_size": 36, "intermediate_size": 50, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 10}
QUICK = ["asymmetric3", "symmetric4", "tensor", "mixed_asymmetric", "sparse", "some", "bfloat16_factors", "odd"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Every case, in a folder of its own."""

    def make_folder(name: str, folder: Path) -> None:
        folder.mkdir()
        if name.startswith("odd"):
            make_llama(**ODD).save_pretrained(folder / "model")
        write("bfloat16" if name.startswith("bfloat16") else "llama", folder, CASES[name], KEY)

    return Folders(tmp_path_factory.mktemp("packed"), make_folder)


def report_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / "report.json").read_text())
    return found["verified"][KEY]  # type: ignore[no-any-return]


def section_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / KEY / "config.json").read_text())
    return found["quantization_config"]  # type: ignore[no-any-return]


@pytest.mark.real
def test_transformers_loads_every_case_without_this_package_and_computes_the_same_bits(written: Folders) -> None:
    tokens, _ = data_for("llama")
    asked = {name: (str(written / name / "out" / KEY), {"dtype": "float32"}) for name in CASES}
    alone = logits_alone(written.root, asked, tokens)
    for name in CASES:
        packed = load_model(written / name / "out", torch.float32)
        unpack_all(packed)  # factors are multiplied one after the other otherwise
        assert torch.equal(alone[name], logits(packed, tokens)), name


@pytest.mark.parametrize("name", only(QUICK, CASES))
def test_the_library_unpacks_the_very_weights(name: str, written: Folders) -> None:
    folder = written / name
    packed, there = load_model(folder / "out"), tensors(folder / "out" / KEY)
    config = library.quantization.QuantizationConfig.model_validate(
        {k: v for k, v in section_of(folder).items() if k != "dequantize"}
    )
    compressor = library.BaseCompressor.load_from_registry("pack-quantized")
    count = 0
    for scheme in config.config_groups.values():
        for target in scheme.targets:
            site = target.removeprefix("re:").removesuffix("$").replace("\\", "")
            leaves = {key.rpartition(".")[2]: value for key, value in there.items() if key.startswith(f"{site}.")}
            leaves["weight_scale"] = leaves["weight_scale"].float()
            assert torch.equal(compressor.decompress(leaves, scheme)["weight"], packed.get_submodule(site).dequantize())
            count += 1
    assert (
        count
        == sum(key.endswith("weight_packed") for key in there)
        == (8 if name in ("some", "bfloat16_factors") else 14)
    )


@pytest.mark.parametrize("name", only(QUICK, CASES))
def test_the_written_logits_are_those_of_the_packed_model(name: str, written: Folders) -> None:
    found = report_of(written / name)
    assert found["max_logit_difference"] == 0
    assert found["tensors_equal"] == len(tensors(written / name / "out" / KEY))
    assert ("as_shipped" in found) == name.startswith("bfloat16")


@pytest.mark.parametrize("bits", only([3, 4], range(2, 9)))
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_take_their_own_bits_and_scales_and_zero_points_little(
    bits: int, symmetric: bool, written: Folders
) -> None:
    there = tensors(written / f"{'symmetric' if symmetric else 'asymmetric'}{bits}" / "out" / KEY)
    name = "model.layers.0.mlp.down_proj"  # (64, 128), four groups
    assert there[f"{name}.weight_packed"].shape == (64, 128 * bits // 32)
    assert there[f"{name}.weight_scale"].shape == (64, 4)
    assert there[f"{name}.weight_scale"].dtype == (torch.float16 if symmetric else torch.float32)
    assert there[f"{name}.weight_shape"].tolist() == [64, 128]
    if symmetric:
        assert f"{name}.weight_zero_point" not in there
    else:
        assert there[f"{name}.weight_zero_point"].shape == (64 * bits // 32, 4)


def test_layers_that_differ_are_groups_of_their_own_named_in_full(written: Folders) -> None:
    groups = section_of(written / "mixed")["config_groups"].values()
    weights = [g["weights"] for g in groups]
    assert {(w["num_bits"], w["strategy"], w["group_size"]) for w in weights} == {
        (4, "group", 32), (3, "channel", None), (8, "group", 32)
    }  # fmt: skip
    targets = [t for g in groups for t in g["targets"]]
    assert len(targets) == len(set(targets)) == 14
    assert r"re:model\.layers\.0\.mlp\.up_proj$" in targets


def test_zero_points_are_kept_where_all_layers_are_alike_and_one_more_bit_where_not(written: Folders) -> None:
    alike, mixed = section_of(written / "asymmetric4"), section_of(written / "mixed_asymmetric")
    assert alike["dequantize"] is True
    assert "dequantize" not in mixed
    assert [g["weights"]["symmetric"] for g in alike["config_groups"].values()] == [False]
    assert {(g["weights"]["num_bits"], g["weights"]["symmetric"]) for g in mixed["config_groups"].values()} == {
        (5, True), (4, True)
    }  # fmt: skip


def test_layers_without_codes_stay_dense_and_are_ignored(written: Folders) -> None:
    there, ignored = tensors(written / "some" / "out" / KEY), section_of(written / "some")["ignore"]
    assert "lm_head" in ignored
    assert "model.layers.1.mlp.up_proj" in ignored
    assert len(ignored) == 7
    dense = there["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(dense, load_model(written / "some" / "out").model.layers[1].mlp.up_proj.dequantize())
    assert float((dense == 0).float().mean()) == pytest.approx(0.5, abs=0.01)


def test_in_bfloat16_scales_are_rounded_but_not_where_layers_are_unpacked_while_loading(written: Folders) -> None:
    def weight(name: str) -> tuple[Tensor, Tensor]:
        model = load_model(written / name / "out" / KEY)
        logits(model, torch.zeros(1, 1, dtype=torch.long))
        site = "model.layers.0.mlp.up_proj"
        assert model.dtype == torch.bfloat16
        meant = load_model(written / name / "out").get_submodule(site).dequantize()
        return model.get_submodule(site).weight, meant.bfloat16()

    found, meant = weight("bfloat16")
    assert not torch.equal(found, meant)
    torch.testing.assert_close(found, meant, rtol=2**-7, atol=0)
    found, meant = weight("bfloat16_asymmetric")
    assert torch.equal(found, meant)


@pytest.mark.parametrize("name", ["symmetric4", "asymmetric4", "mixed_asymmetric"])
def test_in_float16_weights_are_the_packed_ones_rounded_once(name: str, written: Folders) -> None:
    model = load_model(written / name / "out" / KEY, torch.float16)
    logits(model, torch.zeros(1, 1, dtype=torch.long))
    site = "model.layers.0.mlp.up_proj"
    meant = load_model(written / name / "out").get_submodule(site).dequantize().half()
    assert torch.equal(model.get_submodule(site).weight, meant)


def test_a_damaged_tensor_is_noticed_and_nothing_gets_the_final_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damage(_: Path, folder: Path) -> None:
        data = bytearray((folder / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (folder / "model.safetensors").write_bytes(data)

    monkeypatch.setattr(compressed_tensors, "copy_companions", damage)
    with pytest.raises(CompressError, match=r"compressed-tensors/model\.safetensors: .* reads back differently"):
        write("llama", tmp_path, [Rtn(bits=4)], KEY)
    assert not (tmp_path / "out").exists()


def test_a_finished_folder_is_exported_with_its_tokenizer_and_nothing_else(written: Folders) -> None:
    folder = written / "symmetric4" / "out" / KEY
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "manifest.json", "README.md"
    }  # fmt: skip


# --- refused ----------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[str, list[Pass], str]] = {
    "codebook": ("llama", [Codebook(bits=4)], r"holds uniform codes only, and 14 layers .*\(codebook\).*rtn or gptq"),
    "power": ("llama", [PowerQuant(bits=4)], r"holds uniform codes only.*\(power\)"),
    "outliers": ("llama", [Olive(bits=4)], r"holds uniform codes only.*\(outlier_victim\)"),
    "corrections": ("llama", [Rtn(bits=4), Eora(rank=2)], "no place for low-rank corrections, and 14 .*export peft"),
    "inputs": ("llama", [Gptq(bits=4, activation_bits=8)], "leave activation_bits out"),
    "nothing": ("llama", [Magnitude(sparsity=0.5)], "no layer has codes.*quantize with rtn or gptq"),
    "conv1d": ("gpt2", [Rtn(bits=4)], r"packs Linear layers only, and 8 layers are not, .* \(Conv1D\)"),
    "convolutions": ("resnet", [Rtn(bits=4)], r"packs Linear layers only, .* \(Conv2d\)"),
    "nine_bits": ("llama", [Rtn(bits=4, overrides=(Override("*.0.*", {"bits": 8}),))],
                  "asymmetric codes of 8 bits, such as those of .*one setting for all, or symmetric: true"),
    "few_rows": ("few_rows", [Rtn(bits=4, group_size=16)],
                 r"cannot read the zero points of layers with as few rows as .*k_proj \(8; 4 .*symmetric: true"),
}  # fmt: skip


@pytest.mark.parametrize("options", [{"symmetric": True, "group_size": 16}, {"group_size": None}], ids=str)
def test_layers_of_few_rows_are_held_without_zero_points_or_with_one_for_a_row(
    options: dict[str, Any], tmp_path: Path
) -> None:
    report = write("few_rows", tmp_path, [Rtn(bits=4, **options)], KEY)
    assert report.verified[KEY]["max_logit_difference"] < 1e-5


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_hold_is_refused_before_any_work(name: str, tmp_path: Path) -> None:
    model, passes, message = REFUSED[name]
    with pytest.raises(ConfigError, match=f"export\\.compressed-tensors: .*{message}"):
        write(model, tmp_path, passes, KEY)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.work").exists()


def test_without_the_library_it_is_refused_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "compressed_tensors" else find(name))
    model = nn.Sequential(nn.Linear(8, 8))
    pipeline = parse("passes: [{rtn: {bits: 4}}]\nexport: [compressed-tensors]")
    with pytest.raises(ConfigError, match=r"pip install 'compress-pipeline\[compressed-tensors\]'"):
        plan.make(pipeline, graphs.find(model), {name: p.dtype for name, p in model.named_parameters()})


def test_biases_that_layers_were_given_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no place for the biases .*leave new biases out"):
        write("llama", tmp_path, [Magnitude(sparsity=0.5), Eora(rank=2, bias=True), Rtn(bits=4)], KEY)


def test_what_is_known_of_all_layers_is_gathered_once_and_not_for_every_layer(
    written: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    gathered: list[int] = []

    def counting(made: Any) -> Any:
        gathered.append(1)
        return specs_in(made)

    made = open_packed(written / "mixed_asymmetric" / "out")  # written now, where no test has asked for it yet
    monkeypatch.setattr(pack_quantized, "specs_in", counting)
    packing = pack_quantized.Packing(made)
    for owner, entries in packing.layout():
        assert packing.read(owner).keys() == {name for name, _, _ in entries}
    assert packing.config()["config_groups"]
    assert len(gathered) == 1
