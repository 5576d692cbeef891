"""A convolution is a matrix whose columns are the places of its window: statistics, packing, passes."""

import copy
from typing import Any

import pytest
import torch
from textbook import statistics as textbook_statistics
from torch import Tensor, nn

import compress
from compress import ConfigError, FlexRound, GlobalMagnitude, Gptq, Magnitude, Rtn
from compress.calibration import collect, windows
from compress.calibration.grouped import statistics_for
from compress.encodings import Spec, pack
from compress.engine.several import _fed_alike
from compress.models import graph as graphs
from compress.passes.base import Target
from compress.passes.quantize.flexround import Division
from compress.runtime.conv import PackedConvolution
from compress.runtime.register import replace_modules

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # torch itself warns that padding an even window on both sides alike needs a copy
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]

GEOMETRIES: list[dict[str, Any]] = [
    {"kernel_size": 3},
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (2, 3), "stride": (1, 2), "padding": (1, 0), "dilation": (2, 1)},
    {"kernel_size": 3, "padding": "same", "dilation": 2},
    {"kernel_size": (4, 2), "padding": "same"},
    {"kernel_size": 3, "padding": "valid"},
    {"kernel_size": 3, "padding": (2, 1), "padding_mode": "circular"},
    {"kernel_size": (2, 3), "padding": "same", "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "replicate", "stride": 3},
]
each_geometry = pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)


def images(count: int = 5, channels: int = 4) -> Tensor:
    return torch.randn(count, channels, 9, 11, generator=torch.Generator().manual_seed(5))


def seen(modules: dict[str, nn.Module], inputs: list[Tensor], model: nn.Module) -> dict[str, Any]:
    with torch.no_grad():
        return collect.statistics(modules, dict.fromkeys(modules, "gram"), [lambda x=x: model(x) for x in inputs])


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


# --- statistics -------------------------------------------------------------------------------------------------------


@each_geometry
def test_rows_of_windows_times_the_matrix_are_the_convolution(geometry: dict[str, Any]) -> None:
    conv, x = nn.Conv2d(4, 6, **geometry), images()
    (site,) = graphs.find(conv).sites
    rows = torch.cat(list(windows.Windows.of(conv).rows(x)))
    with torch.no_grad():
        expected = conv(x)
        made = rows @ site.matrix(conv.weight).T + conv.bias
    assert torch.allclose(made.view(5, *expected.shape[2:], 6), expected.permute(0, 2, 3, 1), atol=1e-5)


@each_geometry
def test_the_gram_matrix_gives_the_error_of_the_convolution(geometry: dict[str, Any]) -> None:
    conv, x = nn.Conv2d(4, 6, bias=False, **geometry), images()
    gram = seen({"it": conv}, list(torch.split(x, 2)), conv)["it"].gram
    (site,) = graphs.find(conv).sites
    change = torch.randn(site.shape)
    with torch.no_grad():
        before = conv(x)
        conv.weight += site.value(change)
        lost = float((conv(x) - before).square().sum())
    assert float(((change @ gram) * change).sum()) == pytest.approx(lost, rel=1e-4)


def test_statistics_do_not_depend_on_how_many_samples_are_unfolded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    conv, x = nn.Conv2d(4, 6, 3, padding=1), images(7)
    whole = seen({"it": conv}, [x], conv)["it"]
    monkeypatch.setattr(windows, "NUMBERS_AT_ONCE", 9 * 11 * 36 * 2)
    rows = windows.Windows.of(conv)
    assert [len(part) for part in rows.rows(x)] == [2 * 99, 2 * 99, 2 * 99, 99]
    parts = seen({"it": conv}, [x], conv)["it"]
    assert whole.tokens == parts.tokens == 7 * 99
    assert close(parts.gram, whole.gram)
    assert close(parts.norm, whole.norm)


def test_an_image_without_a_batch_counts_as_one() -> None:
    conv, x = nn.Conv2d(4, 6, 3), images(1)
    assert close(seen({"it": conv}, [x[0]], conv)["it"].gram, seen({"it": conv}, [x], conv)["it"].gram)


