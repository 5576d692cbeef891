"""OUT/mlx: the documented layout, read code by code, has the packed model's very values."""

import json
from pathlib import Path
from typing import Any

import layouts
import pytest
import torch
from written import tensors, write

from compress import Mlx, Override, Rtn
from compress.encodings import Uniform
from compress.export.pack_quantized import Scheme, Steps
from compress.models.loading import load_model
from compress.passes import Pass

pytestmark = pytest.mark.usefixtures("one_thread")

OTHERS = (Override("*.0.mlp.*", {"bits": 8, "group_size": 32}), Override("*.1.self_attn.*", {"symmetric": False}))
CASES: dict[str, list[Pass]] = {
    "differing": [Rtn(bits=4, group_size=64, symmetric=True, exclude=("*.1.mlp.*",), overrides=OTHERS)],
    "rows": [Rtn(bits=3)],
    "embeddings": [Rtn(bits=6, group_size=32, symmetric=True, embeddings={"bits": 8})],
}


def section_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / "mlx" / "config.json").read_text())
    return found["quantization"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("bits", Mlx.widths)
def test_words_hold_codes_and_biases_are_minus_zero_point_times_scale(bits: int) -> None:
    exporter = Mlx()
    for symmetric in (True, False):
        made, scheme = layouts.rounded(bits, symmetric, groups=2), Scheme(bits, symmetric, 32)
        there = exporter.packed(scheme, Steps.of(made, 2))
        assert there["weight"].shape == (32, 64 * bits // 32)
        assert there["scales"].dtype == there["biases"].dtype == (torch.float16 if symmetric else torch.float32)
        assert torch.equal(layouts.mlx(there, bits), made.dequantize())
        assert torch.equal(exporter.unpacked(scheme, there), made.dequantize())


def test_a_bias_beside_a_scale_that_is_no_float16_is_the_nearest_float32_and_a_further_one_is_noticed() -> None:
    made, scheme, exporter = layouts.rounded(4, False, 2), Scheme(4, False, 32), Mlx()
    tiny = Uniform(made.codes, made.scale.float() / 3e5, made.zero_point, 4, False)
    there = exporter.packed(scheme, Steps.of(tiny, 2))
    torch.testing.assert_close(layouts.mlx(there, 4), tiny.dequantize(), rtol=1e-5, atol=1e-11)
    assert torch.equal(exporter.unpacked(scheme, there), tiny.dequantize())
    there["biases"][3, 1] = torch.nextafter(there["biases"][3, 1], torch.zeros(()))
    assert not torch.equal(exporter.unpacked(scheme, there), tiny.dequantize())


@pytest.mark.parametrize("name", CASES)
def test_every_layer_is_as_its_entry_says_and_has_the_values_of_the_packed_model(name: str, tmp_path: Path) -> None:
    write("llama", tmp_path, CASES[name], "mlx")
    section, there, packed = section_of(tmp_path), tensors(tmp_path / "out" / "mlx"), load_model(tmp_path / "out")
    layers = [key.removesuffix(".scales") for key in there if key.endswith(".scales")]
    for layer in layers:
        said = section.get(layer, section)
        leaves = layouts.values(there, layer)
        assert said["mode"] == "affine"
        assert len(leaves["scales"].T) == 32 * len(leaves["weight"].T) // said["bits"] // said["group_size"]
        assert torch.equal(layouts.mlx(leaves, said["bits"]), packed.get_submodule(layer).dequantize())
    dense = [key for key, value in section.items() if value is False]
    if name == "embeddings":
        assert len(layers) == 16
        assert {"model.embed_tokens", "lm_head"} <= set(layers)
        assert not dense
    else:
        assert "lm_head" in dense
        assert len(layers) + len(dense) == 15
