"""What a float32 model computes in while calibrating, and when sums over its inputs are looked at."""

import pytest
import textbook
import torch
from torch import Tensor, nn

import compress
from compress.calibration import collect, precision
from compress.calibration.precision import calibrating, products
from compress.calibration.statistics import Statistics
from compress.calibration.training import Learner, Loop, TrainingStore, learn
from compress.errors import NonFiniteError
from compress.passes import LinearPass
from compress.testing.elsewhere import elsewhere

CPU = torch.device("cpu")


class Blocks(nn.Module):
    """Two blocks that give what their last layer gives, of whatever type, and note it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)) for _ in range(2))
        self.seen: list[torch.dtype] = []
        for block in self.blocks:
            block[2].register_forward_hook(lambda _, __, made: self.seen.append(made.dtype))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def with_instructions(monkeypatch: pytest.MonkeyPatch, has: bool) -> None:
    monkeypatch.setattr(precision, "_only_narrow_factors", lambda: has)
    monkeypatch.setattr(precision, "_multiplies_bfloat16", lambda _: has)


@pytest.mark.parametrize("pass_", [compress.Gptq(), compress.FlexRound(steps=2), compress.Wanda()], ids=lambda p: p.key)
@pytest.mark.parametrize(("kind", "has"), [("bfloat16", True), ("bfloat16", False), ("float32", True)])
def test_layers_of_a_float32_model_calibrate_in_bfloat16_where_a_processor_multiplies_it(
    pass_: compress.passes.Pass, kind: precision.Products, has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_instructions(monkeypatch, has)
    model, x = Blocks(), torch.randn(32, 16)
    result = compress.apply(model, [pass_], calibration=x, products=kind, inplace=True)
    narrow = kind == "bfloat16" and has
    assert (torch.bfloat16 in model.seen) == narrow
    assert result.model(x).dtype == torch.float32  # and is as it was when that is done
    rounded = compress.apply(Blocks(), [pass_], calibration=x, products="float32").model(x)
    assert torch.allclose(result.model(x), rounded, atol=0.05)


def test_a_model_that_is_no_float32_computes_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with_instructions(monkeypatch, True)
    for dtype in (torch.float64, torch.float16):
        with calibrating("bfloat16", dtype, CPU):
            assert not torch.is_autocast_enabled("cpu")


def test_sums_over_inputs_are_float32_whatever_the_model_computes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    with_instructions(monkeypatch, True)
    x = torch.randn(64, 8)
    found = Statistics(8, "gram")
    with calibrating("bfloat16", torch.float32, CPU):
        found.update(x, "a test")
    gram = found.gram
    assert gram is not None
    assert torch.allclose(gram.double(), x.double().T @ x.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("need", ["gram", "norm"])
def test_inputs_that_are_not_finite_on_a_device_are_named_when_all_are_seen(need: str) -> None:
    with elsewhere() as device:
        layer = nn.Linear(4, 4)
        x = torch.ones(2, 4)
        x[1, 2] = torch.nan
        found = Statistics(4, need, device)  # type: ignore[arg-type]
        found.update(x.to(device), "up_proj")  # does not wait to look
        with pytest.raises(NonFiniteError, match=r"up_proj are not finite \(feature 2\)"):
            found.check("up_proj")
    with pytest.raises(NonFiniteError, match=r"up_proj are not finite \(feature 2\)"):
        collect.statistics({"up_proj": layer}, {"up_proj": "norm"}, [lambda: layer(x)])


class Diverging(Learner):
    """One number that falls by its gradient, until the loss is NaN."""

    def __init__(self, device: torch.device):
        self.number = torch.ones(1, device=device).requires_grad_()
        self.steps = 0

    def groups(self) -> list[tuple[list[Tensor], float]]:
        return [([self.number], 0.01)]

    def gradients(self, step: int) -> Tensor:
        self.steps = step
        loss = (self.number * (torch.nan if step >= 5 else 1.0)).sum()
        loss.backward()
        return loss.detach()

    def error(self) -> float:
        return float(self.number.detach().cpu())


def test_a_loss_that_is_not_finite_ends_learning_at_the_next_look_on_a_device_and_the_best_is_kept() -> None:
    ended = {}
    loop = Loop(10, lambda _: 1.0, 5, "learn", fused=False)
    for there in (False, True):
        with elsewhere() as device:
            learner = Diverging(device if there else CPU)
            outcome = learn(learner, loop, TrainingStore(), lambda steps, *_: iter(steps))
            assert learner.error() == outcome.best < 1
            ended[there] = learner.steps, outcome.best, outcome.best_step
    assert ended == {False: (5, ended[False][1], 4), True: (6, ended[False][1], 4)}


@pytest.mark.parametrize("pass_", [compress.Gptq(bits=3, group_size=16), compress.SparseGpt()], ids=lambda p: p.key)
def test_corrections_that_are_rounded_lose_no_more(pass_: LinearPass, monkeypatch: pytest.MonkeyPatch) -> None:
    w, x = textbook.weight(64, 192), textbook.inputs(192)
    lost = []
    for has in (False, True):
        with_instructions(monkeypatch, has)
        with products("bfloat16"):
            edit = pass_.run(textbook.target(w, x))
        made = edit.weight if edit.encoding is None else edit.encoding.dequantize()
        assert made is not None
        lost.append(textbook.output_error(w, made, x))
    assert lost[0] != lost[1]
    assert abs(lost[1] / lost[0] - 1) < 0.01


def test_products_are_as_they_were_when_calibration_ends() -> None:
    backend = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    with products("float32"):
        before = backend.fp32_precision
        with calibrating("bfloat16", torch.float32, CPU):
            assert backend.fp32_precision != before
        assert backend.fp32_precision == before
