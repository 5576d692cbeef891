"""Layers that engines multiply as one matrix: what is refused of them, and that those of NVFP4 share a scale."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import make_llama
from written import write

import compress
from compress import ConfigError, Gptq, Override, Rtn
from compress.encodings import Floats
from compress.models.fused import fused_groups
from compress.models.graph import find
from compress.passes import Pass

pytestmark = pytest.mark.usefixtures("one_thread")

FOUR = {"bits": 4, "group_size": 32, "symmetric": True}
ENGINES = ("compressed-tensors", "gptq", "awq")
QKV = ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj", "model.layers.1.self_attn.v_proj"]
NVFP4 = {"grid": "nvfp4", "bits": 4, "group_size": 16}


def test_queries_keys_and_values_are_a_group_and_gate_and_up() -> None:
    groups = fused_groups(find(make_llama()).sites)
    assert len(groups) == 4
    assert groups["model.layers.1.self_attn.qkv_proj"] == QKV
    assert groups["model.layers.0.mlp.gate_up_proj"] == ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"]


@pytest.mark.parametrize("key", ENGINES)
def test_a_dense_member_of_a_group_is_refused_before_the_run(key: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        write("llama", tmp_path, [Rtn(**FOUR, exclude=("*.1.*.k_proj",))], key)  # type: ignore[arg-type]
    said = str(raised.value)
    assert f"export.{key}: engines multiply some layers of model.layers.1.self_attn as one matrix" in said
    assert "q_proj symmetric 4 bits in groups of 32, k_proj dense, v_proj symmetric" in said
    assert "(1 such groups in all); give all of a group the same options" in said


DIFFERING: list[tuple[Sequence[str], Override]] = [
    (("compressed-tensors", "gptq"), Override("*.up_proj", {"bits": 8})),
    (("compressed-tensors", "gptq"), Override("*.v_proj", {"group_size": 64})),
    (("compressed-tensors",), Override("*.q_proj", {"grid": "fp8", "bits": 8, "group_size": None, "symmetric": False})),
]


@pytest.mark.parametrize(("keys", "override"), DIFFERING, ids=["bits", "groups", "grid"])
def test_members_of_several_schemes_are_refused_before_the_run(
    keys: Sequence[str], override: Override, tmp_path: Path
) -> None:
    for key in keys:
        with pytest.raises(ConfigError, match=r"\(2 such groups in all\)"):
            write("llama", tmp_path, [Rtn(**FOUR, overrides=(override,))], key)  # type: ignore[arg-type]


def test_a_finished_folder_is_refused_too_and_whole_groups_are_not(tmp_path: Path) -> None:
    write("llama", tmp_path, [Rtn(**FOUR, exclude=("*.down_proj",), overrides=(Override("*.q_proj", {"bits": 8}),))])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="q_proj symmetric 8 bits in groups of 32, k_proj symmetric 4 bits"):
        compress.export_to(tmp_path / "out", [compress.CompressedTensors()])
    assert not (tmp_path / "out" / "compressed-tensors").exists()
    whole = (Override("*.[qkv]_proj", {"bits": 8}),)
    (tmp_path / "whole").mkdir()
    report = write("llama", tmp_path / "whole", [Rtn(**FOUR, exclude=("*.down_proj",), overrides=whole)], "gptq")  # type: ignore[arg-type]
    assert "gptq" in report.verified


@pytest.mark.parametrize("pass_", [Rtn(**NVFP4), Gptq(**NVFP4)], ids=["rtn", "gptq"])  # type: ignore[arg-type]
def test_members_of_a_group_share_the_outer_scale_of_nvfp4(pass_: Pass) -> None:
    model = make_llama()
    model.get_submodule(QKV[1]).weight.data.mul_(20)
    weights = compress.apply(model, [pass_], calibration=torch.randint(256, (8, 24))).weights

    def outer(name: str) -> float:
        encoding = weights[name].encoding
        assert isinstance(encoding, Floats)
        assert encoding.outer_scale is not None
        return float(encoding.outer_scale)

    assert len({outer(name) for name in QKV}) == 1
    assert outer("model.layers.0.self_attn.k_proj") < outer(QKV[1])
    assert outer("model.layers.1.self_attn.o_proj") < outer(QKV[1])
