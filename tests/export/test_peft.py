"""OUT/peft: an adapter as the PEFT library has them, and the base it belongs to."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from once import Folders
from safetensors.torch import load_file
from selection import only
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from written import MODELS, QUICK, data_for, logits, tensors, write

from compress import ConfigError, Eora, Gptq, Magnitude, Override, Rtn
from compress.config.reading import parse
from compress.errors import CompressError
from compress.models import graph as graphs
from compress.models.loading import load_model
from compress.passes import Pass
from compress.passes.compensate import eora
from compress.planning import plan

BY_LAYER = Override("*.1.*", {"rank": 5})  # the second block of each
PASSES: list[Pass] = [Magnitude(sparsity=0.5), Rtn(bits=3), Eora(rank=2, overrides=(BY_LAYER,))]
# bfloat16 has eight bits: W x, B (A x) and their sum are rounded to them, where the packed layer rounds W + B A.
TOLERANCE = {"bfloat16": 3e-2}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Every model, each in a folder of its own."""

    def make_folder(name: str, folder: Path) -> None:
        folder.mkdir()
        write(name, folder, PASSES, "peft")

    return Folders(tmp_path_factory.mktemp("peft"), make_folder)


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / "peft" / "adapter_config.json").read_text())
    return found


def adapter(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(folder / "out" / "peft" / "adapter_model.safetensors")
    return found


def factors(folder: Path, site: str) -> tuple[Tensor, Tensor]:
    """As PEFT reads them."""
    there = adapter(folder)
    return there[f"base_model.model.{site}.lora_A.weight"], there[f"base_model.model.{site}.lora_B.weight"]


def added_by_hand(folder: Path) -> nn.Module:
    """The base with every B A added to its weight."""
    config, model = config_of(folder), load_model(folder / "out" / "peft" / "base", torch.float32)
    for site in config["target_modules"]:
        weight = model.get_submodule(site).weight
        a, b = (factor.float().flatten(1) for factor in factors(folder, site))
        rank = config["rank_pattern"].get(site, config["r"])
        product = config["alpha_pattern"].get(site, config["lora_alpha"]) / rank * (b @ a)
        product = product.T if config["fan_in_fan_out"] else product.reshape(weight.shape)
        weight.data = weight.data + product
    return model


def closeness(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max() / b.float().abs().max())


@pytest.mark.parametrize("name", only(QUICK, MODELS))
def test_the_base_with_the_adapter_added_is_the_packed_model(name: str, written: Folders) -> None:
    folder, (inputs, _) = written / name, data_for(name)
    model, packed = added_by_hand(folder), load_model(folder / "out", torch.float32)
    assert closeness(logits(model, inputs), logits(packed, inputs)) < TOLERANCE.get(name, 1e-5)
    without = load_model(folder / "out" / "peft" / "base", torch.float32)
    assert closeness(logits(without, inputs), logits(packed, inputs)) > 0.1, "the corrections matter"


@pytest.mark.parametrize("name", only(QUICK, MODELS))
def test_every_layer_is_named_with_its_rank_and_nothing_is_scaled(name: str, written: Folders) -> None:
    folder = written / name
    config = config_of(folder)
    modules = json.loads((folder / "out" / "config.json").read_text())["quantization_config"]["modules"]
    ranks = {site: spec["low_rank"]["rank"] for site, spec in modules.items()}
    assert set(ranks.values()) == {2, 5}
    assert set(config["target_modules"]) == ranks.keys()
    assert config["r"] == config["lora_alpha"] == Counter(ranks.values()).most_common(1)[0][0]
    assert config["rank_pattern"] == config["alpha_pattern"] == {s: r for s, r in ranks.items() if r != config["r"]}
    assert config["fan_in_fan_out"] == (name == "gpt2")
    assert config["task_type"] == (None if name == "resnet" else "CAUSAL_LM")
    assert config["peft_type"] == "LORA"
    assert len(adapter(folder)) == 2 * len(ranks)
    for site, rank in ranks.items():
        a, b = factors(folder, site)
        rows, columns = modules[site]["shape"]
        assert a.flatten(1).shape == (rank, columns)
        assert b.flatten(1).shape == (rows, rank)
        assert a.dtype == b.dtype == torch.float16


def test_the_base_is_found_by_the_path_it_has_in_the_end(written: Folders) -> None:
    folder = written / "llama"
    base = Path(config_of(folder)["base_model_name_or_path"])
    assert base == folder / "out" / "peft" / "base"
    AutoModelForCausalLM.from_pretrained(base)


def test_everything_written_is_compared(tmp_path: Path) -> None:
    report = write("llama", tmp_path, PASSES, "hf", "peft")
    there = len(adapter(tmp_path)) + len(tensors(tmp_path / "out" / "peft" / "base"))
    assert report.verified["peft"] == {"tensors_equal": there}
    assert report.verified["hf"]["max_logit_difference"] == 0
    for path in (tmp_path / "out" / "hf" / "tokenizer.json", tmp_path / "out" / "peft" / "base" / "tokenizer.json"):
        assert path.is_file()
    assert write("llama", tmp_path, PASSES, "hf", "peft") == report


@pytest.mark.parametrize("bits", only([4], [4, 8]))
def test_factors_in_codes_are_written_as_the_values_they_stand_for(bits: int, tmp_path: Path) -> None:
    write("llama", tmp_path, [Rtn(bits=3), Eora(rank=4, adapter_bits=bits)], "peft")
    packed = load_model(tmp_path / "out")
    for site in config_of(tmp_path)["target_modules"]:
        a, b = factors(tmp_path, site)
        assert a.dtype == b.dtype == torch.float32
        base = tensors(tmp_path / "out" / "peft" / "base")[f"{site}.weight"]
        assert torch.equal(base + b @ a, packed.get_submodule(site).dequantize())


def test_layers_that_are_not_worth_a_correction_are_only_in_the_base(tmp_path: Path) -> None:
    write("llama", tmp_path, [Rtn(bits=2), Eora(rank=None, budget=0.5)], "peft")
    modules = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["modules"]
    corrected = {site for site, spec in modules.items() if "low_rank" in spec}
    assert set(config_of(tmp_path)["target_modules"]) == corrected < modules.keys()
    inputs, _ = data_for("llama")
    assert closeness(logits(added_by_hand(tmp_path), inputs), logits(load_model(tmp_path / "out"), inputs)) < 1e-5


# --- refused ----------------------------------------------------------------------------------------------------------


def test_without_a_correction_there_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"export\.peft.*no pass makes a correction.*put eora last"):
        write("llama", tmp_path, [Gptq(bits=4)], "peft")


