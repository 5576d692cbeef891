"""The grid of a layer's input: what rounding to it promises, and how it is kept beside the weight."""

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from compress.encodings import (
    InputForm,
    InputGrid,
    Spec,
    Uniform,
    Weight,
    fit,
    fit_inputs,
    pack,
    power,
    quantize,
    unpack,
)
from compress.encodings.inputs import TensorPairs, TensorPower, TensorSteps
from compress.encodings.outlier_victim import quantize_dequantize
from compress.encodings.power import PowerGrid
from compress.testing.elsewhere import elsewhere

BITS = range(2, 9)
OLIVE = InputForm(bits=4, grid="olive", scale="tensor")


def tokens(count: int = 40, channels: int = 48, seed: int = 0) -> Tensor:
    """Tokens of very different sizes, not centred."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, channels, generator=generator) + torch.randn(count, 1, generator=generator)
    return x * torch.rand(count, 1, generator=generator).mul(6).exp()


def dynamic(bits: int) -> InputGrid:
    return InputForm(bits=bits).input_grid({})


def static(x: Tensor, bits: int = 8, grid: str = "int") -> InputGrid:
    form = InputForm(bits=bits, grid=grid, scale="tensor")  # type: ignore[arg-type]
    return fit_inputs(form, float(x.min()), float(x.max()), x.reshape(-1, x.shape[-1]))


def one_token(values: list[float], bits: int) -> list[float]:
    """The oracle: plain arithmetic on one token."""
    levels = 2**bits - 1
    low, high = min(0.0, *values), max(0.0, *values)
    step = (high - low) / levels or 1.0
    zero = round(-low / step)
    return [(min(max(round(v / step) + zero, 0), levels) - zero) * step for v in values]


EVERY = [
    *(pytest.param(dynamic(bits), id=f"int{bits} per token") for bits in BITS),
    *(pytest.param(static(tokens(), bits), id=f"int{bits} per tensor") for bits in BITS),
    *(pytest.param(static(tokens(), bits, "olive"), id=f"olive{bits} per tensor") for bits in (4, 8)),
    *(pytest.param(static(tokens(), bits, "power"), id=f"power{bits} per tensor") for bits in BITS),
    pytest.param(InputForm(bits=8, grid="fp8").input_grid({}), id="fp8 per token"),
    pytest.param(static(tokens(), 8, "fp8"), id="fp8 per tensor"),
]
each_grid = pytest.mark.parametrize("inputs", EVERY)


# --- one scale per token ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_a_token_is_rounded_to_at_most_half_a_step_of_its_own_range(bits: int) -> None:
    x = tokens()
    step = (x.amax(-1, keepdim=True).clamp(min=0) - x.amin(-1, keepdim=True).clamp(max=0)) / (2**bits - 1)
    assert bool(((dynamic(bits).apply(x) - x).abs() <= step * (0.5 + 1e-4)).all())


@pytest.mark.parametrize("bits", BITS)
def test_a_token_takes_no_more_values_than_its_bits_can_say(bits: int) -> None:
    made = dynamic(bits).apply(tokens(channels=4000))
    assert max(len(row.unique()) for row in made) <= 2**bits


@pytest.mark.parametrize("bits", BITS)
def test_rounding_a_token_agrees_with_the_oracle(bits: int) -> None:
    x = tokens(8, 24)
    expected = torch.tensor([one_token(row, bits) for row in x.double().tolist()])
    far = (dynamic(bits).apply(x) - expected).abs() > 1e-5 * x.abs().amax(-1, keepdim=True)
    assert int(far.sum()) <= 1  # a tie that float32 sees on the other side


def test_a_token_does_not_depend_on_the_others() -> None:
    x = tokens().view(4, 10, 48)
    whole = dynamic(4).apply(x)
    assert torch.equal(whole[2:3, 7:8], dynamic(4).apply(x[2:3, 7:8]))
    huge = x.clone()
    huge[0] *= 1e6
    assert torch.equal(dynamic(4).apply(huge)[1:], whole[1:])


@pytest.mark.parametrize("bits", [4, 8])
def test_a_scale_a_token_loses_less_than_one_for_tokens_of_all_sizes(bits: int) -> None:
    x = tokens()
    own, shared = (((i.apply(x) - x).norm(dim=-1) / x.norm(dim=-1)).mean() for i in (dynamic(bits), static(x, bits)))
    assert float(own) < float(shared) / 4


# --- one scale from calibration ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_a_static_grid_rounds_what_calibration_saw_to_half_a_step_and_cuts_the_rest(bits: int) -> None:
    x = tokens()
    inputs = static(x, bits)
    assert isinstance(inputs, TensorSteps)
    scale, zero = float(inputs.scale), int(inputs.zero_point)
    assert scale == pytest.approx(float(x.max() - x.min()) / (2**bits - 1))
    assert float((inputs.apply(x) - x).abs().max()) <= scale * (0.5 + 1e-4)
    ends = inputs.apply(torch.tensor([[float(x.min()) * 10, float(x.max()) * 10]]))
    assert torch.allclose(ends, torch.tensor([[-zero * scale, (2**bits - 1 - zero) * scale]]))


def test_a_static_grid_of_inputs_without_negative_values_uses_every_code_above_zero() -> None:
    inputs = static(tokens().abs(), 8)
    assert isinstance(inputs, TensorSteps)
    assert int(inputs.zero_point) == 0


@pytest.mark.parametrize("channels", [48, 47])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_olive_grid_is_that_of_the_weights_in_pairs_along_the_channels(bits: int, channels: int) -> None:
    x = tokens(channels=channels)
    inputs = static(x, bits, "olive")
    assert isinstance(inputs, TensorPairs)
    assert inputs.form.normal is not None
    expected = quantize_dequantize(x, inputs.scale[:, None], inputs.form.normal)
    assert torch.equal(inputs.apply(x), expected)
    assert torch.equal(inputs.apply(x.view(5, 8, channels)), expected.view(5, 8, channels))


@pytest.mark.parametrize(("degrees", "normal"), [(None, "int4"), (3, "flint4")])
def test_the_olive_grid_takes_the_type_that_suits_the_sample(degrees: int | None, normal: str) -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(1000, 64, generator=generator)
    if degrees is not None:  # Student's t: heavier tails
        x /= torch.randn(1000, 64, degrees, generator=generator).square().mean(-1).sqrt()
    inputs = static(x, 4, "olive")
    assert inputs.form.normal == normal
    error = float((inputs.apply(x) - x).square().mean() / x.square().mean())
    assert error == pytest.approx(0.0127 if degrees is None else 0.0233, rel=0.15)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_power_grid_is_that_of_the_weights_and_loses_less_than_even_steps_on_heavy_tails(bits: int) -> None:
    x = tokens()  # of very different sizes: most numbers are small
    inputs = static(x, bits, "power")
    assert isinstance(inputs, TensorPower)
    assert float(inputs.exponent) < 0.9
    values = PowerGrid(bits, float(inputs.exponent), "zero").values * inputs.scale
    made = inputs.apply(x)
    nearest = values[(x[..., None] - values).abs().argmin(-1)]
    assert float((made - nearest).abs().max()) == pytest.approx(0.0, abs=1e-6)
    assert torch.equal(inputs.apply(made), made)
    assert float((made - x).square().sum()) < 0.6 * float((static(x, bits).apply(x) - x).square().sum())


def test_outliers_survive_the_olive_grid_where_even_steps_lose_everything_else() -> None:
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(3))
    x[:, 10] *= 20
    rest = [c for c in range(64) if c not in (10, 11)]
    olive, even = static(x, 4, "olive").apply(x), static(x, 4).apply(x)
    assert float((olive - x)[:, rest].norm() / x[:, rest].norm()) < 0.2
    assert float((olive - x)[:, 10].norm() / x[:, 10].norm()) < 0.2
    assert float((even - x)[:, rest].norm() / x[:, rest].norm()) > 0.9


# --- every grid -------------------------------------------------------------------------------------------------------


@each_grid
def test_zero_stays_exactly_zero(inputs: InputGrid) -> None:
    for x in (tokens(), tokens().abs(), -tokens().abs(), tokens() * 0):
        x[:, ::5] = 0
        made = inputs.apply(x)
        assert bool((made[:, ::5] == 0).all())
        assert bool(torch.isfinite(made).all())


@each_grid
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_input_keeps_its_shape_and_type_and_is_rounded_in_float32(inputs: InputGrid, dtype: torch.dtype) -> None:
    x = tokens().clamp(-1000, 1000).to(dtype).view(2, 20, 48)
    before = x.clone()
    made = inputs.apply(x)
    assert (made.shape, made.dtype) == (x.shape, dtype)
    assert torch.equal(made, inputs.apply(x.float()).to(dtype))
    assert torch.equal(x, before)


@each_grid
def test_gradients_pass_as_if_nothing_had_been_rounded(inputs: InputGrid) -> None:
    x = tokens().requires_grad_()
    made = inputs.apply(x)
    assert torch.equal(made, inputs.apply(x.detach()))
    made.backward(torch.arange(x.numel()).view(x.shape).float())
    assert x.grad is not None
    assert torch.equal(x.grad.flatten(), torch.arange(x.numel()).float())


@each_grid
def test_an_input_is_rounded_where_it_is_with_no_device_set(inputs: InputGrid) -> None:
    expected = inputs.apply(tokens())
    with elsewhere() as device:
        made = inputs.apply(tokens().to(device))
        assert made.device == device
        assert torch.equal(made.cpu(), expected)


def test_the_levels_of_power_grids_are_made_once_however_many_layers_take_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    form, x = InputForm(bits=4, grid="power", scale="tensor"), tokens(2)
    layers = [{"input_scale": torch.ones(1), "input_exponent": torch.tensor([0.3 + k / 1000])} for k in range(300)]

    def run() -> None:
        for stored in layers:
            form.input_grid(stored).apply(x)  # a packed layer makes its grid again for each call

    run()
    monkeypatch.setattr(power, "_exact_values", lambda *args: pytest.fail("levels are made again"))
    run()


@pytest.mark.parametrize("scale", ["token", "tensor"])
def test_more_bits_do_not_round_worse(scale: str) -> None:
    x = tokens(200)
    lost = [float(((dynamic(b) if scale == "token" else static(x, b)).apply(x) - x).norm()) for b in BITS]
    assert lost == sorted(lost, reverse=True)
    assert lost[-1] < lost[0] / 30


# --- kept beside a weight ---------------------------------------------------------------------------------------------


def weight(inputs: InputGrid | None, masked: bool, dense: bool) -> Weight:
    w = torch.randn(6, 48, generator=torch.Generator().manual_seed(1))
    mask = w > -0.5 if masked else None
    if dense:
        return Weight(w if mask is None else w * mask, mask, inputs=inputs)
    scale, zero = fit(w, 3, groups=4)
    codes = quantize(w, scale, zero, 3)
    encoding = Uniform(codes, scale, zero, 3, False)
    if mask is not None:
        encoding = replace(encoding, codes=torch.where(mask, codes, encoding.idle()))
    return Weight(mask=mask, encoding=encoding, inputs=inputs)


@each_grid
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_a_weight_is_packed_with_the_grid_of_its_inputs(inputs: InputGrid, masked: bool, dense: bool) -> None:
    with_grid, without = weight(inputs, masked, dense), weight(None, masked, dense)
    spec, tensors = pack(with_grid)
    spec = Spec.from_json(json.loads(json.dumps(spec.to_json())))
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == spec.tensors()
    more = {"input_scale": 4, "input_zero_point": 1, "input_exponent": 4}
    beside = {"int": {"input_zero_point"}, "olive": set(), "power": {"input_exponent"}, "fp8": set()}[inputs.form.grid]
    found = {name: t.numel() * t.element_size() for name, t in tensors.items() if name in more}
    assert found == {n: more[n] for n in found}
    assert set(found) == ({"input_scale", *beside} if inputs.static else set())
    assert spec.num_bytes == pack(without)[0].num_bytes + sum(found.values())
    back = unpack(spec, tensors)
    assert torch.equal(back.dequantize(), without.dequantize())
    assert back.kind == without.kind
    assert back.inputs is not None
    assert back.inputs.form == inputs.form
    assert torch.equal(back.inputs.apply(tokens()), inputs.apply(tokens()))
    part = back.rows(slice(1, 3)).inputs
    assert part is not None
    assert torch.equal(part.apply(tokens()), inputs.apply(tokens()))


def test_nothing_is_stored_of_a_weight_whose_inputs_are_not_rounded() -> None:
    spec, tensors = pack(weight(None, False, False))
    assert "inputs" not in spec.to_json()
    assert not [name for name in tensors if name.startswith("input")]
    assert unpack(spec, tensors).inputs is None


def test_packed_weights_that_share_a_grid_share_no_memory() -> None:
    inputs = static(tokens())
    a, b = (pack(weight(inputs, False, False))[1]["input_scale"] for _ in range(2))
    assert a.data_ptr() != b.data_ptr()


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"bits": 8, "zigzag": True},
        {"bits": 8, "grid": "power"},
        {"bits": 8, "scale": "channel"},
        {"bits": 8, "normal": "int4"},
        {"bits": 4, "grid": "olive", "scale": "tensor"},
        {"bits": 8, "grid": "olive", "scale": "tensor", "normal": "flint4"},
        {"bits": 4, "grid": "olive", "normal": "int4"},
    ],
    ids=str,
)
def test_a_grid_that_this_version_does_not_know_is_refused(data: dict[str, object]) -> None:
    spec = pack(weight(None, False, False))[0].to_json()
    with pytest.raises(ValueError, match=r"input's grid|of an input"):
        Spec.from_json({**spec, "inputs": data})


@pytest.mark.parametrize(
    ("form", "words"),
    [
        (InputForm(bits=8), "int8 per token"),
        (InputForm(bits=4, scale="tensor"), "int4 per tensor"),
        (OLIVE, "olive 4 bits per tensor"),
        (replace(OLIVE, normal="flint4"), "olive flint4 per tensor"),
    ],
    ids=str,
)
def test_a_grid_says_what_it_is_in_words(form: InputForm, words: str) -> None:
    assert str(form) == words
