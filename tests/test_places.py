"""Where a run computes: the choice of a device, what it may take, and what happens where a device has no room."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import compress_command, write_pipeline
from runtime_layers import layer, weight
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import compress
from compress.api import work
from compress.api.reloaded import device_tolerance
from compress.calibration.in_one_order import InOneOrder
from compress.config.reading import parse
from compress.encodings.counting import sums_by_number
from compress.engine import block_stage
from compress.engine.context import Context
from compress.engine.devices import Devices, devices_of
from compress.engine.read_ahead import ReadAhead
from compress.errors import ConfigError, ResourceError, UsageError
from compress.models import graph as graphs
from compress.planning import plan, resources
from compress.planning.places import Places, chosen_device, places, size_in_bytes
from compress.testing.elsewhere import elsewhere

CUDA = torch.device("cuda", 0)
TEXT = "calibration: {samples: 64, length: 128}\nevaluate: {samples: 4, length: 128}\npasses: [gptq]\n"

here_is_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="says what is said without a device")


@here_is_no_cuda
def test_auto_is_the_processor_where_there_is_no_other_device() -> None:
    assert chosen_device("auto") == chosen_device("cpu") == torch.device("cpu")


@here_is_no_cuda
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_device_that_is_not_there_is_refused_with_what_to_do(name: str) -> None:
    with pytest.raises(UsageError, match=f"device {name}: .* finds no CUDA device here; .*, or give auto or cpu"):
        chosen_device(name)


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:one", "CUDA", ""])
def test_a_word_that_names_no_device_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="is not one like auto, cpu, cuda or cuda:1"):
        chosen_device(name)
    with pytest.raises(ConfigError, match=r"device: .* is not one like auto, cpu, cuda, cuda:1"):
        parse(f"passes: [rtn]\ndevice: '{name}'")


@pytest.mark.parametrize("limits", ["12GB", "{gpu: 12GB}", "{device: twelve}", "{host: 12}"])
def test_a_limit_that_is_no_size_is_refused(limits: str) -> None:
    with pytest.raises(ConfigError, match=r"max_memory: .* is not one like \{device: 12GB, host: 32GB\}"):
        parse(f"passes: [rtn]\nmax_memory: {limits}")


def test_sizes_are_read_in_units_of_ten_and_of_two() -> None:
    assert [size_in_bytes(text) for text in ("12GB", "1.5 MB", "2GiB", "7B")] == [12 * 10**9, 1_500_000, 2 << 30, 7]


def test_a_limit_for_a_device_is_refused_where_the_processor_computes() -> None:
    with pytest.raises(UsageError, match=r"max_memory\.device limits the memory of a graphics processor"):
        places("cpu", {"device": "12GB"})


@here_is_no_cuda
@pytest.mark.parametrize("words", [("run", "-o", "OUT"), ("plan",)])
def test_commands_refuse_a_device_that_is_not_there_before_any_work(words: tuple[str, ...], tmp_path: Path) -> None:
    command, *rest = words
    out = tmp_path / "out"
    given = [str(out) if word == "OUT" else word for word in rest]
    done = compress_command(command, "rtn-w4", "demo", *given, "--device", "cuda")
    assert done.code == 2
    assert "device cuda: torch" in done.err
    assert not out.exists()


# --- what is planned -------------------------------------------------------------------------------------------------


def planned(model: nn.Module, text: str, where: Places | None) -> plan.Plan:
    graph = graphs.find(model)
    return plan.make(parse(text), graph, {name: tensor.dtype for name, tensor in graph.tensors()}, where=where)


def test_activations_wait_on_the_device_only_where_they_fit(tiny_llama: LlamaForCausalLM) -> None:
    roomy = planned(tiny_llama, TEXT, Places(CUDA, device_limit=100 << 30))
    assert roomy.device is not None
    waiting = 64 * 128 * 64 * 4  # samples, tokens, width, bytes
    assert roomy.activations_on_device
    assert devices_of(roomy) == Devices(CUDA, torch.device("cpu"), CUDA, 0)
    tight = planned(tiny_llama, TEXT, Places(CUDA, device_limit=roomy.device.total - 1))
    assert tight.device is not None
    assert not tight.activations_on_device
    assert devices_of(tight) == Devices(CUDA, torch.device("cpu"), torch.device("cpu"), waiting)
    assert tight.device.total == roomy.device.total - waiting
    assert tight.memory.total == roomy.memory.total + waiting


def test_the_forecast_of_learning_holds_what_was_measured() -> None:
    """GB that a card held for a block of a Llama of 8 B, hidden states and model apart; benchmarks/gpu_peer.py."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=1, vocab_size=32_000, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    for name, size, measured in (
        ("flexround", 8, 9.6), ("flexround", 2, 6.2), ("adaround", 8, 11.1), ("adaround", 2, 8.1), ("nupes", 8, 11.4),
        ("nupes", 2, 8.4),
    ):  # fmt: skip
        text = (
            f"calibration: {{source: demo, samples: 128, length: 2048}}\npasses:\n"
            f"  - {name}: {{bits: 4, group_size: 128, steps: 200, batch_size: {size}}}\n"
        )
        made = planned(model, text, Places(CUDA, device_limit=int(14e9)))
        assert made.device is not None
        without = (made.device.total - made.device.parts.get("activations", 0)) / 1e9
        assert measured <= without <= 1.25 * measured + 1, (name, size)
    flexround = text.replace("nupes", "flexround").replace("batch_size: 2", "batch_size: 8")
    made = planned(model, flexround, Places(CUDA, device_limit=int(10.9e9)))
    assert made.device is not None
    assert made.device.total <= 10.9e9
    assert not made.activations_on_device


