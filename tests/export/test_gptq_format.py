"""OUT/gptq: the documented layout, read code by code, has the packed model's very values."""

import json
import re
from pathlib import Path
from typing import Any

import layouts
import pytest
import torch
from conftest import make_llama
from expert_models import make_mixture
from safetensors.torch import load_file, save_file
from written import tensors, write

import compress
from compress import ConfigError, GptqFormat, Magnitude, Override, Rtn
from compress.config.reading import parse
from compress.errors import CompressError
from compress.export.pack_quantized import Scheme, Steps
from compress.models.loading import load_model
from compress.passes import Pass

pytestmark = pytest.mark.usefixtures("one_thread")

KEY = "gptq"
OTHERS = (Override("*.0.mlp.*", {"bits": 8, "group_size": 64}), Override("*.1.self_attn.*", {"symmetric": True}))
CASES: dict[str, list[Pass]] = {
    "symmetric": [Rtn(bits=4, group_size=32, symmetric=True)],
    "three": [Rtn(bits=3, group_size=32)],
    "rows": [Rtn(bits=8, symmetric=True)],
    "sparse": [Magnitude(sparsity="2:4"), Rtn(bits=2, granularity="tensor", symmetric=True)],
    "differing": [Rtn(bits=4, group_size=32, exclude=("*.1.mlp.*",), overrides=OTHERS)],
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case, each in a folder of its own; to be read only."""
    folder = tmp_path_factory.mktemp("gptq")
    for name, passes in CASES.items():
        (folder / name).mkdir()
        write("llama", folder / name, passes, KEY)
    return folder


def section_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / KEY / "config.json").read_text())
    return found["quantization_config"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("bits", GptqFormat.widths)
def test_words_hold_codes_scales_and_zero_points_where_the_layout_says(bits: int) -> None:
    for version in ("gptq", "gptq_v2"):
        for symmetric, groups in ((True, 1), (False, 1), (False, 2)):
            made, exporter = layouts.rounded(bits, symmetric, groups), GptqFormat(checkpoint_format=version)
            scheme = Scheme(bits, symmetric, 64 // groups if groups > 1 else None)
            there = exporter.packed(scheme, Steps.of(made, groups))
            assert there["qweight"].shape == (64 * bits // 32, 32)
            assert there["qzeros"].shape == (groups, bits)
            assert there["g_idx"].tolist() == [column * groups // 64 for column in range(64)]
            read = layouts.gptq(there, bits, less=int(version == "gptq"))
            assert torch.equal(read, made.dequantize())
            assert torch.equal(exporter.unpacked(scheme, there), made.dequantize())


@pytest.mark.parametrize("name", CASES)
def test_every_layer_of_the_file_has_the_values_of_the_packed_model(name: str, written: Path) -> None:
    folder, section = written / name, section_of(written / name)
    packed, there = load_model(folder / "out"), tensors(folder / "out" / KEY)
    layers = [key.removesuffix(".qweight") for key in there if key.endswith(".qweight")]
    assert len(layers) == (11 if name == "differing" else 14)
    for layer in layers:
        said = {**section, **section.get("dynamic", {}).get(f"+:^{re.escape(layer)}$", {})}
        leaves = layouts.values(there, layer)
        assert torch.equal(layouts.gptq(leaves, said["bits"]), packed.get_submodule(layer).dequantize())
        size = said["group_size"]
        assert len(leaves["scales"]) == (1 if size < 0 else len(leaves["g_idx"]) // size)
        assert leaves["scales"].dtype == torch.float16


def test_the_configuration_names_what_engines_ask_for(written: Path) -> None:
    section = section_of(written / "symmetric")
    wanted = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False, "lm_head": False}
    assert {**wanted, "checkpoint_format": "gptq"}.items() <= section.items()
    assert not {"dynamic", "modules_in_block_to_quantize"} & section.keys()
    assert section_of(written / "rows")["group_size"] == -1
    folder = written / "symmetric" / "out" / KEY
    assert json.loads((folder / "quantize_config.json").read_text()) == section
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "quantize_config.json", "model.safetensors", "generation_config.json", "tokenizer.json",
        "manifest.json", "README.md",
    }  # fmt: skip


def test_layers_that_differ_are_rules_of_their_own_and_dense_ones_are_left_out(written: Path) -> None:
    section = section_of(written / "differing")
    rules = section["dynamic"]
    assert rules[r"+:^model\.layers\.0\.mlp\.up_proj$"] == {"bits": 8, "group_size": 64, "sym": False}
    assert rules[r"-:^model\.layers\.1\.mlp\.up_proj$"] == {}
    for whole in ("0.mlp.gate_up_proj", "1.mlp.gate_up_proj"):  # by which vLLM looks
        own = next(rule for name, rule in rules.items() if re.match(name[2:], f"model.layers.{whole}"))
        assert own == ({} if whole.startswith("1") else {"bits": 8, "group_size": 64, "sym": False})
    assert len(rules) == 8
    assert (section["bits"], section["group_size"], section["sym"]) == (4, 32, False)
    (quantized,) = section["modules_in_block_to_quantize"]
    assert len(quantized) == 11
    assert not [name for name in quantized if name.startswith("model.layers.1.mlp")]
    there = tensors(written / "differing" / "out" / KEY)
    dense = load_model(written / "differing" / "out").model.layers[1].mlp.up_proj.weight
    assert torch.equal(there["model.layers.1.mlp.up_proj.weight"], dense)


def test_a_group_as_wide_as_a_row_is_a_group_where_others_have_groups_as_wide(tmp_path: Path) -> None:
    write("llama", tmp_path, [Rtn(bits=4, group_size=64, symmetric=True)], KEY)
    assert section_of(tmp_path)["group_size"] == 64
    assert "dynamic" not in section_of(tmp_path)


def test_dense_experts_have_the_names_of_the_hub_and_packed_ones_are_refused(tmp_path: Path) -> None:
    make_mixture("Qwen3Moe").save_pretrained(tmp_path / "model")
    tokens = torch.arange(48).view(2, 24)
    pipeline = parse("passes: [{rtn: {bits: 4, group_size: 32, exclude: ['*experts*']}}]\nexport: [gptq]")
    compress.run(pipeline, tmp_path / "model", tmp_path / "out", calibration=tokens)
    there = tensors(tmp_path / "out" / KEY)
    assert "model.layers.0.mlp.experts.3.gate_proj.weight" in there
    assert "model.layers.0.self_attn.q_proj.qweight" in there
    assert r"-:^model\.layers\.0\.mlp\.gate$" in section_of(tmp_path)["dynamic"]
    whole = parse("passes: [{rtn: {bits: 4}}]\nexport: [gptq]")
    with pytest.raises(ConfigError, match=r"the layout of GPTQ holds layers, and 32 .* are experts"):
        compress.run(whole, tmp_path / "model", tmp_path / "other", calibration=tokens)


# --- zero points of 0 -------------------------------------------------------------------------------------------------


def positive(highest: int) -> Steps:
    """Two groups, of which the second has no negative weights and codes up to some number."""
    codes = torch.zeros(32, 64, dtype=torch.uint8)
    codes[:, 40] = highest
    zero = torch.tensor([[5, 0]] * 32, dtype=torch.uint8)
    return Steps(codes, torch.ones(32, 2, dtype=torch.float16), zero)


def test_a_zero_point_of_0_is_written_as_1_with_higher_codes_for_no_reader_to_carry_from_it() -> None:
    steps, scheme = positive(14), Scheme(4, False, 32)
    there = GptqFormat().packed(scheme, steps)
    assert layouts.along(there["qzeros"], 4).unique().tolist() == [0, 4]
    read = layouts.gptq(there, 4)
    assert read[0, [0, 32, 40]].tolist() == [-5, 0, 14]


def test_beside_the_highest_code_it_needs_version_2_and_the_message_names_layer_and_option(tmp_path: Path) -> None:
    steps, scheme = positive(15), Scheme(4, False, 32)
    with pytest.raises(CompressError, match=r"zero point of 0.*checkpoint_format: gptq_v2"):
        GptqFormat().packed(scheme, steps)
    there = GptqFormat(checkpoint_format="gptq_v2").packed(scheme, steps)
    assert layouts.gptq(there, 4, less=0)[0, [0, 32, 40]].tolist() == [-5, 0, 15]

    file = tmp_path / "model" / "model.safetensors"
    make_llama().save_pretrained(file.parent)
    weights = load_file(file)
    weights["model.layers.1.mlp.up_proj.weight"].abs_()
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(CompressError, match=r"model\.layers\.1\.mlp\.up_proj: a zero point of 0"):
        write("llama", tmp_path, [Rtn(bits=4, group_size=32)], KEY)
