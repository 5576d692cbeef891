"""Kernels for packed layers compute what the layers compute as loaded, within the error they state."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreted import CASES, QUICK
from runtime_layers import ENCODINGS, FEW, layer, off, weight
from safetensors.torch import load_file
from selection import only
from test_packed import load, logits, make_gpt2
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

import compress
from compress import Eora, Magnitude, Rtn
from compress.encodings import LowRankFactors, OutlierVictim, Uniform, Weight, fit, quantize, unpack
from compress.encodings.lookup import Table
from compress.encodings.outlier_victim import PAIR_TYPES
from compress.runtime import kernels, launch, lookup
from compress.runtime.arrange import arrange, restore
from compress.runtime.linear import PackedLinear
from compress.runtime.lookup import GpuLookup
from compress.runtime.low_bit import Int8
from compress.runtime.pairs import Pairs
from compress.runtime.speed import EXACT_KERNELS, LARGEST_ERROR, ROUNDED, LayerSpeed

ROUNDING = 2e-6  # of float32, over sums of some hundred products
HERE = Path(__file__).parent
INTERPRETED = "test_the_kernels_for_cuda_compute_the_layers_in_the_interpreter"


def quick(made: PackedLinear, **options: Any) -> LayerSpeed:
    return compress.speed_up(nn.ModuleList([made]), **options).layers[0]


def check(of: Weight, x: Tensor, most: float = ROUNDING, kernel: str = "", **options: Any) -> None:
    """Both bias and no bias, `Linear` and `Conv1D`."""
    for bias, transposed in ((True, False), (False, True)):
        made = layer(of, bias=bias, transposed=transposed, dtype=x.dtype)
        expected = made(x)
        done = quick(made, **options)
        found = made(x)
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        assert off(found, expected) <= most, done
        assert done.error <= most
        assert kernel in done.kernel


# --- the same results -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spare_bits", only([0], [0, 40]))
@pytest.mark.parametrize("name", only(FEW, ENCODINGS))
def test_exact_kernels_differ_by_rounding_in_float32(name: str, spare_bits: float) -> None:
    for mask in ("", "2:4", "half"):
        for rank in (0, 3):
            check(weight(name, mask=mask, rank=rank), torch.randn(2, 3, 64), spare_bits=spare_bits)


@pytest.mark.parametrize("spare_bits", only([40], [0, 40]))
@pytest.mark.parametrize("name", only(FEW, ENCODINGS))
def test_odd_shapes_are_as_exact(name: str, spare_bits: float) -> None:
    for shape in ((1, 2), (19, 37), (33, 66)):
        check(
            weight(name, *shape, mask="half" if shape[0] > 1 else ""), torch.randn(1, shape[1]), spare_bits=spare_bits
        )


@pytest.mark.parametrize("name", only(FEW, ENCODINGS))
def test_kernels_that_round_stay_within_the_error_they_state(name: str) -> None:
    for mask in ("", "2:4", "half"):
        check(weight(name, mask=mask, rank=2), torch.randn(8, 64), 1.5 * LARGEST_ERROR, exact=False, spare_bits=40)


@pytest.mark.parametrize("columns", [1, 2, 20, 37, 66])
def test_a_product_of_torch_is_never_asked_for_columns_that_it_reads_beyond(columns: int) -> None:
    """`_weight_int8pack_mm` reads sixteen columns at once: a wrong result, or the end of the process."""
    made = layer(weight("uniform 8", 19, columns))
    assert Int8.prepare(made.spec, unpack(made.spec, made.stored()), made.stored()) is None
    check(weight("uniform 8", 19, columns), torch.randn(3, columns), 1.5 * LARGEST_ERROR, exact=False, spare_bits=40)


@pytest.mark.parametrize("kind", [*EXACT_KERNELS, *ROUNDED], ids=lambda kind: kind.name)
def test_every_kernel_is_taken_for_some_layer(kind: type[kernels.Kernel]) -> None:
    taken = {quick(layer(weight(n)), spare_bits=40, exact=kind in EXACT_KERNELS).kernel for n in ENCODINGS}
    assert kind.name in taken


@pytest.mark.parametrize("name", ["uniform 4 groups", "uniform 8", "codebook 4", "power 3 half"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_inputs_of_half_precision_give_results_of_half_precision(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(4, 64).to(dtype)
    for exact in (True, False):
        for spare in (0, 40):
            check(weight(name, mask="2:4", rank=2), x, 0.03, exact=exact, spare_bits=spare)


@pytest.mark.parametrize("exact", [True, False])
def test_quantized_inputs_are_rounded_before_they_are_multiplied(exact: bool) -> None:
    made = layer(weight("uniform 4 groups"), input_bits=4)
    x = torch.randn(5, 64)
    expected = made(x)
    quick(made, exact=exact)
    assert off(made(x), expected) <= (ROUNDING if exact else LARGEST_ERROR)
    assert off(layer(weight("uniform 4 groups"))(x), expected) > 0.05


def test_two_thin_products_stand_for_a_weight_that_is_nothing_but_its_factors() -> None:
    factors = torch.randn(4, 64), torch.randn(48, 4)
    scale, zero = fit(factors[0], 4, symmetric=True)
    quantized = Uniform(quantize(factors[0], scale, zero, 4), scale, zero, 4, True)
    for a in (factors[0].half(), quantized):
        scale, zero = fit(factors[1], 4, symmetric=True)
        b = Uniform(quantize(factors[1], scale, zero, 4), scale, zero, 4, True) if a is quantized else factors[1].half()
        check(Weight(low_rank=LowRankFactors(a, b)), torch.randn(3, 64), kernel="factors", spare_bits=0)


def test_a_layer_that_is_two_factors_multiplies_with_one_after_the_other_as_it_is_loaded() -> None:
    a, b = torch.randn(4, 64).half(), torch.randn(48, 4).half()
    made, x = layer(Weight(low_rank=LowRankFactors(a, b)), bias=True), torch.randn(2, 3, 64)
    thin = nn.functional.linear(nn.functional.linear(x, a.float()), b.float()) + made.bias
    dense = nn.functional.linear(x, b.float() @ a.float(), made.bias)
    for each in (made, copy.deepcopy(made)):
        assert torch.equal(each(x), thin)
        assert sorted(each.state_dict()) == ["bias", "lora_a", "lora_b"]
    assert not torch.equal(thin, dense)
    assert off(thin, dense) <= ROUNDING
    assert torch.equal(torch.compile(made, fullgraph=True, backend="eager")(x), thin)
    made.load_state_dict({"lora_a": 2 * a, "lora_b": b, "bias": made.bias})
    assert torch.allclose(made(x) - made.bias, 2 * (thin - made.bias), atol=1e-4), "other tensors, another product"
    made.unpack_always()
    assert torch.equal(made(x), nn.functional.linear(x, b.float() @ (2 * a).float(), made.bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_pruned_weights_that_are_not_quantized_are_multiplied_by_tiles(dtype: torch.dtype) -> None:
    values, mask = torch.randn(600, 512), torch.rand(600, 512) < 0.5
    check(Weight((values * mask).to(dtype), mask), torch.randn(2, 512), kernel="tiles", spare_bits=40)
    check(Weight(values.to(dtype)), torch.randn(2, 512), kernel="tiles")


@pytest.mark.parametrize("mask", ["", "half"])
@pytest.mark.parametrize("name", ["uniform 3 groups", "uniform 8", "codebook 4 tables", "power 5 half", "olive int8"])
def test_a_layer_of_several_tiles_gives_the_same(name: str, mask: str) -> None:
    of = weight(name.replace("power 5", "power 4"), 700, 512, mask=mask)
    for spare in (0, 17):
        check(of, torch.randn(2, 512), spare_bits=spare)


# --- memory -----------------------------------------------------------------------------------------------------------


class Largest(torch.overrides.TorchFunctionMode):
    """The most elements of a float32 tensor that any function of torch returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and found.dtype == torch.float32:
            self.elements = max(self.elements, found.numel())
        return found


