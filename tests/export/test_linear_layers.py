"""What the folders `gptq`, `awq` and `mlx` have in common: what they refuse, and that damage is noticed."""

from pathlib import Path

import pytest
from selection import only
from written import write

from compress import Codebook, ConfigError, Eora, Gptq, Magnitude, Override, Rtn
from compress.errors import CompressError
from compress.export import linear_layers
from compress.passes import Pass

pytestmark = pytest.mark.usefixtures("one_thread")

REFUSED: dict[str, tuple[str, str, list[Pass], str]] = {
    "codebook": ("gptq", "llama", [Codebook(bits=4)],
                 r"holds uniform codes only, and 14 layers .*\(codebook\).*rtn or gptq"),
    "corrections": ("gptq", "llama", [Rtn(bits=4), Eora(rank=2)],
                    "no place for low-rank corrections, and 14 .*export peft"),
    "inputs": ("gptq", "llama", [Gptq(bits=4, activation_bits=8)], "leave activation_bits out"),
    "biases": ("gptq", "llama", [Magnitude(sparsity=0.5), Eora(rank=2, bias=True), Rtn(bits=4)],
               "no place for the biases"),
    "nothing": ("gptq", "llama", [Magnitude(sparsity=0.5)], "no layer has codes.*quantize with rtn or gptq"),
    "conv1d": ("gptq", "gpt2", [Rtn(bits=4)], r"packs Linear layers only, and 8 layers are not, .* \(Conv1D\)"),
    "gptq_bits": ("gptq", "llama", [Rtn(bits=4, overrides=(Override("*.0.*", {"bits": 5}),))],
                  r"codes of 2, 3, 4 or 8 bits, and 7 layers have others, such as .* \(5\); set bits: 8"),
    "gptq_groups": ("gptq", "llama", [Rtn(bits=4, group_size=8)],
                    r"a scale for each row or for 16, .* 512 or 1024 columns, and 14 .* \(8\); set group_size: 128"),
    "gptq_rows": ("gptq", "few_rows", [Rtn(bits=3)],
                  r"whole words of 32 bits .* 4 layers have too few .*k_proj \(8 x 64\); multiples of 32"),
    "awq_bits": ("awq", "llama", [Rtn(bits=3, group_size=32)], r"codes of 4 bits, and 14 .* \(3\); set bits: 4"),
    "awq_groups": ("awq", "llama", [Rtn(bits=4, group_size=32, overrides=(Override("*.k_proj", {"group_size": 8}),))],
                   r"a scale for each row or for 16, 32, 64 or 128 columns, and 14 .* \(8\); set group_size: 128"),
    "awq_rows": ("awq", "odd_rows", [Rtn(bits=4)], r"8 rows in a word, and 4 layers .*k_proj \(12\)"),
    "mlx_bits": ("mlx", "llama", [Rtn(bits=7, group_size=32)], r"codes of 2, 3, 4, 5, 6 or 8 bits.*set bits: 8"),
    "mlx_groups": ("mlx", "llama", [Rtn(bits=4, group_size=16)], r"for 32, 64 or 128 columns, .* \(16\)"),
    "mlx_corrections": ("mlx", "llama", [Rtn(bits=4), Eora(rank=2)], "MLX has no place for low-rank corrections"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_layout_cannot_hold_is_refused_before_any_work(name: str, tmp_path: Path) -> None:
    key, model, passes, message = REFUSED[name]
    with pytest.raises(ConfigError, match=f"export\\.{key}: .*{message}"):
        write(model, tmp_path, passes, key)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.work").exists()


def flipped(folder: Path, name: str) -> None:
    """One bit of one tensor of a folder is another."""
    stored = linear_layers.read_header(folder / "model.safetensors").tensors[name]
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[stored.begin + 2] ^= 1
    (folder / "model.safetensors").write_bytes(data)


@pytest.mark.parametrize("key", ["gptq", "awq", "mlx"])
@pytest.mark.parametrize(
    "leaf",
    only(["layers.1.mlp.up_proj.scales"], ["layers.1.mlp.up_proj.scales", "layers.0.mlp.down_proj", "norm.weight"]),
)
def test_a_damaged_tensor_is_noticed_and_nothing_gets_the_final_name(
    key: str, leaf: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaf += "" if leaf.endswith(("scales", "weight")) else ".weight" if key == "mlx" else ".qweight"
    monkeypatch.setattr(linear_layers, "copy_companions", lambda _, folder: flipped(folder, f"model.{leaf}"))
    with pytest.raises(CompressError, match=rf"{key}/model\.safetensors: model\..* reads back differently"):
        write("llama", tmp_path, [Rtn(bits=4, group_size=32, symmetric=True)], key)
    assert not (tmp_path / "out").exists()
