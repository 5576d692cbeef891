"""Training with rounded weights: what its papers claim, on single matrices and on small models."""

from pathlib import Path
from typing import Any

import pytest
import textbook
import torch
from commands import stop_at_state
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import compress
from compress.config.options import errors_in
from compress.encodings import Uniform
from compress.errors import ConfigError
from compress.lazy import function
from compress.passes import Codebook, Eora, Gptq, Magnitude, Pass, Qat, Rtn
from compress.passes.base import Target
from compress.passes.retrain.rounded import FREE, Grid, RoundedMatrix, RoundThrough, step_of_weights, ternary_step

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK: dict[str, Any] = {"steps": 6, "learning_rate": 5e-4, "scale_rate": 0.02}
CASES = [
    Qat(bits=2, group_size=10),
    Qat(bits=3, symmetric=True, scale="stats"),
    Qat(bits=2, granularity="tensor"),
    Qat(levels="ternary"),
    Qat(levels="ternary", scale="mean", group_size=10),
    Qat(levels="ternary", scale="median", granularity="tensor"),
    Qat(bits=4, scale="fixed", train=("lora",), rank=2),
]


def masked() -> Target:
    kept = textbook.mask(12, 20, seed=0)
    return Target(textbook.weight(12, 20) * kept, kept, generator=torch.Generator())