@pytest.mark.parametrize("mask", ["", "half"])
@pytest.mark.parametrize("spare_bits", [0, 9])
def test_the_whole_weight_is_never_float32(spare_bits: float, mask: str) -> None:
    made = layer(weight("uniform 4 groups", 2048, 512, mask=mask))
    x = torch.randn(1, 512)
    with Largest() as whole:
        expected = made(x)
    with Largest() as quick_one:
        quick(made, spare_bits=spare_bits)
        found = made(x)
    assert whole.elements >= 2048 * 512
    assert quick_one.elements <= 2048 * 512 // 4
    assert off(found, expected) <= ROUNDING


def test_no_kernel_keeps_more_than_it_may() -> None:
    for name in ENCODINGS:
        for spare in (0, 6, 9, 17):
            assert quick(layer(weight(name, 64, 256)), spare_bits=spare).spare_bits <= spare


# --- a model ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama: 4 bits in groups, half of its MLP gone, corrected; to be read only."""
    out = tmp_path_factory.mktemp("kernels") / "out"
    tokens = torch.randint(256, (4, 32), generator=torch.Generator().manual_seed(3))
    passes = (Magnitude(sparsity="2:4", include=("*.mlp.*",)), Rtn(bits=4, group_size=32), Eora(rank=2))
    compress.run(compress.Pipeline(passes=tuple((p,) for p in passes)), tiny_folder, out, calibration=tokens)
    return out


