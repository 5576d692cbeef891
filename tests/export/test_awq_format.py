"""OUT/awq: the documented layout, read code by code, has the packed model's very values."""

import json
from pathlib import Path
from typing import Any

import layouts
import pytest
import torch
from written import tensors, write

from compress import AwqFormat, Override, Rtn
from compress.export.pack_quantized import Scheme, Steps
from compress.models.loading import load_model
from compress.passes import Pass

pytestmark = pytest.mark.usefixtures("one_thread")

OTHERS = (Override("*.0.mlp.*", {"group_size": 32}), Override("*.1.self_attn.*", {"symmetric": True}))
CASES: dict[str, tuple[list[Pass], int]] = {
    "alike": ([Rtn(bits=4, group_size=32)], 32),
    "rows": ([Rtn(bits=4, symmetric=True)], -1),
    "differing": ([Rtn(bits=4, exclude=("*.1.mlp.*",), overrides=OTHERS)], 32),
}


def section_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / "awq" / "config.json").read_text())
    return found["quantization_config"]  # type: ignore[no-any-return]


def test_words_hold_codes_scales_and_zero_points_where_the_layout_says() -> None:
    exporter = AwqFormat()
    for symmetric, groups in ((True, 1), (False, 1), (False, 2)):
        made, scheme = layouts.rounded(4, symmetric, groups), Scheme(4, symmetric, 64 // groups)
        there = exporter.packed(scheme, Steps.of(made, groups))
        assert there["qweight"].shape == (64, 4)
        assert there["qzeros"].shape == (groups, 4)
        assert torch.equal(layouts.awq(there), made.dequantize())
        assert torch.equal(exporter.unpacked(scheme, there), made.dequantize())


@pytest.mark.parametrize("name", CASES)
def test_all_layers_have_one_group_size_and_the_values_of_the_packed_model(name: str, tmp_path: Path) -> None:
    passes, size = CASES[name]
    write("llama", tmp_path, passes, "awq")
    section, there, packed = section_of(tmp_path), tensors(tmp_path / "out" / "awq"), load_model(tmp_path / "out")
    assert {"quant_method": "awq", "version": "gemm", "bits": 4, "zero_point": True}.items() <= section.items()
    assert section["group_size"] == size
    layers = [key.removesuffix(".qweight") for key in there if key.endswith(".qweight")]
    for layer in layers:
        leaves = layouts.values(there, layer)
        assert torch.equal(layouts.awq(leaves), packed.get_submodule(layer).dequantize())
        assert len(leaves["scales"]) == (1 if size < 0 else len(leaves["qweight"]) // size)
    dense = section["modules_to_not_convert"]
    assert len(dense) + len(layers) == 15
    assert dense[-1] == "lm_head"
    assert ("model.layers.1.mlp.up_proj" in dense) == (name == "differing")