def test_when_no_layer_is_worth_a_correction_that_is_said_and_the_work_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eora, "by_budget", lambda energies, costs, budget: dict.fromkeys(energies, 0))
    with pytest.raises(CompressError, match="no layer was worth a correction"):
        write("llama", tmp_path, [Rtn(bits=2), Eora(rank=None, budget=0.5)], "peft")
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / "out.work").glob("*.safetensors"))


@pytest.mark.parametrize(
    "geometry", [{"dilation": 2}, {"groups": 2}, {"padding_mode": "circular", "padding": 1}], ids=str
)
def test_convolutions_that_peft_would_compute_otherwise_are_refused(geometry: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, **geometry))
    text = "passes: [{rtn: {bits: 3}}, {eora: {rank: 2, method: svd%s}}]\nexport: [safetensors, peft]"
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    with pytest.raises(
        ConfigError, match=r"export\.peft: PEFT corrects a convolution only if .* and 1 is not"
    ) as found:
        plan.make(parse(text % ""), graphs.find(model), dtypes)
    assert found.value.problems[0].line == 2
    plan.make(parse(text % ', exclude: ["1"]'), graphs.find(model), dtypes)


# --- with the library itself ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("default")  # the library's own
@pytest.mark.parametrize("name", only(QUICK, MODELS))
def test_the_peft_library_computes_what_the_packed_model_does(name: str, written: Folders) -> None:
    peft = pytest.importorskip("peft")
    folder, (inputs, _) = written / name, data_for(name)
    inputs = inputs if name == "resnet" else inputs.long()
    model = peft.PeftModel.from_pretrained(load_model(folder / "out" / "peft" / "base"), folder / "out" / "peft").eval()
    packed = load_model(folder / "out")
    assert closeness(logits(model, inputs), logits(packed, inputs)) < TOLERANCE.get(name, 1e-5)
    if name == "llama":
        found = peft.AutoPeftModelForCausalLM.from_pretrained(folder / "out" / "peft")
        assert torch.equal(logits(found, inputs), logits(model, inputs))
