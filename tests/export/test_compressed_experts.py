"""OUT/compressed-tensors of mixtures: a matrix for each expert, as the hub names them, that others read to the bit."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from alone import logits_alone
from expert_models import make_mixture
from once import Folders
from selection import only
from torch import Tensor
from written import logits, tensors

import compress
from compress import ConfigError, Magnitude, Override, Pipeline, Rtn
from compress.config.pipeline import FORMATS
from compress.models.loading import load_model
from compress.passes import Pass

library = pytest.importorskip("compressed_tensors")
pytestmark = pytest.mark.usefixtures("one_thread")

KEY = "compressed-tensors"
TOKENS = torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(5))
WIDE: dict[str, dict[str, Any]] = {
    "Mixtral": {"intermediate_size": 128},
    "Qwen3Moe": {"moe_intermediate_size": 64, "num_experts": 12},  # 2 before 10
    "DeepseekV3": {"moe_intermediate_size": 64},
}
# Kind -> layer of an expert's gate on the hub.
NAMES = {
    "Mixtral": "model.layers.1.block_sparse_moe.experts.{}.w1",
    "Qwen3Moe": "model.layers.1.mlp.experts.{}.gate_proj",
    "DeepseekV3": "model.layers.1.mlp.experts.{}.gate_proj",
}
SETTINGS: dict[str, dict[str, Any]] = {
    **{f"w4-{size}-{symmetric}": {"bits": 4, "group_size": size, "symmetric": symmetric}
       for size in (32, 64, None) for symmetric in (True, False)},
    "w8-32": {"bits": 8, "group_size": 32, "symmetric": True},
    "w8-channel": {"bits": 8, "symmetric": True},
    "differing": {"bits": 3, "group_size": 32, "symmetric": True, "overrides": (
        Override("*.self_attn.*", {"bits": 4, "symmetric": False}), Override("*.experts.down_proj.1", {"bits": 5}),
        Override("*.experts.down_proj.2", {"group_size": None}), Override("*.experts.gate_up_proj.0", {"bits": 2}),
    )},
    "bfloat16": {"bits": 4, "group_size": 32, "symmetric": True},
}  # fmt: skip
FEW = ("w4-32-True", "w4-64-False", "w8-channel", "differing", "bfloat16")
CASES = [(kind, name) for kind in WIDE for name in (SETTINGS if kind == "Mixtral" else FEW)]
QUICK = [("Mixtral", "differing"), ("DeepseekV3", "bfloat16"), ("Mixtral", "w4-32-True")]


def write(kind: str, folder: Path, passes: list[Pass], dtype: torch.dtype = torch.float32, **changes: Any) -> None:
    make_mixture(kind, **{**WIDE.get(kind, {}), **changes}).to(dtype).save_pretrained(folder / "model")
    pipeline = Pipeline(passes=tuple((p,) for p in passes), export=(FORMATS[KEY](),))
    compress.run(pipeline, folder / "model", folder / "out", calibration=TOKENS, evaluation=TOKENS)


def section_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / KEY / "config.json").read_text())
    return found["quantization_config"]  # type: ignore[no-any-return]


def rtn(name: str) -> Rtn:
    """One of the settings, for layers of any width."""
    options = SETTINGS[name]
    return Rtn(**options, **({"fallback": "channel"} if options.get("group_size") else {}))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Every case, in a folder of its own."""

    def make_folder(case: str, folder: Path) -> None:
        kind, _, name = case.partition("-")
        write(kind, folder, [rtn(name)], torch.bfloat16 if name == "bfloat16" else torch.float32)

    return Folders(tmp_path_factory.mktemp("experts"), make_folder)


@pytest.mark.real
def test_transformers_loads_every_case_without_this_package_and_computes_the_same_bits(written: Folders) -> None:
    names = [f"{kind}-{name}" for kind, name in CASES]
    exact = {"dtype": "float32", "experts_implementation": "eager"}
    asked: dict[str, tuple[str, dict[str, Any]]] = {name: (str(written / name / "out" / KEY), exact) for name in names}
    # As users load it:
    asked |= {f"{name}-plain": (asked[name][0], {}) for name in names if name.endswith("bfloat16")}
    alone = logits_alone(written.root, asked, TOKENS)
    for name in names:
        if name.endswith("bfloat16"):
            # A token may be sent to another expert; all else differs by what bfloat16 rounds.
            assert (alone[f"{name}-plain"].float() - alone[name]).abs().mean() < 0.1, name
        assert torch.equal(alone[name], logits(load_model(written / name / "out", torch.float32), TOKENS)), name


@pytest.mark.parametrize(("kind", "name"), only(QUICK, CASES))
def test_the_library_unpacks_the_very_weights_of_every_expert(kind: str, name: str, written: Folders) -> None:
    folder = written / f"{kind}-{name}"
    packed, there = load_model(folder / "out", torch.float32), tensors(folder / "out" / KEY)
    group = next(iter(section_of(folder)["config_groups"].values()))
    scheme = library.quantization.QuantizationScheme.model_validate(group)
    assert scheme.weights.symmetric  # transformers and vLLM read no zero points of experts
    compressor = library.BaseCompressor.load_from_registry("pack-quantized")

    def unpacked(layer: str) -> Tensor:
        leaves = {key.rpartition(".")[2]: value for key, value in there.items() if key.startswith(f"{layer}.")}
        assert leaves["weight_scale"].dtype == torch.float32
        found: Tensor = compressor.decompress(leaves, scheme)["weight"]
        return found

    experts = packed.model.layers[1].mlp.experts
    gate, up, down = ("w1", "w3", "w2") if kind == "Mixtral" else ("gate_proj", "up_proj", "down_proj")
    for number in range(len(experts.gate_up_proj)):
        owner = NAMES[kind].format(number).rpartition(".")[0]
        joined = torch.cat([unpacked(f"{owner}.{gate}"), unpacked(f"{owner}.{up}")])
        assert torch.equal(joined, experts.gate_up_proj[number])
        assert torch.equal(unpacked(f"{owner}.{down}"), experts.down_proj[number])


