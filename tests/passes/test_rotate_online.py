"""QuaRot's turns at run time: inputs that no norm comes before, turned by a Hadamard matrix in blocks."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from selection import only
from test_rotate import TURNED
from test_scale import applied
from test_width_prune import TOKENS, logits, make
from torch import nn
from transformers import AutoModelForCausalLM

import compress
from compress import CheckpointError, ConfigError, LayerDrop, Reorder, Rotate, Rtn, Smooth, WidthPrune
from compress.encodings import InputForm
from compress.encodings.turn import block_of, turned
from compress.models.graph import find
from compress.models.turned_inputs import expression_of, pattern_of, turn_inputs, turned_inputs
from compress.passes.solvers.hadamard import hadamard

pytestmark = pytest.mark.usefixtures("one_thread")

WRITERS = ("self_attn.o_proj", "mlp.down_proj")


def test_blocks_are_multiplied_with_a_hadamard_matrix() -> None:
    for width in (1, 2, 7, 8, 96, 512, 1536):
        size = block_of(width)
        assert width % size == 0
        assert width // size % 2 == 1
        known = hadamard(size)
        assert known is not None
        whole = torch.block_diag(*[known / size**0.5] * (width // size))
        x = torch.randn(2, 3, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(turned(x, size), x @ whole)
        torch.testing.assert_close(turned(turned(x, size), size), x)
        half = turned(x.bfloat16(), size)
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.double(), x @ whole, atol=0.05, rtol=0.02)


def test_every_family_computes_what_it_did_with_inputs_that_are_turned() -> None:
    for kind in TURNED:
        model = make(kind)
        before, graph = logits(model), find(model)
        made = applied(model, Rotate(online=True)).model
        torch.testing.assert_close(logits(made), before, atol=1e-3, rtol=0)
        there = turned_inputs(made)
        assert len(there) == 2 * len(graph.blocks), kind
        for name, size in there.items():
            assert size == block_of({site.name: site.shape[1] for site in graph.sites}[name])
        assert not turned_inputs(model), "the model that was given stays as it is"
        torch.testing.assert_close(logits(copy.deepcopy(made)), before, atol=1e-3, rtol=0)


def test_an_outlier_of_a_neuron_is_spread_and_four_bits_hold_the_inputs_of_down_projections() -> None:
    """The paper's claim for what cannot be folded into weights."""
    model = make("Llama", intermediate_size=256)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[7] *= 30
        model.model.layers[0].mlp.down_proj.weight[:, 7] /= 30
    grid, lost = InputForm(bits=4).input_grid({}), []
    for online in (False, True):
        layer = applied(model, Rotate(online=online)).model
        seen: list[torch.Tensor] = []
        down = layer.model.layers[0].mlp.down_proj
        down.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        logits(layer)
        products = [nn.functional.linear(x, down.weight) for x in (seen[0], grid.apply(seen[0]))]
        lost.append(float((products[1] - products[0]).norm() / products[0].norm()))
    assert lost[1] < 0.5 * lost[0]


@pytest.mark.parametrize("key", only(["compressed-tensors"], ["compressed-tensors", "onnx"]))
def test_the_folder_loads_and_every_container_that_can_say_it_computes_the_same(key: str, tmp_path: Path) -> None:
    model = make("Gemma")
    model.save_pretrained(tmp_path / "model")
    exports = ["entropy", key]
    passes = [{"rotate": {"online": True}}, {"rtn": {"scheme": "w8g16"}}]
    out = tmp_path / "out"
    meant = logits(applied(model, Rotate(online=True), Rtn(bits=8, group_size=16)).model, TOKENS)
    compress.run({"passes": passes, "export": exports}, tmp_path / "model", out)
    said = json.loads((out / "config.json").read_text())["turned_inputs"]
    assert said == {f"model.layers.*.{name}": block_of(w) for name, w in zip(WRITERS, (48, 96), strict=True)}
    loaded = [AutoModelForCausalLM.from_pretrained(folder) for folder in (out, out / "entropy")]
    for each in loaded:
        torch.testing.assert_close(logits(each, TOKENS), meant, atol=1e-4, rtol=0)
        assert len(turned_inputs(each)) == 4
    loaded[0].save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again, TOKENS), logits(loaded[0], TOKENS))
    if key == "onnx":
        return  # what it computes was compared when it was written
    section = json.loads((out / "compressed-tensors" / "config.json").read_text())
    assert "turned_inputs" not in section, "which would turn them twice"
    groups = section["quantization_config"]["transform_config"]["config_groups"].values()
    assert {group["head_dim"] for group in groups} == {*said.values()}


