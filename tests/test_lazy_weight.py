"""The weight of a packed layer is unpacked when somebody computes with it, and not when its type is asked for."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

import compress
from compress.encodings import pack
from compress.passes import Rtn
from compress.runtime.lazy_weight import LazyWeight
from compress.runtime.linear import PackedLinear
from compress.runtime.packed import PackedModule
from compress.runtime.register import replace_modules

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=[False, True], ids=["Linear", "Conv1D"])
def layer(request: pytest.FixtureRequest) -> PackedLinear:
    torch.manual_seed(0)
    made = compress.apply(nn.Sequential(nn.Linear(32, 16)), [Rtn(bits=4)])
    spec, stored = pack(made.weights["0"])
    packed = PackedLinear(spec, bias=False, transposed=request.param, dtype=torch.bfloat16)
    for name, value in stored.items():
        packed.get_buffer(name).copy_(value)
    return packed


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> list[PackedModule]:
    seen: list[PackedModule] = []
    before = PackedModule.dequantize

    def dequantize(self: PackedModule) -> Tensor:
        seen.append(self)
        return before(self)

    monkeypatch.setattr(PackedModule, "dequantize", dequantize)
    return seen


def test_what_is_known_without_its_numbers_unpacks_nothing(layer: PackedLinear, unpacked: list[PackedModule]) -> None:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    assert weight.dtype == torch.bfloat16
    assert tuple(weight.shape) == ((32, 16) if layer.transposed else (16, 32))
    assert weight.device == layer.like.device
    assert (weight.ndim, weight.dim(), weight.numel(), len(weight)) == (2, 2, 512, weight.size(0))
    assert weight.is_floating_point()
    assert not weight.requires_grad
    assert not weight.is_meta
    assert unpacked == []


@pytest.mark.parametrize(
    "use",
    [
        lambda w: w + 0,
        lambda w: torch.matmul(torch.ones(1, w.shape[0], dtype=w.dtype), w),
        lambda w: nn.functional.linear(torch.ones(1, w.shape[1], dtype=w.dtype), w),
        lambda w: w.T,
        lambda w: w[1:3],
        lambda w: w.float(),
        lambda w: w.to(torch.float64),
        lambda w: w.detach().clone(),
        lambda w: w.data,
        lambda w: torch.stack([w, w]),
        deepcopy,
        lambda w: torch.tensor(w.float().numpy()),
        lambda w: torch.tensor(w.tolist()),
        lambda w: torch.from_dlpack(w.float()),
        torch.from_dlpack,
    ],
)
def test_what_is_computed_with_it_is_computed_with_the_unpacked_weight(
    layer: PackedLinear, use: Callable[[Tensor], Tensor]
) -> None:
    dense = layer.dequantize().to(torch.bfloat16)
    dense = dense.T.contiguous() if layer.transposed else dense
    found = use(layer.weight)
    assert not isinstance(found, LazyWeight)
    assert torch.equal(found, use(dense))


def test_modes_of_the_moment_when_it_is_unpacked_do_not_stay_with_it(layer: PackedLinear) -> None:
    before, within = layer.weight, layer.weight
    with torch.inference_mode():
        before.view(-1)
        within.sum()
    x = torch.ones(1, within.shape[1], dtype=within.dtype, requires_grad=True)
    nn.functional.linear(x, within).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("kind", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.Conv2d])
def test_it_lies_in_memory_as_it_says(kind: Callable[..., nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = compress.apply(nn.Sequential(kind(8, 6, 3)), [Rtn(bits=4)])
    spec, stored = pack(made.weights["0"])
    model = nn.Sequential(kind(8, 6, 3))
    replace_modules(model, {"0": spec})
    for name, value in stored.items():
        model[0].get_buffer(name).copy_(value)
    weight = model[0].weight
    assert isinstance(weight, Tensor)
    save_file({"w": weight}, tmp_path / "w.safetensors")
    assert torch.equal(load_file(tmp_path / "w.safetensors")["w"], made.model[0].weight)


def test_it_is_unpacked_once_for_each_time_it_is_fetched(layer: PackedLinear, unpacked: list[PackedModule]) -> None:
    weight = layer.weight
    weight.sum()
    weight.abs()
    assert len(unpacked) == 1
    layer.weight.sum()
    assert len(unpacked) == 2


def test_t5_unpacks_each_layer_once_a_call(tmp_path: Path, unpacked: list[PackedModule]) -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    compress.run({"passes": [{"rtn": {"bits": 4}}]}, tmp_path / "model", tmp_path / "out")
    model = T5ForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    tokens = torch.arange(12).view(2, 6)
    unpacked.clear()
    with torch.no_grad():
        model(input_ids=tokens, decoder_input_ids=tokens)
    times: dict[Any, int] = {}
    for module in unpacked:
        times[module] = times.get(module, 0) + 1
    assert set(times.values()) == {1}


def test_a_convolution_says_its_shape_without_unpacking(tmp_path: Path, unpacked: list[PackedModule]) -> None:
    from compress.runtime.conv import PackedConvolution

    conv = nn.Conv2d(4, 8, 3, groups=2)
    made = compress.apply(nn.Sequential(conv), [Rtn(bits=4)])
    packed = PackedConvolution(pack(made.weights["0"])[0], conv)
    assert packed.weight.shape == conv.weight.shape
    assert unpacked == []
