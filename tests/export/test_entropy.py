"""OUT/entropy: the same tensors in fewer bytes, decoded once while they are loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import compress_command
from conftest import make_llama
from expert_models import make_mixture
from safetensors.torch import load_file, save_file
from selection import only
from torch import Tensor
from transformers import AutoModelForCausalLM
from written import data_for, logits, write

import compress
from compress import CheckpointError, Codebook, Entropy, Eora, Magnitude, Olive, Pipeline, PowerQuant, Rtn
from compress.api.export import export_to
from compress.export.packed import open_packed, packed_layers, read_quantization
from compress.io.safetensors_file import read_header
from compress.models.loading import load_model
from compress.passes import Pass

EVERY_KIND: list[Pass] = [
    Rtn(bits=4, include=("*q_proj", "*embed_tokens")),
    Rtn(bits=3, symmetric=False, include=("*k_proj",)),
    PowerQuant(bits=4, include=("*v_proj",)),
    Olive(bits=4, include=("*o_proj",)),
    Codebook(bits=3, include=("*gate_proj",), exclude=("*layers.1.*",)),
    Magnitude(sparsity="2:4", include=("*layers.1*gate_proj",)),
    Magnitude(sparsity=0.8, include=("*up_proj", "*down_proj")),
    Rtn(bits=4, include=("*up_proj", "*layers.1*gate_proj")),
    Eora(rank=16, adapter_bits=4, include=("*up_proj",)),
]  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result of every kind of code with its entropy-coded folder; to be read only."""
    folder = tmp_path_factory.mktemp("entropy")
    make_llama().save_pretrained(folder / "model")
    calibration, evaluation = data_for("llama")
    pipeline = Pipeline(passes=(tuple(EVERY_KIND),), export=(Entropy(),))
    compress.run(pipeline, folder / "model", folder / "out", calibration=calibration, evaluation=evaluation)
    return folder / "out"


def stored(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "compress.safetensors")


