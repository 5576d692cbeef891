"""Passes, statistics and training on tensors of a device that is not the processor (which is pretended)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import textbook
import torch
from conftest import make_llama
from selection import only
from torch import Tensor

import compress
from compress.calibration.draws import Kind, draw
from compress.calibration.ranges import Range
from compress.calibration.reconstruct import HiddenSamples
from compress.calibration.training import ModelData, Schedule, TrainingStore, train
from compress.encodings import InputForm, Weight, pack, unpack
from compress.engine.devices import Devices
from compress.passes import Pass
from compress.passes.base import Target
from compress.testing.elsewhere import MixedDevicesError, elsewhere
from compress.testing.trial import CPU, tensors


def test_tensors_of_two_devices_do_not_mix() -> None:
    x = torch.ones(3)
    with elsewhere() as device:
        y = x.to(device)
        with pytest.raises(MixedDevicesError):
            x + y
        with pytest.raises(MixedDevicesError):
            y.copy_(x)
        with pytest.raises(MixedDevicesError):
            y[torch.arange(2)]
        with pytest.raises(MixedDevicesError), device:
            torch.rand(3, generator=torch.Generator())
        with pytest.raises(RuntimeError):
            y.numpy()
        assert (y + torch.tensor(1.0)).tolist() == [2, 2, 2]  # a single number may come from the processor


def test_tensors_are_made_where_is_computed_while_the_scope_is_open() -> None:
    with elsewhere() as device:
        devices = Devices(device, CPU)
        with devices.scope():
            assert torch.zeros(2).device == torch.tensor([1.0]).device == device
        assert torch.zeros(2).device == CPU
        assert devices.to_store(devices.to_compute(torch.ones(2))).device == CPU


def test_the_scope_of_the_processor_adds_nothing_to_a_call() -> None:
    with Devices().scope():
        assert not torch._C._is_torch_function_mode_enabled()


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("uniform", torch.rand(7, generator=seeded())),
        ("normal", torch.randn(7, generator=seeded())),
        ("permutation", torch.randperm(7, generator=seeded())),
    ],
)
def test_the_same_numbers_are_drawn_on_every_device(kind: Kind, expected: Tensor) -> None:
    with elsewhere() as device:
        like = torch.zeros(1).to(device)
        with Devices(device, CPU).scope():
            drawn = draw(seeded(), (7,), kind, like)
        assert drawn.device == device
        assert torch.equal(drawn.cpu(), expected)


def test_a_weight_moves_with_everything_in_it_and_is_packed_on_either_device() -> None:
    w = textbook.weight(6, 16)
    target = Target(w, None, textbook.statistics(textbook.inputs(16)), torch.Generator().manual_seed(0))
    edit = compress.Eora(rank=2).run(dataclasses.replace(target, weight=w.round(), original=w))
    weight = Weight(mask=w > 0, encoding=compress.Rtn(bits=3).run(target).encoding, low_rank=edit.low_rank)
    with elsewhere() as device:
        devices = Devices(device, CPU)
        there = devices.to_compute(weight)
        assert {t.device for t in tensors(there)} == {device}
        assert devices.to_compute(there) is there
        with devices.scope():  # what waits is packed, and read again, while others compute
            for each in (there, devices.to_store(there)):
                spec, packed = pack(each)
                again = unpack(spec, packed)
                assert {t.device for t in tensors(again)} == {each.dequantize().device}
                assert torch.equal(again.dequantize().cpu(), weight.dequantize())


def test_ranges_and_the_grids_they_make_lie_where_the_inputs_are() -> None:
    x = textbook.inputs(16)
    form = InputForm(bits=8, scale="tensor")
    here, there = Range(), Range()
    here.update(x)
    with elsewhere() as device:
        there.update(x.to(device))
        assert there.sample.device == device
        with Devices(device, CPU).scope():
            rounded = there.grid(form).apply(x.to(device))
        assert torch.equal(rounded.cpu(), here.grid(form).apply(x))


def test_samples_are_taken_from_where_they_wait_to_where_is_computed() -> None:
    batches = list(torch.split(textbook.inputs(4, tokens=6), 4))
    with elsewhere() as device:
        samples = HiddenSamples(batches, device)
        with Devices(device, CPU).scope():
            taken = samples.take(torch.tensor([5, 0]))
        assert torch.equal(taken.cpu(), torch.cat(batches)[[5, 0]])


class _Numbers:
    """One vector is learned."""

    def __init__(self, device: torch.device) -> None:
        self.values = torch.zeros(3).to(device).requires_grad_()

    def groups(self) -> list[tuple[list[Tensor], float]]:
        return [([self.values], 0.1)]

    def make(self, names: object) -> dict[str, Tensor]:
        return {"a": self.values}

    def merged(self, names: object) -> dict[str, Tensor]:
        return {"a": self.values.detach()}


class _OnDisk(TrainingStore):
    """What is kept is read back on the processor."""

    def __init__(self) -> None:
        self.state: dict[str, Tensor] | None = None

    def load(self) -> dict[str, Tensor] | None:
        return self.state

    def save(self, state: dict[str, Tensor]) -> None:
        self.state = {name: value.detach().cpu().clone() for name, value in state.items()}


def test_a_training_goes_on_from_what_was_kept_on_the_processor() -> None:
    def over(items: object, total: int, label: object) -> Iterator[int]:
        for number in items:  # type: ignore[attr-defined]
            if number > stop:
                raise KeyboardInterrupt
            yield number

    def trained(device: torch.device, kept: TrainingStore) -> Tensor:
        goal = torch.arange(6.0, device="cpu").view(6, 1).to(device)
        data = ModelData(lambda make, numbers: (make(["a"])["a"] - goal[numbers]).square().mean(), 6, kept)
        learned = _Numbers(device)
        with Devices(device, CPU).scope():
            train(learned, data, Schedule(10, 2), torch.Generator().manual_seed(0), over)
        return learned.values.detach().cpu()

    stop = 100
    whole = trained(CPU, TrainingStore())
    with elsewhere() as device:
        kept = _OnDisk()
        stop = 5
        with pytest.raises(KeyboardInterrupt):
            trained(device, kept)
        stop = 100
        assert torch.equal(trained(device, kept), whole)


PIPELINES: dict[str, list[Pass | list[Pass]]] = {
    "matrices": [
        compress.Wanda(sparsity="2:4", update="obs"),
        compress.Gptq(bits=4, activation_bits=8, activation_scale="tensor"),
        compress.Eora(rank=2),
    ],
    "blocks": [[compress.Magnitude(sparsity=0.5), compress.FlexRound(bits=3, steps=2, inputs="mix")]],
    "parts": [compress.Magnitude(sparsity=0.5), compress.PerpReconstruct(steps=2, granularity="matrix")],
    "model": [compress.Reorder(groups=4), compress.Magnitude(sparsity=0.5), compress.Perp(steps=2)],
    "depth": [compress.LayerDrop(blocks=1), compress.Rtn(bits=3)],
}


def small(**changes: object) -> torch.nn.Module:
    return make_llama(
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=2,
        num_key_value_heads=1,
        attn_implementation="eager",
        **changes,
    )


def assert_applies_alike(passes: list[Pass | list[Pass]], tokens: Tensor, evaluation: Tensor) -> None:
    """On the processor and elsewhere the same model comes out, but for the rounding of gradients."""
    here = compress.apply(small(), passes, tokens, evaluation=evaluation, products="float32")
    with elsewhere() as device:
        there = compress.apply(small().to(device), passes, tokens, evaluation=evaluation, products="float32")
        assert here.weights.keys() == there.weights.keys()
        for name, weight in there.weights.items():
            assert {t.device for t in tensors(weight)} == {device}, "finished weights stay where there is room for them"
            assert torch.allclose(weight.dequantize().cpu(), here.weights[name].dequantize(), rtol=1e-4, atol=1e-5)
        assert {p.device for p in there.model.parameters()} == {device}
        assert there.report.fallbacks == here.report.fallbacks
        for a, b in zip(here.report.rows, there.report.rows, strict=True):
            assert a.perplexity == pytest.approx(b.perplexity, rel=1e-4)
            assert (a.kl or 0.0) == pytest.approx(b.kl or 0.0, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name", only(["matrices", "parts", "depth"], PIPELINES))
def test_a_model_that_lies_elsewhere_is_compressed_there(name: str, tokens: Tensor, evaluation_tokens: Tensor) -> None:
    assert_applies_alike(PIPELINES[name], tokens[:4, :16], evaluation_tokens[:2, :16])


def test_a_model_that_lies_elsewhere_is_merged_with_one_on_disk(
    tmp_path: Path, tokens: Tensor, evaluation_tokens: Tensor
) -> None:
    small(initializer_range=0.12).save_pretrained(tmp_path)  # type: ignore[operator]
    passes: list[Pass | list[Pass]] = [
        compress.Dare(models=(str(tmp_path),), density=0.5),
        compress.WeightMatching(models=(str(tmp_path),)),
    ]
    assert_applies_alike(passes, tokens[:4, :16], evaluation_tokens[:2, :16])