class Branches(nn.Module):
    """Four convolutions of one input; the last two look at it in other ways."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 5, 3, padding=1)
        self.strided, self.pointwise = nn.Conv2d(4, 6, 3, padding=1, stride=2), nn.Conv2d(4, 6, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.a(x), self.b(x), self.strided(x), self.pointwise(x)


def test_convolutions_share_statistics_only_if_they_look_at_one_input_in_the_same_way() -> None:
    model, x = Branches(), images()
    found = seen(dict(model.named_children()), [x], model)
    assert found["a"] is found["b"]
    assert len({id(s) for s in found.values()}) == 3
    for name, conv in model.named_children():
        alone = torch.cat(list(windows.Windows.of(conv).rows(x)))
        assert close(found[name].gram, textbook_statistics(alone).gram), name


# --- packed -----------------------------------------------------------------------------------------------------------


def packed_copy(model: nn.Module, weights: dict[str, Any]) -> nn.Module:
    """A copy of a module with packed modules that hold what is stored of these weights."""
    made = copy.deepcopy(model)
    parts = {name: pack(weight) for name, weight in weights.items()}
    replace_modules(made, {name: Spec.from_json(spec.to_json()) for name, (spec, _) in parts.items()})
    for name, (_, tensors) in parts.items():
        for leaf, value in tensors.items():
            made.get_submodule(name).get_buffer(leaf).copy_(value)
        bias = model.get_submodule(name).bias
        if bias is not None:
            made.get_submodule(name).bias.data.copy_(bias)
    return made


@each_geometry
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_packed_convolution_computes_bit_for_bit_what_the_dense_one_does(
    geometry: dict[str, Any], groups: int
) -> None:
    torch.manual_seed(groups)
    model = nn.Sequential(nn.Conv2d(16, 8, groups=groups, bias=groups != 2, **geometry))
    x = images(2, channels=16)
    for passes in ([Rtn(bits=3)], [Magnitude(sparsity=0.5)], [Magnitude(sparsity=0.3), Rtn(bits=4, symmetric=True)]):
        result = compress.apply(model, passes)
        made = packed_copy(model, result.weights)
        assert isinstance(made[0], PackedConvolution)
        with torch.no_grad():
            assert torch.equal(made(x), result.model(x))
            assert not torch.equal(made(x), model(x))


def test_a_packed_convolution_keeps_its_stored_types_and_follows_the_type_of_its_input() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1))
    made = packed_copy(model, compress.apply(model, [Rtn(bits=4)]).weights)
    before = made[0].dequantize()
    made.bfloat16()
    assert made[0].scale.dtype == torch.float16
    assert torch.equal(made[0].dequantize(), before)
    assert made[0].weight.dtype == made[0].bias.dtype == torch.bfloat16
    assert made(images().bfloat16()).dtype == torch.bfloat16
    assert "kernel_size=(3, 3)" in str(made)


def test_only_what_is_stored_of_a_packed_convolution_is_kept() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, bias=False))
    made = packed_copy(model, compress.apply(model, [Rtn(bits=4)]).weights)
    made(images(channels=8))
    held = {**dict(made[0].named_buffers()), **dict(made[0].named_parameters()), **made[0].__dict__}
    size = {n: t.numel() * t.element_size() for n, t in held.items() if isinstance(t, Tensor) and t.numel()}
    assert size == {"codes": 8 * 36, "scale": 8 * 2, "zero_point": 8}


# --- other dimensions -------------------------------------------------------------------------------------------------

OTHERS: list[tuple[nn.Module, Tensor]] = [
    (nn.Conv1d(4, 6, 3, stride=2, padding=1), torch.randn(5, 4, 40)),
    (nn.Conv1d(4, 6, 5, padding="same", dilation=2, bias=False), torch.randn(5, 4, 40)),
    (nn.Conv1d(4, 6, 4, padding=2, padding_mode="circular"), torch.randn(5, 4, 40)),
    (nn.Conv3d(4, 6, (2, 3, 1), stride=(1, 2, 1), padding=(1, 0, 0)), torch.randn(3, 4, 5, 8, 7)),
    (nn.Conv3d(4, 6, 2, stride=2, bias=False), torch.randn(3, 4, 6, 6, 6)),
]
each_other = pytest.mark.parametrize(("conv", "x"), OTHERS, ids=lambda v: str(v) if isinstance(v, nn.Module) else "")


@each_other
def test_windows_in_one_and_three_dimensions_are_those_of_the_convolution(conv: Any, x: Tensor) -> None:
    (site,) = graphs.find(conv).sites
    rows = torch.cat(list(windows.Windows.of(conv).rows(x)))
    with torch.no_grad():
        expected = conv(x)
        made = rows @ site.matrix(conv.weight).T + (0 if conv.bias is None else conv.bias)
    assert torch.allclose(made, expected.movedim(1, -1).reshape(-1, 6), atol=1e-5)
    assert (site.shape, site.kernel) == ((6, 4 * conv.weight[0, 0].numel()), conv.weight[0, 0].numel())
    alone = torch.cat(list(windows.Windows.of(conv).rows(x[0])))
    assert torch.equal(alone, rows[: len(alone)])


@each_other
def test_packed_convolutions_of_other_dimensions_compute_bit_for_bit_what_the_dense_ones_do(
    conv: nn.Module, x: Tensor
) -> None:
    model = nn.Sequential(copy.deepcopy(conv))
    for passes in ([Gptq(bits=3)], [compress.Wanda(sparsity=0.5), Rtn(bits=4, symmetric=True)]):
        result = compress.apply(model, passes, x)
        made = packed_copy(model, result.weights)
        assert isinstance(made[0], PackedConvolution)
        with torch.no_grad():
            assert torch.equal(made(x), result.model(x))
            assert not torch.equal(made(x), model(x))


TRANSPOSED: list[tuple[nn.Module, Tensor]] = [
    (nn.ConvTranspose2d(4, 6, 3), torch.randn(5, 4, 6, 7)),
    (nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 3), padding=(1, 0), output_padding=(1, 2)), torch.randn(5, 4, 6, 7)),
    (nn.ConvTranspose2d(4, 6, 3, dilation=2, padding=2, bias=False), torch.randn(5, 4, 6, 7)),
    (nn.ConvTranspose2d(4, 6, 1, padding=1), torch.randn(5, 4, 6, 7)),
    (nn.ConvTranspose1d(4, 6, 4, stride=2, padding=1), torch.randn(5, 4, 20)),
    (nn.ConvTranspose3d(4, 6, (2, 1, 3), stride=2), torch.randn(2, 4, 3, 4, 3)),
]
each_transposed = pytest.mark.parametrize(
    ("conv", "x"), TRANSPOSED, ids=lambda v: str(v) if isinstance(v, nn.Module) else ""
)


@each_transposed
def test_windows_of_a_transposed_convolution_times_its_matrix_are_its_output(conv: Any, x: Tensor) -> None:
    (site,) = graphs.find(conv).sites
    rows = torch.cat(list(windows.Windows.of(conv).rows(x)))
    with torch.no_grad():
        expected = conv(x)
        made = rows @ site.matrix(conv.weight).T + (0 if conv.bias is None else conv.bias)
    assert torch.allclose(made, expected.movedim(1, -1).reshape(-1, 6), atol=1e-5)
    assert torch.equal(site.value(site.matrix(conv.weight)), conv.weight)


@each_transposed
def test_a_packed_transposed_convolution_computes_bit_for_bit_what_the_dense_one_does(
    conv: nn.Module, x: Tensor
) -> None:
    model = nn.Sequential(copy.deepcopy(conv))
    for passes in ([Rtn(bits=3)], [Gptq(bits=3)], [compress.Wanda(sparsity=0.5), Rtn(bits=4, symmetric=True)]):
        result = compress.apply(model, passes, x)
        made = packed_copy(model, result.weights)
        with torch.no_grad():
            assert torch.equal(made(x), result.model(x))
            assert not torch.equal(made(x), model(x))
            assert not result.report.fallbacks


@pytest.mark.parametrize("groups", [2, 4])
def test_a_transposed_convolution_in_groups_is_solved_group_by_group(groups: int) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.ConvTranspose2d(8, 12, 3, stride=2, padding=1, groups=groups))
    (site,) = graphs.find(model).sites
    weight = model[0].weight
    assert torch.equal(site.value(site.matrix(weight)), weight)
    assert torch.equal(site.matrix(weight)[12 // groups].view(-1, 3, 3), weight[8 // groups : 16 // groups, 0])
    x = nn.functional.avg_pool2d(images(24, channels=8), 3, stride=1, padding=1)
    lost = []
    for pass_ in (Rtn(bits=3), Gptq(bits=3)):
        result = compress.apply(model, [pass_], x)
        made = packed_copy(model, result.weights)
        with torch.no_grad():
            assert torch.equal(made(x), result.model(x))
            assert torch.equal(made[0](x, output_size=(18, 22)), result.model[0](x, output_size=(18, 22)))
            lost.append(float((result.model(x) - model(x)).square().sum()))
    assert lost[1] < 0.8 * lost[0]


def test_gptq_learns_a_convolution_over_time_from_its_windows() -> None:
    model = nn.Sequential(nn.Conv1d(8, 16, 5, padding=2))
    x = nn.functional.avg_pool1d(torch.randn(32, 8, 64), 5, stride=1, padding=2)  # neighbours are alike
    with torch.no_grad():
        rtn, gptq = (
            float((compress.apply(model, [p], x).model(x) - model(x)).square().sum())
            for p in (Rtn(bits=3), Gptq(bits=3))
        )
    assert gptq < 0.7 * rtn


def test_filters_over_time_are_worked_on_only_where_a_pattern_names_them() -> None:
    model = nn.Sequential(nn.Conv1d(8, 8, 1), nn.Conv1d(8, 8, 4, groups=8))
    assert compress.apply(model, [Rtn(bits=4)]).weights.keys() == {"0"}
    assert compress.apply(model, [Rtn(bits=4, include=("*",))]).weights.keys() == {"0"}
    left = compress.apply(model, [Rtn(bits=4)]).report.dense
    assert left == {"depthwise convolutions over time": 8 * 4 * 4, "norms and biases": 2 * 8 * 4}
    assert compress.apply(model, [Rtn(bits=4, include=("0", "1"))]).weights.keys() == {"0", "1"}


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv1d, nn.Conv2d])
def test_a_weight_that_is_made_of_other_parameters_is_named_as_left_dense(kind: Any) -> None:
    def layer() -> nn.Module:
        made: nn.Module = kind(8, 8) if kind is nn.Linear else kind(8, 8, 1)
        return made

    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(layer()), *(layer() for _ in range(20)))
    result = compress.apply(model, [Rtn(bits=4)])
    assert result.weights.keys() == {str(number) for number in range(1, 21)}
    assert result.report.dense["layers with a parametrized weight"] == (8 + 64) * 4


# --- sites and blocks -------------------------------------------------------------------------------------------------


def test_the_matrix_of_a_convolution_has_one_row_an_output_channel() -> None:
    conv = nn.Conv2d(6, 8, (3, 2), groups=2)
    (site,) = graphs.find(conv).sites
    assert (site.shape, site.kernel, site.groups) == ((8, 18), 6, 2)
    matrix = site.matrix(conv.weight)
    assert torch.equal(matrix[5, 6:12].view(3, 2), conv.weight[5, 1])
    assert torch.equal(site.value(matrix), conv.weight)


def test_a_convolution_that_changes_its_weight_before_use_is_not_taken_for_a_plain_one() -> None:
    class Standardized(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)

    model = nn.Sequential(Standardized(4, 8, 3), nn.Conv2d(8, 4, 3))
    with pytest.raises(ConfigError, match=r"passes can reach 50% .* left dense would be Standardized layers"):
        compress.apply(model, [Rtn()])
    kept = model[0].weight.clone()
    result = compress.apply(model, [Rtn()], allow_dense=True)
    assert torch.equal(result.model[0].weight, kept)
    assert result.report.dense == {"Standardized layers": 1152, "norms and biases": 48}


def test_the_layers_of_a_sequential_are_learned_one_by_one_whatever_lies_between_them() -> None:
    # In place: what a block is given must still be there for its second visit.
    model = nn.Sequential(
        nn.ReLU(inplace=True), nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Flatten(),
        nn.Linear(8 * 7 * 9, 5),
    )  # fmt: skip
    x = images(8)
    given = x.clone()
    result = compress.apply(model, [FlexRound(bits=2, steps=10)], x, evaluation=(x, torch.zeros(8, dtype=torch.long)))
    assert torch.equal(x, given)
    notes = {name: passes["flexround"] for name, passes in result.report.layers.items()}
    assert notes.keys() == {"1", "5"}
    assert all(n["block_error"] < n["block_error_start"] for n in notes.values())


def test_the_whole_model_and_its_blocks_give_the_same_numbers() -> None:
    class Whole(nn.Module):
        def __init__(self, inner: nn.Sequential):
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2))
    apart = compress.apply(model, [Gptq(bits=3, include=("0",))], images())
    once = compress.apply(Whole(model), [Gptq(bits=3, include=("inner.0",))], images())
    assert torch.equal(apart.weights["0"].encoding.codes, once.weights["inner.0"].encoding.codes)


# --- passes -----------------------------------------------------------------------------------------------------------


def depthwise() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1))


@pytest.mark.parametrize("pass_", [Rtn(bits=3), GlobalMagnitude(sparsity=0.5), Magnitude(), FlexRound(bits=3, steps=3)])
def test_passes_without_statistics_work_on_grouped_convolutions(pass_: compress.passes.Pass) -> None:
    result = compress.apply(depthwise(), [pass_], images())
    assert result.weights["1"].kind == pass_.produces("dense")
    assert torch.isfinite(result.model(images())).all()


MIXING_ROWS = [
    Gptq(granularity="tensor"), FlexRound(objective="layer"), compress.SparseGpt(sparsity=0.5), compress.Eora(rank=2),
    compress.Wanda(free_rows=True), compress.Wanda(allocate="owl"), compress.Magnitude(allocate="owl"),
    compress.Codebook(bits=3, weighting="hessian"),
]  # fmt: skip


@pytest.mark.parametrize("pass_", MIXING_ROWS, ids=lambda p: p.key)
def test_what_learns_from_the_whole_matrix_says_which_grouped_convolutions_to_exclude(
    pass_: compress.passes.Pass,
) -> None:
    said = rf"1: a convolution in 8 groups.*{pass_.key}, as it is set here, learns from.*`exclude` them"
    with pytest.raises(ConfigError, match=said):
        compress.apply(depthwise(), [pass_], images())


class Apart(nn.Module):
    """A convolution in groups as one convolution for each group."""

    def __init__(self, whole: nn.Conv2d):
        super().__init__()
        made = []
        for weight, bias in zip(whole.weight.chunk(whole.groups), whole.bias.chunk(whole.groups), strict=True):
            one = nn.Conv2d(weight.shape[1], len(weight), whole.kernel_size, whole.stride, whole.padding)
            one.weight.data, one.bias.data = weight.detach().clone(), bias.detach().clone()
            made.append(one)
        self.groups = nn.ModuleList(made)

    def forward(self, x: Tensor) -> Tensor:
        parts = zip(self.groups, x.chunk(len(self.groups), 1), strict=True)
        return torch.cat([one(part) for one, part in parts], 1)


BY_ROW = [
    Gptq(bits=3), Gptq(bits=3, act_order=False, group_size=9), compress.Wanda(sparsity=0.5),
    compress.Wanda(sparsity=0.5, update="exact"), compress.SparseGpt(sparsity="2:3"),
]  # fmt: skip


@pytest.mark.parametrize("groups", [2, 6])
@pytest.mark.parametrize("pass_", BY_ROW, ids=lambda p: p.key)
def test_a_convolution_in_groups_is_solved_as_one_convolution_for_each(
    pass_: compress.passes.Pass, groups: int
) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(12 if groups == 2 else 6, 12, 3, padding=1, groups=groups))
    x = nn.functional.avg_pool2d(images(16, channels=model[0].in_channels), 3, stride=1, padding=1)
    together = compress.apply(model, [pass_], x)
    apart = compress.apply(Apart(model[0]), [pass_], x)
    with torch.no_grad():
        made, expected = together.model(x), apart.model(x)
        assert float((made - expected).norm()) < 0.01 * float((expected - model(x)).norm())
    (weight,) = together.weights.values()
    masks = [one.mask for one in apart.weights.values()]
    assert (weight.mask is None) == (masks[0] is None)
    assert weight.mask is None or torch.equal(weight.mask, torch.cat(masks))
    assert not together.report.fallbacks


@pytest.mark.parametrize("channels", [6, 12])
def test_statistics_of_groups_are_those_of_their_own_inputs(channels: int) -> None:
    torch.manual_seed(1)
    model = nn.Conv2d(channels, 12, (3, 2), stride=2, groups=6)
    x = images(7, channels=channels)
    for need in ("norm", "gram"):
        with torch.no_grad():
            runs = [lambda part=part: model(part) for part in torch.split(x, 3)]
            found = collect.statistics({"it": model}, {"it": need}, runs)["it"]
        size = channels // 6 * 6
        for group, part in enumerate(x.chunk(6, 1)):
            alone = nn.Conv2d(channels // 6, 2, (3, 2), stride=2)
            rows = torch.cat(list(windows.Windows.of(alone).rows(part)))
            own, expected = found.of_group(group), textbook_statistics(rows)
            assert own.tokens == len(rows)
            assert close(own.norm, expected.norm)
            if need == "gram":
                assert torch.equal(own.gram, own.gram.T)
                assert close(own.gram, expected.gram)
                assert close(own.mean.float(), rows.mean(0))
            assert close(found.square_sum[group * size : group * size + size].float(), rows.square().sum(0))


@pytest.mark.parametrize("need", ["norm", "gram"])
def test_statistics_of_groups_are_added_up_over_processes(need: Any) -> None:
    torch.manual_seed(1)
    model, x = nn.Conv2d(8, 8, 3, groups=4), images(6, channels=8)
    with torch.no_grad():
        whole, *parts = (
            collect.statistics({"it": model}, {"it": need}, [lambda part=part: model(part)])["it"]
            for part in (x, x[:4], x[4:])
        )
    (one,) = _fed_alike([[(["it"], part.width, part.need, part.groups)] for part in parts])
    assert one == [["it"], 72, need, 4]
    made = statistics_for(one[1], one[2], groups=one[3])
    for part in parts:
        made.tokens += part.tokens
        for mine, theirs in zip(made.sums(), part.sums(), strict=True):
            mine += theirs
    for group in range(4):
        own, expected = made.of_group(group), whole.of_group(group)
        assert own.tokens == expected.tokens
        assert close(own.norm, expected.norm)
        assert need == "norm" or close(own.gram, expected.gram)


def test_convolutions_in_groups_share_no_statistics_with_those_that_are_not() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.whole, self.grouped, self.again = (nn.Conv2d(8, 8, 3, groups=groups) for groups in (1, 4, 4))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return self.whole(x), self.grouped(x), self.again(x)

    model, x = Both(), images(channels=8)
    found = seen(dict(model.named_children()), [x], model)
    assert found["grouped"] is found["again"]
    assert found["grouped"] is not found["whole"]
    result = compress.apply(model, [Gptq(bits=3)], x)
    assert result.weights.keys() == {"whole", "grouped", "again"}


def test_gptq_loses_less_of_a_depthwise_convolution_than_rounding_whatever_runs_beside_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 16, 5, padding=2, groups=16))
    x = nn.functional.avg_pool2d(torch.randn(32, 16, 16, 16), 3, stride=1, padding=1)  # neighbours are alike
    lost = []
    for passes in ([Rtn(bits=3)], [Gptq(bits=3)], [[compress.Wanda(sparsity=0.2), Rtn(bits=8)]]):
        result = compress.apply(model, passes, x)
        with torch.no_grad():
            lost.append(float((result.model(x) - model(x)).square().sum()))
    assert lost[1] < 0.7 * lost[0]
    assert result.weights["0"].kind == "sparse-quantized"


def test_a_group_that_saw_nothing_is_rounded_and_the_report_says_so() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4))
    x = images()
    x[:, 2] = 0
    result = compress.apply(model, [Gptq(bits=4)], x)
    assert torch.isfinite(result.model(x)).all()
    assert result.report.fallbacks == ["0: 9 inputs are always zero (gptq)"]


def test_a_grouped_convolution_can_be_left_to_another_pass() -> None:
    result = compress.apply(depthwise(), [[Gptq(bits=3, exclude=("1",)), Rtn(bits=8, include=("1",))]], images())
    assert {name: w.encoding.bits for name, w in result.weights.items()} == {"0": 3, "1": 8, "2": 3}


def test_a_group_size_must_divide_the_columns_of_the_window() -> None:
    with pytest.raises(ConfigError, match="group_size 16 does not divide its 36 columns"):
        compress.apply(nn.Sequential(nn.Conv2d(4, 8, 3)), [Rtn(group_size=16)])
    made = compress.apply(nn.Sequential(nn.Conv2d(4, 8, 3)), [Rtn(group_size=9)])
    assert made.weights["0"].encoding.scale.shape == (8, 4)


def test_gptq_loses_less_of_a_convolution_than_rounding() -> None:
    model = nn.Sequential(nn.Conv2d(4, 16, 3, padding=1))
    x = nn.functional.avg_pool2d(torch.randn(32, 4, 16, 16), 3, stride=1, padding=1)  # neighbours are alike
    with torch.no_grad():
        rtn, gptq = (
            float((compress.apply(model, [p], x).model(x) - model(x)).square().sum())
            for p in (Rtn(bits=3), Gptq(bits=3))
        )
    assert gptq < 0.7 * rtn


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_flexround_learns_one_divisor_for_all_columns_of_an_input_channel(groups: int) -> None:
    w = torch.randn(5, 12)
    pass_ = FlexRound(bits=3, group_size=None if groups == 1 else 12 // groups)
    division = pass_.start(Target(w, kernel=4))
    assert isinstance(division, Division)
    assert division.log_s4.shape == (3, 1)
    assert any(t is division.log_s4 for tensors, _ in division.groups() for t in tensors)
    division.log_s4.data[1] = 0.5
    changed = division.logarithm().reshape(5, 12)
    assert bool((changed[:, 4:8] == 0.5).all())
    assert not changed[:, :4].any()
    assert not changed[:, 8:].any()
    division.soft(0.0).sum().backward()
    assert division.log_s4.grad is not None


def test_flexround_has_no_divisor_of_channels_where_every_column_is_one() -> None:
    division = FlexRound(bits=3).start(Target(torch.randn(5, 12)))
    assert isinstance(division, Division)
    assert not division.log_s4.requires_grad


def test_a_pass_is_told_the_window_of_a_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    start = FlexRound.start

    def seen(self: FlexRound, target: Target) -> Division:
        told.append(target.kernel)
        return start(self, target)

    monkeypatch.setattr(FlexRound, "start", seen)
    model = nn.Sequential(nn.Conv2d(4, 8, (3, 2)), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(8 * 7 * 10, 5))
    compress.apply(model, [FlexRound(steps=1)], images())
    assert told == [6, 1, 1]