def described(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def refuse_differences(out: Path) -> set[str]:
    """Compare what the entropy-coded folder holds with the packed one; the names of what is coded, without layers."""
    plain, small = stored(out), stored(out / "entropy")
    coded = described(out / "entropy")["quantization_config"]["coded"]
    assert plain.keys() == small.keys()
    for key, tensor in small.items():
        assert torch.equal(tensor, plain[key]) == (key not in coded), key
        assert tensor.nbytes < plain[key].nbytes or key not in coded
    found = json.loads((out / "report.json").read_text())["verified"]["entropy"]
    assert found["max_logit_difference"] == 0
    assert found["tensors_equal"] == len(plain)
    assert found["bits_per_weight"] < found["packed_bits_per_weight"]
    return {key.rpartition(".")[2] for key in coded}


def test_every_kind_of_code_loads_to_the_same_bits_from_fewer_bytes(written: Path) -> None:
    assert refuse_differences(written) >= {"codes", "mask", "lora_a_codes"}
    families = {packed.spec.form.family for packed in packed_layers(written).values() if packed.spec.form and packed}
    assert families == {"uniform", "power", "outlier_victim", "codebook"}
    data, _ = data_for("llama")
    assert torch.equal(logits(load_model(written / "entropy"), data), logits(load_model(written), data))


@pytest.mark.parametrize("name", only(["resnet"], ["gpt2", "resnet"]))
def test_layers_of_other_kinds_are_coded_too(name: str, tmp_path: Path) -> None:
    write(name, tmp_path, [Rtn(bits=4)], "entropy")
    assert refuse_differences(tmp_path / "out") == {"codes"}


def test_one_layer_is_read_without_the_others_and_is_what_it_was(written: Path) -> None:
    plain, small = packed_layers(written), packed_layers(written / "entropy")
    assert plain.keys() == small.keys()
    for name, packed in plain.items():
        assert small[name].num_bytes < packed.num_bytes or not small[name].coded
        found, wanted = small[name].tensors(), packed.tensors()
        assert all(torch.equal(found[leaf], tensor) for leaf, tensor in wanted.items())
        assert torch.equal(small[name].load().dequantize(), packed.load().dequantize())


def test_experts_are_decoded_one_by_one(tmp_path: Path) -> None:
    make_mixture("Mixtral").save_pretrained(tmp_path / "model")
    pipeline = {"passes": [{"rtn": {"bits": 4, "include": ["*layers.0*experts*"]}}], "export": ["entropy"]}
    compress.run(pipeline, tmp_path / "model", tmp_path / "out")
    coded = read_quantization(tmp_path / "out" / "entropy")["coded"]
    assert any(".experts.gate_up_proj.3.codes" in name for name in coded)
    plain, small = (load_model(tmp_path / "out" / part).state_dict() for part in ("", "entropy"))
    assert plain.keys() == small.keys()
    assert all(torch.equal(small[name], value) for name, value in plain.items())


def test_a_finished_folder_is_coded_later_to_the_same_bytes(written: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(written, out)
    shutil.rmtree(out / "entropy")
    export_to(out, [Entropy()])
    for name in ("compress.safetensors", "config.json"):
        assert (out / "entropy" / name).read_bytes() == (written / "entropy" / name).read_bytes()


def test_what_is_saved_again_is_packed_as_usual(written: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(written / "entropy").eval()
    model.save_pretrained(tmp_path / "again")
    assert not described(tmp_path / "again")["quantization_config"]["coded"]
    again, (data, _) = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval(), data_for("llama")
    assert torch.equal(logits(again, data), logits(model, data))


def shortened(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name][:-2].clone()


def flipped(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name][-100] ^= 4


@pytest.mark.parametrize(("damage", "said"), [(shortened, "has shape"), (flipped, "cannot be decoded")])
def test_a_damaged_stream_is_named(
    damage: Callable[[dict[str, Tensor], str], None], said: str, written: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "entropy"
    shutil.copytree(written / "entropy", folder)
    tensors = stored(folder)
    name = next(name for name in described(folder)["quantization_config"]["coded"] if name.endswith(".codes"))
    damage(tensors, name)
    save_file(tensors, folder / "compress.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=said) as raised:
        open_packed(folder).artifact.committed[name.rpartition(".")[0]].load()  # type: ignore[union-attr]
    assert name in str(raised.value)
    with pytest.raises(Exception, match=said) as loading:
        load_model(folder)
    assert name in str(loading.value)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ([1], "must map names"), ({"model.norm.weight": {}}, "no stream of codes"), ({5: {}}, "no stream of codes"),
        ({"lm_head.codes": {}}, "no stream of codes"), ({"FIRST": 3}, "no mapping"),
        ({"FIRST": {"bits": 4}}, "missing"),
    ],
    ids=repr,
)  # fmt: skip
def test_a_description_that_this_version_does_not_know_is_refused(
    changed: Any, said: str, written: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "entropy"
    shutil.copytree(written / "entropy", folder)
    config = described(folder)
    first = next(iter(config["quantization_config"]["coded"]))
    made = {first if k == "FIRST" else k: v for k, v in changed.items()} if isinstance(changed, dict) else changed
    config["quantization_config"]["coded"] = made
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=said):
        packed_layers(folder)


def test_inspect_shows_what_is_stored_and_how_it_is_distributed(written: Path) -> None:
    rows = {}
    for folder in (written, written / "entropy"):
        rows[folder.name] = json.loads(compress_command("inspect", folder, "--statistics", "--json").out)
    for plain, small in zip(rows["out"], rows["entropy"], strict=True):
        assert small["bytes"] <= plain["bytes"]
        assert small["distribution"] == plain["distribution"]
        assert plain["bits"] is None or 0 < plain["distribution"]["entropy"] < plain["bits"]
        assert plain["passes"] == small["passes"] != []
    weights = sum(row["shape"][0] * row["shape"][1] for row in rows["entropy"])
    bits = json.loads((written / "report.json").read_text())["verified"]["entropy"]["bits_per_weight"]
    assert 8 * sum(row["bytes"] for row in rows["entropy"]) / weights == pytest.approx(bits)
    assert "shape of numbers" not in compress_command("inspect", written / "entropy").out


def test_the_file_of_weights_bears_its_seal(written: Path) -> None:
    assert "sha256" in read_header(written / "entropy" / "compress.safetensors").metadata


def test_a_plan_says_the_most_that_it_takes(written: Path) -> None:
    entry = "passes: [{rtn: {bits: 4}}]\nexport: [entropy, hf]\n"
    (written.parent / "plan.yaml").write_text(entry)
    model = written.parent / "model"
    said = compress_command("plan", written.parent / "plan.yaml", model).out
    assert "entropy at most" in said
    assert "hf about" in said
    found = json.loads(compress_command("plan", written.parent / "plan.yaml", model, "--json").out)
    compress.run(written.parent / "plan.yaml", model, written.parent / "planned")
    folder = written.parent / "planned" / "entropy"
    assert sum(file.stat().st_size for file in folder.iterdir()) <= found["exports"]["entropy"]
