"""Adapters whose factors are coded: a small file that stands for a fine-tune as other deltas do."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from children import contents
from commands import make_text_model
from safetensors.torch import load_file
from test_adapters import ALPHA, LAYERS, RANK, WEIGHTS, factors, of_llama, write_adapter
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import compress
from compress import Compeft, Ties
from compress.checkpoint.delta.file import Delta
from compress.config.options import errors_in
from compress.errors import CheckpointError, ConfigError, NonFiniteError, UsageError
from compress.passes.merge.base import Piece

pytestmark = pytest.mark.usefixtures("one_thread")

PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, an `adapter` of it, and `coded`, what a run with `factors` left; bfloat16."""
    folder = tmp_path_factory.mktemp("coded")
    make_text_model(folder / "base", dtype="bfloat16")
    LlamaForCausalLM.from_pretrained(folder / "base").bfloat16().save_pretrained(folder / "base")
    torch.manual_seed(3)
    write_adapter(folder / "adapter", folder / "base", of_llama())
    compress.run(steps(folder / "adapter"), folder / "base", folder / "coded")
    return folder


def steps(adapter: object, **options: Any) -> dict[str, Any]:
    return {"passes": [{"compeft": {"models": [str(adapter)], "factors": True, **options}}]}


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def signs(stored: dict[str, Tensor], density: float, magnitude: str = "l2") -> dict[str, Tensor]:
    """The paper's three steps on each factor: the signs of what is kept, times one bfloat16."""
    coded = {}
    for name, value in stored.items():
        flat = value.flatten().float()
        count = int(density * len(flat))
        kept = flat.abs().argsort(descending=True, stable=True)[:count]
        length = flat.double().norm() / count**0.5 if magnitude == "l2" else flat.double().std(correction=0)
        made = torch.zeros_like(flat)
        made[kept] = flat[kept].sign() * length.bfloat16().float()
        coded[name] = made.view(value.shape)
    return coded


@pytest.mark.parametrize(("density", "magnitude"), [(0.3, "l2"), (0.5, "std")])
def test_weights_are_the_base_plus_scale_times_the_coded_b_times_the_coded_a(
    density: float, magnitude: str, here: Path, tmp_path: Path
) -> None:
    coded = signs(load_file(here / "adapter" / WEIGHTS), density, magnitude)
    compress.run(steps(here / "adapter", density=density, magnitude=magnitude), here / "base", tmp_path / "out")
    found, before = weights(tmp_path / "out"), weights(here / "base")
    touched = 0
    for name, value in before.items():
        layer = PREFIX + name.removesuffix(".weight")
        if f"{layer}.lora_A.weight" in coded:
            added = ALPHA / RANK * (coded[f"{layer}.lora_B.weight"] @ coded[f"{layer}.lora_A.weight"])
            torch.testing.assert_close(found[name], (value.float() + added).bfloat16(), rtol=0.01, atol=1e-6)
            assert not torch.equal(found[name], value)
            touched += 1
        else:
            assert torch.equal(found[name], value)
    assert touched == 2 * len(LAYERS)