@pytest.mark.parametrize(("bits", "allowed"), [(0, 1e-3), (8, 5e-2)])
def test_rounded_inputs_may_fall_on_the_next_level_on_a_device(bits: int, allowed: float) -> None:
    packed = layer(weight("uniform 4"), input_bits=bits)
    assert device_tolerance(nn.Sequential(packed), torch.float32) == allowed


@pytest.mark.parametrize("resident", [False, True])
def test_the_memory_of_the_host_is_swept_where_the_processor_computes(resident: bool) -> None:
    """After every batch of a model on disk; what a device computes leaves nothing there."""
    for devices, swept in ((Devices(), not resident), (Devices(CUDA, activations=CUDA), False)):
        context: Any = SimpleNamespace(resident=resident, devices=devices)
        assert Context.waiting(context, ()).trim is swept


def test_a_plan_for_the_processor_knows_no_device(tiny_llama: LlamaForCausalLM) -> None:
    made = planned(tiny_llama, TEXT, None)
    assert made.device is None
    assert devices_of(made) == Devices()


def test_a_run_that_does_not_fit_a_device_is_refused_with_what_it_is_for(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    made = planned(tiny_llama, TEXT, Places(CUDA, device_limit=32 << 20))
    with pytest.raises(ResourceError, match=r"on cuda:0, where it may take 33\.6 MB \(while .*: libraries"):
        resources.check_resources(made, tmp_path / "out", tmp_path / "out.work")


def test_a_limit_for_the_host_is_held(tiny_folder: Path, tmp_path: Path) -> None:
    steps = {"passes": ["rtn"], "max_memory": {"host": "100MB"}}
    with pytest.raises(ResourceError, match=r"max_memory\.host allows 100\.0 MB .*allow more"):
        compress.run(steps, tiny_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_plan_says_where_it_computes(tiny_folder: Path, tmp_path: Path) -> None:
    pipeline = write_pipeline(tmp_path / "p.yaml", "passes: [rtn]\ndevice: cpu\n")
    found = json.loads(compress_command("plan", pipeline, tiny_folder, "--json").out)
    assert found["device"] == "cpu"
    assert found["device_memory"] is None


# --- reading ahead ----------------------------------------------------------------------------------------------------


def test_blocks_that_are_read_ahead_are_those_of_the_model(
    tiny_folder: Path, tmp_path: Path, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = {
        "passes": [
            {"reorder": {}},
            {"wanda": {"sparsity": "2:4"}},
            {"layer_drop": {"blocks": 1}},
            {"gptq": {"bits": 4}},
        ]
    }
    compress.run(steps, tiny_folder, tmp_path / "plain", calibration=tokens, evaluation=tokens)
    taken: list[str] = []
    make, take = work.Work.context, ReadAhead.take

    def ahead(*given: Any) -> Context:
        return replace(make(*given), ahead=ReadAhead(torch.device("cpu")))

    def noted(self: ReadAhead, name: str) -> Tensor | None:
        found = take(self, name)
        taken.extend([name] if found is not None else [])
        return found

    monkeypatch.setattr(work.Work, "context", ahead)
    monkeypatch.setattr(ReadAhead, "take", noted)
    compress.run(steps, tiny_folder, tmp_path / "ahead", calibration=tokens, evaluation=tokens)
    assert "model.layers.1.self_attn.q_proj.weight" in taken
    files = [*(tmp_path / "plain").glob("*.safetensors")]
    assert files
    assert all((tmp_path / "ahead" / file.name).read_bytes() == file.read_bytes() for file in files)


# --- the same bits every time -----------------------------------------------------------------------------------------


def test_an_operation_without_a_fixed_order_is_said_once_and_done_in_the_usual_mode(
    caplog: pytest.LogCaptureFixture,
) -> None:
    learned: Any = SimpleNamespace(device=torch.device("cuda"), grad=None)
    modes: list[int] = []

    def compute() -> Tensor:
        modes.append(torch.get_deterministic_debug_mode())
        if modes[-1] == 2:
            learned.grad = "half of it"
            raise RuntimeError("pooling does not have a deterministic implementation, but you set a flag. Turn it off")
        assert learned.grad is None
        return torch.ones(())

    ordered = InOneOrder()
    with caplog.at_level(logging.WARNING, logger="compress"):
        assert [float(ordered(compute, [learned])) for _ in range(2)] == [1, 1]
    assert modes == [2, 0, 0]
    said = "gradients are not the same to the bit when this is repeated: pooling does not have a deterministic"
    assert [r.message for r in caplog.records] == [f"{said} implementation"]


def test_other_errors_while_learning_stay_what_they_are() -> None:
    learned: Any = SimpleNamespace(device=torch.device("cuda"), grad=None)

    def compute() -> Tensor:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        InOneOrder()(compute, [learned])
    assert torch.get_deterministic_debug_mode() == 0


@pytest.mark.parametrize("count", [5, 64, 100])
def test_sums_by_number_are_the_same_where_they_are_taken(count: int) -> None:
    numbers = torch.randint(count, (1000,), generator=torch.Generator().manual_seed(0))
    values = torch.randint(9, (1000,), generator=torch.Generator().manual_seed(1)).double()
    expected = torch.stack([values[numbers == k].sum() for k in range(count)])
    assert torch.equal(sums_by_number(numbers, values, count), expected)
    with elsewhere() as device, device:
        assert torch.equal(sums_by_number(numbers.to(device), values.to(device), count).cpu(), expected)


# --- no room ---------------------------------------------------------------------------------------------------------


class Cramped(nn.Module):
    """A layer of a device that has room for so many samples."""

    def __init__(self, layer: nn.Module, samples: int):
        super().__init__()
        self.layer, self.samples = layer, samples

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args[0]) > self.samples:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB. And more")
        return self.layer(*args, **kwargs)


def cramped(model: LlamaForCausalLM, samples: int) -> LlamaForCausalLM:
    model.model.layers[1].mlp.act_fn = Cramped(model.model.layers[1].mlp.act_fn, samples)
    return model


def test_a_batch_that_does_not_fit_is_divided_and_that_is_said(
    tiny_llama: LlamaForCausalLM, tokens: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    passes = [compress.Gptq(bits=4, group_size=32)]
    options: dict[str, Any] = {"evaluation": tokens[:4], "products": "float32"}
    expected = compress.apply(tiny_llama, passes, tokens, **options)
    with caplog.at_level(logging.WARNING, logger="compress"):
        found = compress.apply(cramped(tiny_llama, 2), passes, tokens, **options)
    assert [record.message.split("; ")[1] for record in caplog.records] == [
        "going on with parts of it, 1/2",  # of the four windows that are measured on
        "going on with parts of it, 1/4",  # of the eight that are calibrated with
    ]
    assert found.report.rows[-1].perplexity == pytest.approx(expected.report.rows[-1].perplexity, rel=1e-2)


def test_a_sample_that_does_not_fit_is_an_error_in_words(tiny_llama: LlamaForCausalLM, tokens: Tensor) -> None:
    with pytest.raises(ResourceError, match=r"no room .*Tried to allocate 20 GiB.*no batch of several samples is left"):
        compress.apply(cramped(tiny_llama, 0), [compress.Gptq(bits=4)], tokens)


def test_what_was_finished_is_not_done_again_in_smaller_batches(
    tiny_folder: Path, tmp_path: Path, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, worked = block_stage._worked_on, list[tuple[str, int]]()

    def cramped_second(context: Context, stage: int, passes: Any, unit: Any, kept: Any) -> Any:
        worked.append((unit.name, context.divided))
        if unit.name == "b0001" and context.divided < 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return before(context, stage, passes, unit, kept)

    monkeypatch.setattr(block_stage, "_worked_on", cramped_second)
    compress.run({"passes": [{"gptq": {"bits": 4}}]}, tiny_folder, tmp_path / "out", calibration=tokens)
    assert worked == [("b0000", 1), ("b0001", 1), ("b0001", 2), ("b0001", 4)]


@pytest.mark.parametrize("device", [None, "cpu"])
def test_quality_is_measured_on_a_device_of_choice(
    device: str | None, tiny_llama: LlamaForCausalLM, tokens: Tensor
) -> None:
    assert compress.evaluate(tiny_llama, tokens, device=device) == compress.evaluate(tiny_llama, tokens)