@pytest.mark.parametrize(("kind", "name"), only(QUICK, CASES))
def test_the_written_logits_are_those_of_the_packed_model(kind: str, name: str, written: Folders) -> None:
    report = json.loads((written / f"{kind}-{name}" / "out" / "report.json").read_text())["verified"][KEY]
    assert report["max_logit_difference"] == 0
    assert report["tensors_equal"] == len(tensors(written / f"{kind}-{name}" / "out" / KEY))


def test_codes_take_their_own_bits_and_those_with_zero_points_one_more(written: Folders) -> None:
    for symmetric, bits in ((True, 4), (False, 5)):
        there = tensors(written / f"Qwen3Moe-w4-{32 if symmetric else 64}-{symmetric}" / "out" / KEY)
        layer = NAMES["Qwen3Moe"].format(10)
        assert there[f"{layer}.weight_packed"].shape == (64, 64 * bits // 32)
        assert there[f"{layer}.weight_scale"].shape == (64, 2 if symmetric else 1)
        assert there[f"{layer}.weight_shape"].tolist() == [64, 64]
        assert f"{layer}.weight_zero_point" not in there


def test_one_setting_for_all_is_one_group_of_linear_layers_without_routers_and_head(written: Folders) -> None:
    section = section_of(written / "Mixtral-w4-32-True")
    assert [g["targets"] for g in section["config_groups"].values()] == [["Linear"]]
    assert {"lm_head", "model.layers.0.mlp.gate", "model.layers.0.block_sparse_moe.gate"} <= set(section["ignore"])
    assert "model.layers.1.mlp.gate" in section_of(written / "DeepseekV3-w8-channel")["ignore"]


@pytest.mark.parametrize("kind", only(["Mixtral", "DeepseekV3"], WIDE))
def test_experts_that_differ_share_the_setting_that_holds_all_of_them(kind: str, written: Folders) -> None:
    section = section_of(written / f"{kind}-differing")
    first, *others = section["config_groups"].values()
    assert (first["weights"]["num_bits"], first["weights"]["group_size"]) == (5, 32)
    pattern = first["targets"][0]
    for number in (0, 3):  # transformers knows the group by this word, vLLM by the layer of the first expert
        assert re.match(pattern.removeprefix("re:"), NAMES[kind].format(number))
        assert re.match(pattern.removeprefix("re:"), NAMES[kind].format(number).rpartition(".")[0] + ".gate_proj")
    assert "experts" in pattern
    layers = [*first["targets"][1:], *(target for group in others for target in group["targets"])]
    assert layers
    assert not any("experts" in target for target in layers)
    if kind == "DeepseekV3":
        shared = "model.layers.1.mlp.shared_experts.up_proj"
        assert sum(bool(re.match(target.removeprefix("re:"), shared)) for target in [pattern, *layers]) == 1


def test_experts_that_stay_dense_keep_the_name_that_transformers_reads(tmp_path: Path) -> None:
    write("Qwen3Moe", tmp_path, [Rtn(bits=4, symmetric=True, exclude=("*.0.mlp.experts.*", "*.1.*.gate_up_proj.*"))])
    there = tensors(tmp_path / "out" / KEY)
    assert "model.layers.0.mlp.experts.gate_up_proj" in there
    assert "model.layers.1.mlp.experts.gate_up_proj" in there
    assert "model.layers.1.mlp.experts.0.down_proj.weight_packed" in there
    assert not any(name.startswith("model.layers.0.mlp.experts.0") for name in there)


def test_zero_points_of_layers_are_kept_beside_experts(tmp_path: Path) -> None:
    write("DeepseekV3", tmp_path, [Rtn(bits=4, group_size=16)], q_lora_rank=32, kv_lora_rank=32)
    section = section_of(tmp_path)
    assert section["dequantize"] is True
    bits = [(g["weights"]["num_bits"], g["weights"]["symmetric"]) for g in section["config_groups"].values()]
    assert bits == [(5, True), (4, False)]
    assert "model.layers.1.mlp.shared_experts.up_proj.weight_zero_point" in tensors(tmp_path / "out" / KEY)


REFUSED: dict[str, tuple[str, list[Pass], str]] = {
    **{kind: (kind, [Rtn(bits=4)], rf"checkpoints of {kind}\w* on the hub have none for each expert")
       for kind in ("GptOss", "GraniteMoe", "Dbrx", "Llama4", "JetMoe")},
    "eight": ("Mixtral", [Rtn(bits=8)], "asymmetric codes of 8 bits.* in no experts; set symmetric: true"),
    "some": ("Qwen3Moe", [Rtn(bits=4, exclude=("*.0.*.gate_up_proj.3",))],
             r"reads no other experts beside packed ones, and 1 are not packed, such as .*gate_up_proj\.3"),
    "pruned": ("Qwen3Moe", [Magnitude(sparsity=0.5), Rtn(bits=4, exclude=("*.0.*.down_proj.3",))],
               r"beside packed ones, and 1 are not packed, such as .*down_proj\.3"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_hold_is_refused_before_any_work(name: str, tmp_path: Path) -> None:
    kind, passes, message = REFUSED[name]
    with pytest.raises(ConfigError, match=f"export\\.compressed-tensors: .*{message}"):
        write(kind, tmp_path, copy.deepcopy(passes))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.work").exists()