def moved(pass_: Qat, target: Target) -> RoundedMatrix:
    """A matrix after a few steps of descent towards other values."""
    matrix = pass_.start("0", target, None)
    wanted = textbook.weight(12, 20, seed=9)
    optimizer = torch.optim.Adam(matrix.tensors(), lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        (matrix.soft() - wanted).square().sum().backward()
        optimizer.step()
    return matrix


# --- rounding and its gradients ---------------------------------------------------------------------------------------


def test_gradients_of_a_step_and_of_weights_are_those_of_the_paper() -> None:
    weight = (textbook.weight(6, 8) * 2).view(6, 2, 4).requires_grad_()
    step = torch.full((6, 2, 1), 0.7, requires_grad=True)
    low, high = torch.full((6, 2, 1), -2.0), torch.full((6, 2, 1), 1.0)
    arriving = textbook.weight(6, 8, seed=3).view(6, 2, 4)
    function(RoundThrough).apply(weight, step, low, high, False, None).backward(arriving)
    u = weight.detach() / 0.7
    below, above = u.round() < -2, u.round() > 1
    inside = ~(below | above)
    assert bool(below.any())
    assert bool(above.any())
    of_step = torch.where(inside, u.round() - u, torch.where(below, -2.0, 1.0))  # equation 3
    assert torch.allclose(step.grad, (arriving * of_step).sum(-1, keepdim=True), atol=1e-6)
    assert torch.equal(weight.grad, arriving * inside)  # equation 5


def test_with_the_gradient_of_bitnet_clipped_weights_learn_too() -> None:
    weight = torch.tensor([[[5.0, 0.1, -5.0]]], requires_grad=True)
    one = torch.ones(1, 1, 1)
    function(RoundThrough).apply(weight, one, -one, one, True, None).backward(torch.ones(1, 1, 3))
    assert torch.equal(weight.grad, torch.ones(1, 1, 3))


@pytest.mark.parametrize("pass_", CASES, ids=lambda p: str(p.options()))
def test_what_is_trained_is_what_is_stored_and_zeros_stay(pass_: Qat) -> None:
    for target in (masked(), Target(textbook.weight(12, 20), generator=torch.Generator())):
        matrix = moved(pass_, target)
        edit = matrix.edit({})
        assert edit.encoding.defect() is None
        assert edit.encoding.form == pass_.form((12, 20))
        assert torch.allclose(matrix.merged(), matrix.soft(), atol=2e-3)  # steps are stored in 16 bits
        assert not torch.equal(matrix.merged(), pass_.start("0", target, None).merged())
        if target.mask is not None:
            assert not bool(matrix.merged()[~target.mask].any())
            assert torch.equal(edit.mask, target.mask)
        if pass_.levels == "ternary":
            assert set(edit.encoding.codes.unique().tolist()) <= {1, 2, 3}


def test_training_starts_from_the_nearest_levels_of_the_searched_grid() -> None:
    target = masked()
    nearest = Rtn(bits=2, group_size=10, scale_search="mse").run(target).encoding
    found = Qat(bits=2, group_size=10).start("0", target, None).encoding()
    assert torch.equal(found.codes, nearest.codes)
    assert torch.equal(found.scale, nearest.scale)


def test_steps_of_weights_are_those_of_the_papers_over_the_kept_weights() -> None:
    target = masked()
    grid = Grid(torch.ones(12, 2), torch.full((12, 2), 2, dtype=torch.uint8), 2, symmetric=True, ternary=True)
    for i in range(12):
        for g in range(2):
            part = slice(10 * g, 10 * g + 10)
            kept = target.weight[i, part][target.mask[i, part]].abs()
            for scale, expected in (("mean", kept.mean()), ("median", kept.median()), ("stats", kept.mean() * 4 / 3)):
                found = step_of_weights(target.weight, target.mask, grid, scale)[i, g]  # type: ignore[arg-type]
                assert float(found) == pytest.approx(float(expected), rel=1e-3)


def test_a_group_without_weights_has_a_step_that_can_be_stored() -> None:
    empty = torch.zeros(3, 4)
    grid = Grid(torch.ones(3, 1), torch.full((3, 1), 2, dtype=torch.uint8), 2, symmetric=True)
    for mask in (None, empty.bool()):
        for scale in ("stats", "mean", "median"):
            assert torch.equal(step_of_weights(empty, mask, grid, scale), torch.ones(3, 1))  # type: ignore[arg-type]
        assert torch.equal(ternary_step(empty, mask, (3, 1)), torch.ones(3, 1))


def test_ternary_levels_start_where_the_error_is_about_least() -> None:
    weight = textbook.weight(4, 400)

    def error(step: Tensor) -> Tensor:
        return ((weight / step).round().clamp(-1, 1) * step - weight).square().sum(1)

    least = torch.stack([error(torch.tensor(k / 50)) for k in range(10, 150)]).min(0).values
    assert bool((error(ternary_step(weight, None, (4, 1))) <= 1.02 * least).all())
    assert bool((error(weight.abs().mean(1, keepdim=True)) > 1.02 * least).any())


def test_with_lora_alone_what_is_rounded_differs_by_a_low_rank() -> None:
    matrix = moved(Qat(bits=8, train=("lora",), rank=2, scale="fixed"), Target(textbook.weight(12, 20)))
    change = (matrix.latent.merged() - textbook.weight(12, 20)).double()
    assert int(torch.linalg.matrix_rank(change, rtol=1e-4)) == 2


def flips(anneal: float | None) -> int:
    """How often weights change levels in the second half of a training with noisy gradients."""
    pass_ = Qat(bits=2, steps=60, scale="fixed", anneal=anneal)
    matrix = pass_.start("0", Target(textbook.weight(12, 20)), None)
    wanted, noise = textbook.weight(12, 20, seed=9), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(matrix.tensors(), lr=0.05)
    found, before = 0, matrix.encoding().codes
    for step in range(1, 61):
        optimizer.zero_grad()
        (matrix.soft() - wanted - 0.3 * torch.randn(12, 20, generator=noise)).square().sum().backward()
        optimizer.step()
        matrix.stepped(step)
        codes = matrix.encoding().codes
        found += int((codes != before).sum()) if step > 30 else 0
        before = codes
    return found


def test_annealing_brings_weights_to_rest_that_go_to_and_fro() -> None:
    assert flips(None) > 100
    assert flips(0.5) < 0.6 * flips(None)


def test_annealing_holds_what_is_far_from_a_border_and_lets_nothing_go() -> None:
    matrix = Qat(bits=2, symmetric=True, steps=10, anneal=0.5).start("0", masked(), None)
    units = matrix.latent.merged().view(12, 1, 20) / matrix.grid.step[..., None]
    border = (units - units.floor() - 0.5).abs() <= 0.05
    inside = border & (units > -2) & (units < 1)
    matrix.stepped(4)
    assert bool((matrix.held == FREE).all())
    codes = matrix.encoding().codes
    matrix.stepped(5)
    assert torch.equal(matrix.held == FREE, inside)
    assert bool(inside.any())
    assert torch.equal(matrix.encoding().codes, codes)
    matrix.soft().sum().backward()
    assert not bool(matrix.latent.tensors()[0].grad.view(12, 1, 20)[~inside].any())
    assert bool(matrix.latent.tensors()[0].grad.view(12, 1, 20)[inside].any())


# --- options ----------------------------------------------------------------------------------------------------------


def test_impossible_options_are_refused_and_say_what_to_do() -> None:
    for pass_, said in (
        (Qat(train=("head",)), "head is not rounded here; train it with perp"),
        (Qat(train=("norm", "scale")), "scale: lsq trains the steps"),
        (Qat(train=("lora_prune",)), "name lora, mask_lora or full"),
        (Qat(levels="stored", bits=3), "keeps the grid that is there"),
        (Qat(levels="ternary", bits=3), "whose codes have 2"),
        (Qat(scale="mean", symmetric=True), "set levels: ternary"),
        (Qat(scale="stats"), "set levels: even and symmetric: true"),
        (Qat(levels="stored", scale="stats"), "set levels: even and symmetric: true"),
        (Qat(scale="fixed", scale_rate=0.1), "changes nothing unless steps are learned"),
        (Qat(activation_bits=8, activation_scale="tensor"), "qat sees none"),
    ):
        errors = errors_in(pass_)
        assert len(errors) == 1, errors
        assert said in errors[0].message
    assert errors_in(Qat(levels="ternary", bits=2, group_size=64)) == []


@pytest.mark.parametrize(
    ("passes", "said"),
    [
        ([Rtn(bits=4), Qat(bits=2)], "Set levels: stored, which goes on from these, or put qat before the quantizer"),
        ([Qat(levels="stored")], "no codes to go on from. Put a quantizer before"),
        ([Codebook(bits=2), Qat(levels="stored")], r"\(codebook\) are no even steps.*or `exclude` them"),
        ([Rtn(bits=2), Eora(rank=2), Qat(levels="stored")], "Put qat before eora"),
        ([Qat(bits=2, group_size=24)], "group_size 24 does not divide"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_work_starts(
    tiny_llama: LlamaForCausalLM, tokens: Tensor, passes: list[Pass], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        compress.apply(tiny_llama, passes, tokens)


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pass_",
    [
        pytest.param(Qat(bits=2, group_size=32, **QUICK), marks=pytest.mark.real),
        pytest.param(Qat(bits=2, symmetric=True, scale="stats", steps=6), marks=pytest.mark.real),
        Qat(levels="ternary", scale="mean", steps=6),
        Qat(bits=2, train=("norm", "lora"), rank=4, **QUICK),
    ],
    ids=lambda p: f"{p.levels}-{p.scale}-{p.train[-1]}",
)
def test_a_model_comes_nearer_to_the_original_than_rounding_does(
    tiny_llama: LlamaForCausalLM, tokens: Tensor, pass_: Qat
) -> None:
    made = compress.apply(tiny_llama, [pass_], tokens)
    notes = next(iter(made.report.layers.values()))["qat"]
    assert notes["loss"] < notes["loss_start"]
    assert {w.kind for w in made.weights.values()} == {"quantized"}
    assert {w.encoding.bits for w in made.weights.values()} == {2}


def test_codes_that_are_there_are_trained_on_their_grid(tiny_llama: LlamaForCausalLM, tokens: Tensor) -> None:
    before = [Magnitude(sparsity=0.3), Rtn(bits=2, group_size=32, activation_bits=8)]
    start = compress.apply(tiny_llama, before, tokens, evaluation=tokens)
    made = compress.apply(tiny_llama, [*before, Qat(levels="stored", **QUICK)], tokens, evaluation=tokens)
    assert made.report.rows[-1].kl < start.report.rows[-1].kl
    for name, weight in made.weights.items():
        old = start.weights[name]
        assert isinstance(weight.encoding, Uniform)
        assert weight.encoding.form == old.encoding.form
        assert torch.equal(weight.encoding.zero_point, old.encoding.zero_point)
        assert torch.equal(weight.mask, old.mask)
        assert weight.inputs == old.inputs
        assert not torch.equal(weight.encoding.codes, old.encoding.codes)
        assert not torch.equal(weight.encoding.scale, old.encoding.scale)


def test_the_first_codes_are_those_that_were_there(tiny_llama: LlamaForCausalLM, tokens: Tensor) -> None:
    first = compress.apply(tiny_llama, [Gptq(bits=3, group_size=32)], tokens)
    for name, weight in first.weights.items():
        original = tiny_llama.get_submodule(name).weight.detach()
        target = Target(weight.dequantize(), original=original, stored=weight)
        matrix = Qat(levels="stored").start(name, target, None)
        for part in ("codes", "scale", "zero_point"):
            assert torch.equal(getattr(matrix.encoding(), part), getattr(weight.encoding, part))
        away = (matrix.latent.merged() - original).abs()
        assert bool((away <= (weight.dequantize() - original).abs()).all())
        assert float((away == 0).float().mean()) > 0.5  # most lie where their codes are


def test_a_killed_training_goes_on_to_the_same_bytes_and_loads(
    tiny_folder: Path, tmp_path: Path, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    qat = {"qat": {"levels": "ternary", "scale": "lsq", "group_size": 32, "steps": 5, "anneal": 0.4}}
    steps = {"passes": [qat], "products": "float32"}
    report = compress.run(steps, tiny_folder, tmp_path / "whole", calibration=tokens, evaluation=tokens)
    assert report.verified["max_logit_difference"] == 0
    saved = stop_at_state(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        compress.run(steps, tiny_folder, tmp_path / "parts", calibration=tokens, evaluation=tokens)
    compress.run(steps, tiny_folder, tmp_path / "parts", calibration=tokens, evaluation=tokens)
    assert len(saved) == 5  # two of five looks were left
    for file in ("compress.safetensors", "config.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert any(name.endswith("codes") for name in loaded.state_dict())