def test_the_file_is_a_fraction_of_the_adapter_and_of_the_delta_of_weights(here: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    wide = {**of_llama(rank=64)}
    adapter = write_adapter(tmp_path / "wide", here / "base", wide, r=64)
    sizes = {}
    for factored in (True, False):
        entry = {"models": [str(adapter)], "factors": factored}
        compress.run({"passes": [{"compeft": entry}]}, here / "base", tmp_path / f"{factored}")
        sizes[factored] = (tmp_path / f"{factored}" / "delta" / "delta.safetensors").stat().st_size
    assert sum(value.numel() for value in wide.values()) * 4 > 8 * sizes[True], "float32 in the adapter"
    made = Delta.open(here / "coded" / "delta" / "delta.safetensors")
    small = load_file(here / "adapter" / WEIGHTS)
    payload = sum(made.source.read(name).numel() for name in made.source.names())
    assert 8 * payload < 2 * sum(value.numel() for value in small.values()), "less than two bits for each number"
    assert made.file.stat().st_size < sizes[False] / 4


def test_base_and_file_make_the_very_model_that_was_measured(here: Path, tmp_path: Path) -> None:
    found = compress.apply_delta(here / "base", here / "coded" / "delta", tmp_path / "out")
    now, meant = weights(tmp_path / "out"), weights(here / "coded")
    assert now.keys() == meant.keys()
    assert all(torch.equal(value, meant[name]) for name, value in now.items())
    report = json.loads((here / "coded" / "report.json").read_text())
    assert report["verified"]["delta"]["tensors_equal"] == found["tensors_equal"]
    assert report["merged"][0]["delta"] == found["delta"]
    compress.run(steps(here / "adapter"), here / "base", tmp_path / "again")
    assert contents(tmp_path / "again" / "delta") == contents(here / "coded" / "delta")


def test_it_is_a_parent_of_merges_and_a_task_vector_like_the_model_that_it_makes(here: Path, tmp_path: Path) -> None:
    made = {}
    for name, parent in {"delta": here / "coded" / "delta", "model": here / "coded"}.items():
        if name == "model":
            compress.apply_delta(here / "base", here / "coded" / "delta", tmp_path / "whole")
            parent = tmp_path / "whole"
        entry = {"task_arithmetic": {"models": [str(parent)], "scale": -1.0}}
        compress.run({"passes": [entry]}, here / "base", tmp_path / name)
        made[name] = weights(tmp_path / name)
    assert all(torch.equal(value, made["model"][n]) for n, value in made["delta"].items())


def test_a_model_in_memory_gets_the_same_values(here: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(here / "base", dtype="bfloat16")
    made = compress.apply(model, [Compeft(models=(str(here / "adapter"),), factors=True)]).model
    meant = weights(here / "coded")
    assert all(torch.equal(value, meant[name]) for name, value in made.state_dict().items())


def test_ranks_and_alphas_of_layers_and_what_was_trained_whole_are_kept(here: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    layer = "model.layers.0.self_attn.q_proj"
    norm = torch.rand(64)
    tensors = {**factors(layer, 64, 64, rank=2), **factors("model.layers.1.mlp.down_proj", 64, 128),
               "model.norm.weight": norm}  # fmt: skip
    patterns = {"rank_pattern": {layer: 2}, "alpha_pattern": {layer: 32}, "use_rslora": True}
    adapter = write_adapter(tmp_path / "adapter", here / "base", tensors, modules_to_save=["norm"], **patterns)
    compress.run(steps(adapter, density=1.0, magnitude="mean", scope="tensor"), here / "base", tmp_path / "out")
    found, before = weights(tmp_path / "out"), weights(here / "base")
    assert torch.equal(found["model.norm.weight"], norm.bfloat16())
    for name, scale in ((layer, 32 / 2**0.5), ("model.layers.1.mlp.down_proj", ALPHA / RANK**0.5)):
        a, b = (tensors[f"{name}.lora_{part}.weight"] for part in "AB")
        a, b = (value.sign() * value.abs().double().mean().bfloat16().float() for value in (a, b))
        wanted = (before[f"{name}.weight"].float() + scale * (b @ a)).bfloat16()
        torch.testing.assert_close(found[f"{name}.weight"], wanted, rtol=0.01, atol=1e-6)


# --- what it refuses --------------------------------------------------------------------------------------------------


def test_one_factor_may_be_long_and_the_other_short(here: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    uneven = {name: value * (64 if ".lora_A." in name else 1 / 64) for name, value in of_llama().items()}
    adapter = write_adapter(tmp_path / "adapter", here / "base", uneven)
    compress.run(steps(adapter), here / "base", tmp_path / "out")
    found, meant = weights(tmp_path / "out"), weights(here / "coded")
    assert all(torch.equal(value, meant[name]) for name, value in found.items())


def test_what_is_no_adapter_or_cannot_be_added_is_refused_before_work(here: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no LoRA adapter, and factors: true .*extract-lora"):
        compress.run(steps(here / "base"), here / "base", tmp_path / "out")
    bad = {name: value.clone() for name, value in of_llama().items()}
    next(iter(bad.values()))[0, 0] = float("nan")
    adapter = write_adapter(tmp_path / "nan", here / "base", bad)
    with pytest.raises(NonFiniteError, match=r"lora_A.* holds NaN or infinity; get a clean adapter"):
        compress.run(steps(adapter), here / "base", tmp_path / "out")
    whole = write_adapter(tmp_path / "whole", here / "base", {"model.norm.weight": torch.ones(64)})
    with pytest.raises((CheckpointError, UsageError, ConfigError), match="holds no factors"):
        compress.run(steps(whole), here / "base", tmp_path / "out")


def test_options_that_speak_of_tensors_of_the_model_are_refused() -> None:
    for options, said in {
        "density": ({"density": (0.1, 0.5)}, "one number"),
        "include": ({"include": ("*.mlp.*",)}, "the adapter is coded"),
        "choose": ({"choose": {"alpha": (0.5, 1.0)}}, "give the values"),
        "vocabulary": ({"vocabulary": "common"}, "the adapter is coded"),
    }.values():
        found = errors_in(Compeft(models=("a",), factors=True, **options))
        assert any(said in error.message for error in found), options


def test_factors_are_coded_once(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    code = Compeft.code

    def counted(self: Compeft, piece: Piece, facts: Any) -> Any:
        names.append(piece.name)
        return code(self, piece, facts)

    monkeypatch.setattr(Compeft, "code", counted)
    compress.run(steps(here / "adapter"), here / "base", tmp_path / "out")
    assert names
    assert len(set(names)) == len(names)


def test_whole_numbers_are_numbers(here: Path, tmp_path: Path) -> None:
    made = {}
    for name, number in (("whole", int), ("floating", float)):
        options = {"alpha": number(2), "density": number(1)}
        assert errors_in(Compeft(models=("a",), factors=True, **options)) == []
        compress.run(steps(here / "adapter", **options), here / "base", tmp_path / name)
        made[name] = (tmp_path / name / "compress.safetensors").read_bytes()
    assert made["whole"] == made["floating"]
    assert errors_in(Ties(models=("a", "b"), density=(1, 0.5))) == []


def test_another_base_and_damage_are_refused(here: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(here / "base")
    nn.init.normal_(model.model.layers[0].mlp.up_proj.weight)
    model.bfloat16().save_pretrained(tmp_path / "other")
    with pytest.raises(UsageError, match="made for another base"):
        compress.apply_delta(tmp_path / "other", here / "coded" / "delta", tmp_path / "out")
    file = tmp_path / "delta.safetensors"
    data = bytearray((here / "coded" / "delta" / "delta.safetensors").read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        compress.apply_delta(here / "base", file, tmp_path / "out")