def test_containers_without_a_place_for_it_are_refused_before_work_starts(tmp_path: Path) -> None:
    make("Llama").save_pretrained(tmp_path / "model")
    for key in ("hf", "gguf", "gptq", "awq", "mlx", "peft"):
        passes = [{"rotate": {"online": True}}, {"rtn": {"scheme": "w4g16"}}]
        with pytest.raises(ConfigError, match=r"no place for turned inputs, .*leave `online` out of rotate"):
            compress.run({"passes": passes, "export": [key]}, tmp_path / "model", tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_neurons_that_are_turned_into_others_have_no_order_and_no_scale_any_more() -> None:
    model = make("Llama")
    graph = find(applied(model, Rotate(online=True)).model)
    readers = {place.tensor for units in graph.units() if units.part for place in units.places[-1:]}
    assert not [name for name in readers if "down_proj" in name or "o_proj" in name]
    assert not [axis for axis in graph.axes if {*axis.readers} & {*graph.turned}]
    before = logits(model)
    smoothed = applied(model, Rotate(online=True), Smooth(include=("*.q_proj", "*.k_proj", "*.v_proj"))).model
    torch.testing.assert_close(logits(smoothed), before, atol=1e-3, rtol=0)
    for pass_ in (Smooth(include=("*.down_proj",)), WidthPrune(parts=("mlp",)), Reorder()):
        with pytest.raises(ConfigError):
            applied(model, Rotate(online=True), pass_)


def test_twice_is_once_and_blocks_may_go_afterwards() -> None:
    model = make("Llama")
    before = logits(model)
    twice = applied(model, Rotate(online=True), Rotate(online=True)).model
    torch.testing.assert_close(logits(twice), before, atol=1e-3, rtol=0)
    assert len(turned_inputs(twice)) == 4
    assert all(len(m._forward_pre_hooks) <= 1 for m in twice.modules())
    shorter = applied(model, Rotate(online=True), LayerDrop(blocks=1)).model
    torch.testing.assert_close(logits(shorter), logits(applied(model, LayerDrop(blocks=1)).model), atol=1e-3, rtol=0)


def test_patterns_name_the_layers_of_all_blocks_and_nothing_else(tmp_path: Path) -> None:
    assert pattern_of("model.layers.12.mlp.down_proj") == "model.layers.*.mlp.down_proj"
    model = make("Llama")
    turn_inputs(model, {"model.layers.*.mlp.down_proj": 8})
    assert [*turned_inputs(model)] == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert expression_of("a.*.b") == r"a\.\d+\.b$"
    wrongs: tuple[Any, ...] = ([], {"model.layers.*.mlp.down_proj": 12}, {"model.layers.*.mlp.down_proj": True})
    for wrong in wrongs:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        make("Llama").save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "turned_inputs": wrong}))
        with pytest.raises(CheckpointError, match=r"turned_inputs .* is not a pattern of layers and a power of two"):
            compress.run({"passes": [{"rtn": {"scheme": "w4g16"}}]}, folder, tmp_path / "out")


def test_a_module_in_memory_is_turned_in_place() -> None:
    model = make("Llama")
    before = logits(model)
    result = compress.apply(model, [Rotate(online=True)], inplace=True)
    assert result.model is model
    assert len(turned_inputs(model)) == 4
    torch.testing.assert_close(logits(model), before, atol=1e-3, rtol=0)