def generated(model: PreTrainedModel, start: Tensor) -> Tensor:
    found: Tensor = model.generate(
        start, attention_mask=torch.ones_like(start), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    return found


def test_generate_gives_the_same_tokens_with_exact_kernels(folder: Path, tokens: Tensor) -> None:
    model, start = load(folder), tokens[:2, :8].clamp(min=3)
    expected = generated(model, start)
    for spare in (0, 9, 17):
        done = compress.speed_up(model, spare_bits=spare)
        assert len(done.layers) == 14
        assert torch.equal(generated(model, start), expected)


def test_a_gpt2_computes_the_same(tmp_path: Path, tokens: Tensor) -> None:
    make_gpt2().save_pretrained(tmp_path / "model")
    compress.run(compress.Pipeline(passes=((Rtn(bits=3),),)), tmp_path / "model", tmp_path / "out")
    model = load(tmp_path / "out")
    expected = logits(model, tokens)
    compress.speed_up(model)
    assert off(logits(model, tokens), expected) < 1e-5


def test_a_loaded_model_is_as_it_was_until_it_is_asked(folder: Path) -> None:
    assert all(m.kernel is None for m in load(folder).modules() if isinstance(m, PackedLinear))


def test_saving_writes_the_tensors_that_were_loaded(folder: Path, tmp_path: Path, tokens: Tensor) -> None:
    model = load(folder)
    expected, names = logits(model, tokens), set(model.state_dict())
    compress.speed_up(model, exact=False)
    assert set(model.state_dict()) == names
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(next(f.glob("*.safetensors"))) for f in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype
        assert torch.equal(value, after[name]), name
    assert torch.equal(logits(load(tmp_path / "again"), tokens), expected)


def test_a_copy_keeps_its_kernels(folder: Path, tokens: Tensor) -> None:
    model = load(folder)
    compress.speed_up(model, spare_bits=17)
    assert torch.equal(logits(copy.deepcopy(model), tokens), logits(model, tokens))


def test_another_type_keeps_the_kernels_and_the_scales(folder: Path, tokens: Tensor) -> None:
    model = load(folder)
    expected = logits(model, tokens)
    compress.speed_up(model)
    narrow = model.to(torch.bfloat16)
    found = logits(narrow, tokens)
    assert found.dtype == torch.bfloat16
    assert off(found, expected) < 0.05


def test_on_another_device_a_layer_goes_back_to_computing_as_loaded() -> None:
    made = layer(weight("uniform 4 groups"))
    quick(made)
    assert made.kernel is not None
    assert made.to("cpu").kernel is not None
    assert made.to("meta").kernel is None


def test_other_tensors_put_a_layer_back_to_computing_as_loaded() -> None:
    made, other = layer(weight("uniform 4 groups")), layer(weight("uniform 4 groups"))
    other.codes.bitwise_not_()
    quick(made)
    made.load_state_dict(other.state_dict())
    x = torch.randn(2, 64)
    assert torch.equal(made(x), other(x))


def test_gradients_still_reach_the_input() -> None:
    made = layer(weight("uniform 4 groups"))
    x = torch.randn(2, 64, requires_grad=True)
    quick(made, exact=False)
    made(x).sum().backward()
    assert torch.allclose(x.grad, made.dequantize().sum(0).expand(2, -1), rtol=1e-4, atol=1e-4)


def test_what_was_done_is_shown_layer_by_layer(folder: Path) -> None:
    done = compress.speed_up(load(folder))
    assert done.kernels == {"codes+factors": 14}
    lines = str(done).splitlines()
    assert len(lines) == 15
    assert "model.layers.1.mlp.down_proj" in lines[-1]
    assert all(row.error <= ROUNDING and 8 <= row.spare_bits <= 9.1 for row in done.layers)


def test_a_model_without_packed_layers_is_refused(tiny_llama: PreTrainedModel) -> None:
    with pytest.raises(compress.UsageError, match="no packed linear layer"):
        compress.speed_up(tiny_llama)


def test_memory_below_nothing_is_refused(folder: Path) -> None:
    with pytest.raises(compress.UsageError, match="0 or more"):
        compress.speed_up(load(folder), spare_bits=-1)


# --- graphics processors ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interpreted(request: pytest.FixtureRequest) -> dict[str, dict[str, float]]:
    """What the kernels for CUDA are off by in Triton's interpreter."""
    chosen = [item.callspec.params["case"] for item in request.session.items if INTERPRETED in item.nodeid]
    ended = subprocess.run(
        [sys.executable, str(HERE / "interpreted.py"), *chosen],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    found: dict[str, dict[str, float]] | None = json.loads(ended.stdout)
    if found is None:
        pytest.skip("Triton is not installed")
    return found


@pytest.mark.parametrize("case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.real) for c in CASES])
def test_the_kernels_for_cuda_compute_the_layers_in_the_interpreter(
    case: str, interpreted: dict[str, dict[str, float]]
) -> None:
    errors = interpreted[case]
    # A masked table of 256 entries has no number left for zero.
    assert bool(errors) == (case != "codebook 8, 2:4")
    for how, error in errors.items():
        # The interpreter cuts numbers off where it makes bfloat16 of them; a device rounds.
        limit = ROUNDING if "float32" in how else 0.02 if "bfloat16" in how else 0.002
        assert error <= limit, how


@pytest.mark.parametrize("which", ["one", pytest.param("all", marks=pytest.mark.real)])
def test_the_kernels_for_cuda_compile_where_there_is_no_device(which: str, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    ended = subprocess.run(
        [sys.executable, str(HERE / "compiled.py"), which],
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr


def test_without_triton_a_cuda_kernel_is_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "available", lambda: False)
    assert not launch.usable(torch.device("cuda"))


def test_the_operator_has_a_shape_without_data() -> None:
    with FakeTensorMode():
        x, other = torch.empty(5, 64, dtype=torch.bfloat16), torch.empty(1, 1)
        numbers = launch.Product(48, 64, launch.STEPS, 4).numbers()
        y = torch.ops.compress.packed_product(x, other, other, other, other, other, other, numbers)
        assert y.shape == (5, 48)
        assert y.dtype == x.dtype


# --- codes in another order -------------------------------------------------------------------------------------------


def arranged(name: str, rows: int = 48, columns: int = 256, **options: Any) -> PackedLinear:
    """With the kernel for a graphics processor, which cannot run here."""
    made = layer(weight(name, rows, columns, **options))
    made.use(GpuLookup.prepare(made.spec, unpack(made.spec, made.stored()), made.stored()))
    assert isinstance(made.kernel, GpuLookup)
    return made


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels for graphics processors are made, as if the processor were one."""
    monkeypatch.setattr(lookup, "usable", lambda device: True)


def test_codes_come_back_from_the_order_the_kernels_want_them_in() -> None:
    for bits in range(2, 9):
        for shape in ((16, 128), (48, 256), (19, 37)):
            codes = torch.randint(2**bits, shape, dtype=torch.uint8)
            for nibbles in (False, True):
                found = arrange(codes, bits, nibbles=nibbles)
                rows, columns = (-(-n // whole) * whole for n, whole in zip(shape, (16, 128), strict=True))
                assert len(found) == rows * columns * (8 if bits == 7 else bits) // 8
                assert torch.equal(restore(found, shape, bits, nibbles=nibbles), codes)


@pytest.mark.usefixtures("pretended")
def test_arranged_codes_take_the_place_of_the_stored_ones_and_are_saved_as_they_were() -> None:
    for name in ("uniform 4 groups", "uniform 3", "codebook 4 tables", "power 3 half", "olive int4", "olive int8"):
        plain, made = layer(weight(name, 48, 256)), arranged(name)
        assert isinstance(made.kernel, GpuLookup)
        assert not torch.equal(made.codes, plain.codes)
        assert made.kernel.num_bytes(dict(made.named_buffers(recurse=False))) < 0.1 * plain.codes.numel() + 8192
        assert made.state_dict().keys() == plain.state_dict().keys()
        for key, value in plain.state_dict().items():
            assert torch.equal(made.state_dict()[key], value), (name, key)
        assert torch.equal(made.dequantize(), plain.dequantize())
        made.use(None)
        assert torch.equal(made.codes, plain.codes)


@pytest.mark.usefixtures("pretended")
def test_arranged_codes_are_kept_beside_the_stored_ones_where_they_are_more() -> None:
    for made in (arranged("uniform 4 groups", mask="2:4"), arranged("uniform 7"), arranged("uniform 4", 19, 37)):
        assert not made.arranged
        assert made.kernel is not None


@pytest.mark.usefixtures("pretended")
def test_a_layer_with_arranged_codes_is_copied_moved_loaded_and_differentiated_as_any_other() -> None:
    plain, made = layer(weight("uniform 4 groups", 48, 256)), arranged("uniform 4 groups")
    again = copy.deepcopy(made)
    assert again.arranged
    assert again.codes.data_ptr() == again.kernel.words.data_ptr() != made.codes.data_ptr()
    x = torch.randn(2, 256, requires_grad=True)
    made(x).sum().backward()
    assert torch.allclose(x.grad, plain.dequantize().sum(0).expand(2, -1), rtol=1e-4, atol=1e-4)
    scale = made.half().scale
    assert made.arranged
    assert torch.equal(scale, plain.scale)
    assert made.kernel.scale.dtype == plain.scale.dtype
    again.load_state_dict(plain.state_dict())
    assert again.kernel is None
    assert torch.equal(again.codes, plain.codes)
    assert made.to("meta").kernel is None


def test_pairs_are_one_code_and_its_neighbour_where_their_table_says_so() -> None:
    for normal in PAIR_TYPES:
        codes = weight(f"olive {normal}", 8, 65).encoding
        assert isinstance(codes, OutlierVictim)
        table = codes.lookup().table
        pairs = Pairs.of(table)
        assert pairs is not None
        assert torch.equal(pairs.stored(pairs.recode(codes.codes)), codes.codes)
        other = table.values.clone()
        other[0, 5, 1] += 1
        assert Pairs.of(Table(other, table.bits)) is None


# --- on a device ------------------------------------------------------------------------------------------------------

needs_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", only(FEW, ENCODINGS))
def test_the_kernels_for_cuda_compute_the_layers_on_a_device(name: str, dtype: torch.dtype) -> None:
    for mask in ("", "2:4"):
        made = layer(weight(name, 208, 320, mask=mask, rank=3), bias=True).to("cuda")
        made.bias = nn.Parameter(made.bias.to(dtype), requires_grad=False)
        for rows in (1, 3, 40):
            x = torch.randn(rows, 320, device="cuda").to(dtype)
            made.use(None)
            made.automatic = False
            expected = made(x)
            made.automatic = True
            found = made(x)
            assert torch.equal(made(x), found)
            assert off(found, expected) <= (1e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.gpu
@needs_device
def test_a_layer_on_a_device_takes_its_kernel_and_is_recorded_in_a_graph() -> None:
    made = layer(weight("uniform 4 groups", 256, 512)).to("cuda")
    x = torch.randn(1, 512, device="cuda", dtype=torch.bfloat16)
    expected = made(x)
    assert isinstance(made.kernel, GpuLookup)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = made(x)
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)
    x.copy_(torch.randn(1, 512))
    graph.replay()
    assert torch.equal(y, made(x))
    compiled = torch.compile(made, fullgraph=True)
    assert torch.equal(compiled(x), y)
    assert torch.equal(made.to("cpu").codes, layer(weight("uniform 4 groups", 256, 512)).codes)
