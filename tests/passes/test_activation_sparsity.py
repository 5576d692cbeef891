"""Activation sparsity: what the papers claim of it, how it is kept, and that skipped columns are not read."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import textbook
import torch
from runtime_layers import weight as packed_weight
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import compress
from compress import ActivationSparsity, Rtn, WidthPrune
from compress.config.pipeline import Pipeline
from compress.encodings import InputForm, Weight, pack
from compress.encodings.inputs import Criterion, Threshold
from compress.engine.validate import observed
from compress.errors import ConfigError
from compress.export.base import Exporter
from compress.models.site import Site, TensorRef
from compress.passes import Pass
from compress.passes.base import Target
from compress.passes.prune.activation_sparsity import importance
from compress.passes.quantize.activations import attached
from compress.runtime.linear import PackedLinear

pytestmark = pytest.mark.usefixtures("one_thread")

BOTH: tuple[Criterion, ...] = ("wina", "teal")


def thresholds(w: Tensor, x: Tensor, skip: float = 0.5, criterion: Criterion = "wina") -> Threshold:
    pass_ = ActivationSparsity(skip=skip, criterion=criterion)
    edit = pass_.run(Target(w, statistics=textbook.seen_by(pass_, x)))
    assert edit.keeps
    assert isinstance(edit.inputs, Threshold)
    return edit.inputs


def normal(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def uneven(rows: int, columns: int) -> Tensor:
    """Orthogonal columns of very different norms."""
    return torch.linalg.qr(normal(rows, columns, 3))[0] * normal(1, columns, 4).exp()


def layer(made: Weight, skip: float = 0.5) -> PackedLinear:
    """A packed layer that skips inputs, as it is loaded."""
    columns = made.dequantize().shape[1]
    form = InputForm(grid="threshold", scale="tensor", criterion="teal", skip=skip)
    spec, tensors = pack(replace(made, inputs=Threshold.of(form, normal(64, columns, 5), torch.ones(columns))))
    dtype = torch.float32 if made.values is None else made.values.dtype
    found = PackedLinear(spec, bias=False, transposed=False, dtype=dtype)
    found.load_state_dict(tensors)
    return found


def quick(found: PackedLinear, exact: bool = True) -> str:
    return compress.speed_up(nn.Sequential(found), exact=exact).layers[0].kernel


def problems(model: nn.Module, *passes: Pass) -> str:
    with pytest.raises(ConfigError) as refused:
        compress.apply(model, list(passes), calibration=torch.zeros(4, 8, dtype=torch.int64))
    return str(refused.value)


# --- which inputs are skipped -----------------------------------------------------------------------------------------


def test_no_choice_of_as_many_inputs_loses_less_than_wina_where_columns_are_orthogonal() -> None:
    w, x = uneven(64, 48), normal(200, 48, 6)
    kept = thresholds(w, x).rounded(x).ne(0)
    lost = (x.masked_fill(kept, 0) @ w.T).square().sum(1)
    scores = (x.abs() * w.norm(dim=0)).square()
    for token in range(len(x)):
        least = scores[token].sort().values[: int((~kept[token]).sum())].sum()
        assert float(lost[token]) == pytest.approx(float(least), rel=1e-3)


def test_wina_loses_less_than_teal_at_the_same_share_where_columns_differ_and_as_much_where_they_do_not() -> None:
    x, held_out = normal(400, 48, 7), normal(100, 48, 8)
    for w, differ in ((uneven(64, 48), True), (torch.linalg.qr(normal(64, 48, 9))[0], False)):
        made = [thresholds(w, x, 0.5, criterion).rounded(held_out) for criterion in BOTH]
        wina, teal = (float(((each - held_out) @ w.T).norm()) for each in made)
        assert float(made[0].eq(0).float().mean()) == pytest.approx(0.5, abs=0.03)
        assert wina < 0.6 * teal if differ else wina == pytest.approx(teal, rel=0.01)


def test_a_threshold_lies_between_two_inputs_of_the_sample() -> None:
    x = textbook.inputs(40, tokens=300)
    found = thresholds(textbook.weight(16, 40), x, 0.5, "teal")
    nearest = (x.abs() - found.threshold).abs().min()
    assert float(nearest) > 1e-6 * float(found.threshold[0])


@pytest.mark.parametrize("criterion", BOTH)
def test_the_share_that_is_asked_for_is_skipped_on_calibration_data(criterion: Criterion) -> None:
    w, x = textbook.weight(16, 40), textbook.inputs(40, tokens=300)
    for skip in (0.01, 0.25, 0.5, 0.9):
        found = thresholds(w, x, skip, criterion).apply(x)
        assert float(found.eq(0).float().mean()) == pytest.approx(skip, abs=1e-3)
        assert torch.equal(found[found != 0], x[found != 0])


def test_nothing_but_zeros_is_skipped_where_more_inputs_are_zero_than_asked_for() -> None:
    x = textbook.inputs(40, tokens=100).relu_()
    assert torch.equal(thresholds(textbook.weight(16, 40), x, 0.3).apply(x), x)


def test_inputs_of_columns_without_weights_are_always_skipped_and_nan_is_not_hidden() -> None:
    w, x = textbook.weight(16, 40), textbook.inputs(40)
    w[:, 3] = 0
    found = thresholds(w, x, 0.2)
    assert not bool(found.apply(1e30 * x)[:, 3].any())
    assert bool(found.apply(torch.full((1, 40), torch.nan)).isnan().all())


def test_what_is_skipped_follows_from_the_norms_of_columns() -> None:
    assert torch.equal(importance(torch.tensor([[3.0, 0.0], [4.0, 2.0]]), "wina"), torch.tensor([5.0, 2.0]))
    assert torch.equal(importance(torch.tensor([[3.0, 0.0], [4.0, 2.0]]), "teal"), torch.ones(2))


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_weights_of_every_kind_stay_as_they_are() -> None:
    dense, x = normal(24, 64, 12), normal(64, 64, 17)
    factors = packed_weight("uniform 4 groups", 24, 64, rank=2).low_rank
    mask = textbook.mask(24, 64)
    kinds = [
        Weight(dense),
        Weight(dense * mask, mask),
        packed_weight("codebook 4", 24, 64),
        packed_weight("uniform 4 groups", 24, 64, mask="2:4", rank=2),
        Weight(low_rank=factors),
    ]
    for before in kinds:
        values, site = before.dequantize(), Site("a", (24, 64), TensorRef("a.weight"), 0)
        edit = ActivationSparsity().run(Target(values, before.mask, textbook.seen_by(ActivationSparsity(), x)))
        after, error = observed(site, ActivationSparsity(), before, values, edit, torch.float32)
        made, notes = attached(ActivationSparsity(), after, edit, None)
        assert error == 0
        assert made.inputs is edit.inputs
        assert replace(made, inputs=None) == before
        assert ActivationSparsity().refusal(before.kind) is None
        assert ActivationSparsity().produces(before.kind) == made.kind
        assert notes == {"inputs": "wina thresholds that skip 40%"}


def test_a_layer_that_nothing_reached_keeps_its_inputs_and_the_report_says_so() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x)

    result = compress.apply(Unused(), [ActivationSparsity()], calibration=torch.randn(16, 8))
    assert result.weights["second"].inputs is None
    assert result.weights["first"].inputs is not None
    assert "none ever reached it" in result.report.layers["second"]["activation_sparsity"]["fallback"]


@pytest.mark.parametrize(
    "changed",
    [
        {"skip": None},
        {"skip": 1.5},
        {"skip": "half"},
        {"criterion": "cats"},
        {"bits": 4},
        {"normal": "int4"},
        {"scale": "token"},
        {"grid": "int"},
    ],
)
def test_a_file_that_states_impossible_thresholds_is_refused(changed: dict[str, object]) -> None:
    stated = InputForm(grid="threshold", scale="tensor", criterion="wina", skip=0.5).to_json()
    assert InputForm.from_json(stated).to_json() == stated
    with pytest.raises(ValueError, match="input"):
        InputForm.from_json({k: v for k, v in (stated | changed).items() if v is not None})


def test_a_run_that_was_cut_short_ends_with_the_same_files(
    tiny_folder: Path, tmp_path: Path, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Pipeline(passes=((Rtn(bits=4),), (ActivationSparsity(),)))
    compress.run(steps, tiny_folder, tmp_path / "whole", calibration=tokens)
    run, calls = ActivationSparsity.run, 0

    def counted(self: ActivationSparsity, target: Target) -> object:
        nonlocal calls
        calls += 1
        if calls == 10:  # in the second block
            raise KeyboardInterrupt
        return run(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(ActivationSparsity, "run", counted)
        with pytest.raises(KeyboardInterrupt):
            compress.run(steps, tiny_folder, tmp_path / "cut", calibration=tokens)
    compress.run(steps, tiny_folder, tmp_path / "cut", calibration=tokens)
    for name in ("compress.safetensors", "config.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# --- what is refused --------------------------------------------------------------------------------------------------


def test_inputs_are_either_rounded_or_skipped(tiny_llama: PreTrainedModel) -> None:
    said = problems(tiny_llama, Rtn(bits=8, activation_bits=8), ActivationSparsity())
    assert "are int8 per token already" in said
    assert "either rounds or skips" in said
    said = problems(tiny_llama, ActivationSparsity(), Rtn(bits=8, activation_bits=8))
    assert "are wina thresholds that skip 40% already" in said


def test_columns_are_not_taken_out_of_layers_that_have_thresholds(tiny_llama: PreTrainedModel) -> None:
    assert "put it before activation_sparsity" in problems(tiny_llama, ActivationSparsity(), WidthPrune())


def test_convolutions_and_embeddings_have_nothing_to_skip(tiny_llama: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match="no columns to skip"):
        compress.apply(nn.Sequential(nn.Conv2d(3, 8, 3)), [ActivationSparsity()], calibration=torch.randn(4, 3, 8, 8))
    said = problems(tiny_llama, ActivationSparsity(include=("*embed_tokens*",)))
    assert "no inputs to round or skip" in said
    assert "activation_bits" not in said


@pytest.mark.parametrize("format_", ["hf", "gguf", "compressed-tensors"])
def test_containers_of_plain_layers_refuse_before_the_run(
    format_: str, tiny_folder: Path, tmp_path: Path, tokens: Tensor
) -> None:
    exporters: list[Exporter] = [compress.Hf(), compress.Gguf(), compress.CompressedTensors()]
    exporter = next(each for each in exporters if each.key == format_)
    steps = Pipeline(passes=((ActivationSparsity(),),), export=(exporter,))
    with pytest.raises(ConfigError, match="activation_sparsity out of the passes"):
        compress.run(steps, tiny_folder, tmp_path / "out", calibration=tokens)
    assert not (tmp_path / "out").exists()


# --- what is computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_columns_of_skipped_inputs_are_not_read(dtype: torch.dtype) -> None:
    values, x = normal(24, 40, 10).to(dtype), normal(1, 40, 11).to(dtype)
    found = layer(Weight(values), 0.6)
    needed = found.rounded(x)[0] != 0
    expected = found(x)
    with torch.no_grad():
        found.values[:, ~needed] = torch.nan
        assert bool(found(x).isnan().all())  # as loaded all of them are read
        found.values[:, ~needed] = 1.0
        assert quick(found) == "columns"
        found.values[:, ~needed] = torch.nan
        assert torch.allclose(found(x).float(), expected.float(), rtol=0.02 if dtype != torch.float32 else 1e-5)


KINDS = {
    "float32": lambda: Weight(normal(24, 64, 12)),
    "bfloat16": lambda: Weight(normal(24, 64, 12).bfloat16()),
    "4 bits, groups": lambda: packed_weight("uniform 4 groups", 24, 64),
    "8 bits": lambda: packed_weight("uniform 8", 24, 64),
    "2:4, 4 bits": lambda: packed_weight("uniform 4 groups", 24, 64, mask="2:4"),
    "4 bits, corrected": lambda: packed_weight("uniform 4 groups", 24, 64, rank=2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_was_sped_up_computes_what_it_did(kind: str) -> None:
    found = layer(KINDS[kind]())
    for dtype in (torch.float32, torch.bfloat16):
        for x in (normal(1, 64, 13), normal(5, 64, 14), normal(1, 64, 15) * 9, torch.zeros(1, 64)):
            found.use(None)
            expected = found(x.to(dtype)).float()
            assert "columns" in quick(found)
            made = found(x.to(dtype))
            assert made.dtype == dtype
            error = (made.float() - expected).abs().max() / expected.abs().max().clamp(min=1e-9)
            assert float(error) < (1e-5 if dtype == torch.float32 else 0.02), (x.shape, dtype)


def test_a_product_of_bfloat16_keeps_torchs_own_kernels_for_codes() -> None:
    assert quick(layer(packed_weight("uniform 4 groups", 32, 64)), exact=False) == "int4"
    assert quick(layer(Weight(normal(32, 64, 16))), exact=False) == "columns"


def test_a_model_that_was_sped_up_is_saved_as_it_was_loaded(
    llama_maker: Callable[..., PreTrainedModel], tokens: Tensor, tmp_path: Path
) -> None:
    llama_maker().save_pretrained(tmp_path / "model")
    compress.run(Pipeline(passes=((ActivationSparsity(),),)), tmp_path / "model", tmp_path / "out", calibration=tokens)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before = {name: value.clone() for name, value in loaded.state_dict().items()}
    assert compress.speed_up(loaded).kernels == {"columns": 14}
    after = loaded.state_dict()
    assert all(torch.equal(value, after[name]) and after[name].is_contiguous() for name, value in before.items())
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        expected = again(tokens[:1, :1]).logits
        assert torch.allclose(loaded(tokens[:1, :1]).logits, expected, atol=1e-4)
    mlp = loaded.model.layers[0].mlp.up_proj
    mlp.use(None)
    assert mlp.values.is_contiguous()
