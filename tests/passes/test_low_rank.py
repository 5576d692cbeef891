"""Low rank: ranks within the ratio, the best factors for the outputs, and learning that never makes them worse."""

import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from children import contents, prepare
from children import run as run_child
from conftest import make_llama
from selection import only
from textbook import block, inputs, output_error, statistics
from textbook import weight as random_weight
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import compress
from compress.config.pipeline import Pipeline
from compress.encodings import LowRankFactors as Factors
from compress.errors import ConfigError
from compress.passes import Eora, Gptq, LowRank, Magnitude, Override, Pass, Perp, PerpReconstruct, Rtn
from compress.passes.base import Target
from compress.passes.solvers.whitening import WhitenedMatrix

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS, COLUMNS = 24, 40


def problem(rows: int = ROWS, columns: int = COLUMNS, seed: int = 0) -> tuple[Target, Tensor]:
    x = inputs(columns, seed=seed)
    return Target(random_weight(rows, columns, seed), None, statistics(x)), x


def factors(target: Target, **options: object) -> Factors:
    """Those that are not learned."""
    found = LowRank(steps=0, **options).start(target).factors()
    assert found.defect(tuple(target.weight.shape)) is None
    return found


def root_error(target: Target, made: Factors, x: Tensor) -> float:
    return output_error(target.weight, made.product(), x) ** 0.5


# --- the factors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.75, 0.99])
@pytest.mark.parametrize("shape", [(64, 64), (64, 200), (7, 300), (31, 32)])
def test_the_factors_have_as_many_numbers_as_the_ratio_allows_and_one_more_rank_has_more(
    ratio: float, shape: tuple[int, int]
) -> None:
    pass_ = LowRank(ratio=ratio)
    if pass_.check_shape(shape) is not None:
        assert sum(shape) > ratio * shape[0] * shape[1]
        return
    rank = factors(problem(*shape)[0], ratio=ratio).rank
    assert rank == pass_.low_rank_form(shape).rank
    assert rank * sum(shape) <= ratio * shape[0] * shape[1] < (rank + 1) * sum(shape)


@pytest.mark.parametrize("need", ["none", "gram"])
def test_full_rank_is_the_matrix_again(need: str) -> None:
    for rows, columns in ((24, 40), (40, 24)):
        target, _ = problem(rows, columns)
        whole = WhitenedMatrix.through(target.weight.double(), target.statistics, need, 1e-6).factors(24)
        torch.testing.assert_close(whole.product(), target.weight, rtol=0, atol=5e-3)  # 16 bits per number


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_the_error_of_whitened_factors_is_that_of_the_directions_they_drop(
    ratio: float, shape: tuple[int, int]
) -> None:
    target, x = problem(*shape)
    made = factors(target, ratio=ratio, floor=1e-12)
    dropped = torch.linalg.svdvals(target.weight.double() @ x.double().T)[made.rank :]
    assert root_error(target, made, x) == pytest.approx(float(dropped.square().sum().sqrt()), rel=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_whitened_factors_are_nearer_in_the_outputs_and_those_of_svd_in_the_matrix(seed: int) -> None:
    target, x = problem(seed=seed)
    for ratio in (0.2, 0.5, 0.8):
        made = {method: factors(target, ratio=ratio, method=method) for method in ("whitened", "svd")}
        assert root_error(target, made["whitened"], x) < root_error(target, made["svd"], x)
        strayed = {method: float((target.weight - found.product()).norm()) for method, found in made.items()}
        assert strayed["svd"] < strayed["whitened"]


def test_inputs_that_are_all_alike_make_whitening_svd() -> None:
    w = random_weight(ROWS, COLUMNS)
    target = Target(w, None, statistics(torch.linalg.qr(torch.randn(COLUMNS, COLUMNS))[0]))
    made, plain = (factors(target, method=method).product() for method in ("whitened", "svd"))
    torch.testing.assert_close(made, plain, rtol=0, atol=5e-3)


def test_inputs_that_never_vary_do_not_blow_up_the_factors() -> None:
    target, x = problem()
    x[:, :10] = 0
    x[:, 11] = x[:, 12]
    made = factors(Target(target.weight, None, statistics(x)))
    assert float(made.product().abs().max()) < 10 * float(target.weight.abs().max())


# --- ranks that share a budget ------------------------------------------------------------------------------------


@pytest.mark.parametrize("allocate", ["energy", "relative"])
def test_allocated_ranks_cost_what_all_may_and_lose_less_energy_than_equal_ones(allocate: str) -> None:
    shapes = {"small": (24, 40), "wide": (32, 96), "tall": (80, 24)}
    targets = {name: problem(*shape, seed=seed)[0] for seed, (name, shape) in enumerate(shapes.items())}
    few = random_weight(32, 2) @ random_weight(2, 96)
    targets["wide"] = replace(targets["wide"], weight=few)  # two directions are all that it has
    pass_ = LowRank(ratio=0.4, allocate=allocate, overrides=(Override("small", {"method": "svd"}),))
    found = {name: pass_.at(name).survey(target) for name, target in targets.items()}
    decided = pass_.allocated(found)
    assert decided.at("small").method == "svd"
    ranks = {name: decided.at(name).rank(shape) for name, shape in shapes.items()}
    budget = 0.4 * sum(rows * columns for rows, columns in shapes.values())
    spent = sum(rank * sum(shapes[name]) for name, rank in ranks.items())
    assert budget - max(map(sum, shapes.values())) < spent <= budget
    assert ranks["wide"] <= 2 < ranks["small"]

    def lost(of: dict[str, int]) -> float:
        return sum(sum(each["energies"][of[name] :]) for name, each in found.items())

    assert lost(ranks) < lost({name: pass_.rank(shape) for name, shape in shapes.items()})


def test_no_allocated_matrix_has_factors_as_large_as_it_is_and_none_has_rank_0() -> None:
    shapes = {"all": (16, 16), "nothing": (64, 64)}
    found = {name: {"energies": [float(name == "all")] * shape[0], "shape": shape} for name, shape in shapes.items()}
    decided = LowRank(ratio=0.9, allocate="energy").allocated(found)
    assert decided.at("all").rank(shapes["all"]) == 7
    assert 1 <= decided.at("nothing").rank(shapes["nothing"]) < 32


def test_ranks_are_allocated_in_a_pipeline_and_the_model_is_as_large_as_with_equal_ones(tokens: Tensor) -> None:
    ranks = {}
    for allocate in ("uniform", "relative"):
        result = compress.apply(make_llama(), [LowRank(steps=2, allocate=allocate)], tokens, evaluation=tokens)
        assert result.report.rows[-1].bits_per_weight == pytest.approx(8, rel=0.05)
        of_shape: dict[tuple[int, ...], set[int]] = {}
        for weight in result.weights.values():
            assert weight.low_rank is not None
            of_shape.setdefault(weight.low_rank.shape, set()).add(weight.low_rank.rank)
        ranks[allocate] = of_shape
    assert all(len(each) == 1 for each in ranks["uniform"].values())
    assert any(len(each) > 1 for each in ranks["relative"].values())


# --- learning -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"method": "svd"}, {"inputs": "mix"}, {"perturbation": 0.1}], ids=str)
def test_learning_brings_the_outputs_of_the_block_nearer(options: dict[str, object]) -> None:
    targets = {name: problem(seed=seed)[0] for seed, name in enumerate(("a", "b"))}
    for name, edit in LowRank(steps=40, **options).run(block(targets)):
        assert edit.replaces
        assert edit.low_rank.rank == LowRank().rank((ROWS, COLUMNS)), name
        assert edit.notes["block_error"] < edit.notes["block_error_start"]


def test_a_learning_rate_that_is_too_large_leaves_the_factors_as_they_start() -> None:
    target, _ = problem()
    ((_, edit),) = LowRank(steps=10, learning_rate=0.999, perturbation=1e9).run(block({"a": target}))
    assert edit.notes["best_step"] == 0
    assert torch.equal(edit.low_rank.product(), factors(target).product())


def test_the_perturbation_keeps_the_product_near_the_matrix_and_its_gradient_is_of_one_row() -> None:
    target, _ = problem()
    matrix = LowRank(perturbation=1.0).start(target)
    lost = (matrix.product() - target.weight).detach().abs().sum(1)
    expected = (float(lost.max() / target.weight.abs().sum(1).max()) - 1e-3) ** 2
    cost = matrix.strayed()
    assert cost.item() == pytest.approx(expected, rel=1e-4)
    (gradient,) = torch.autograd.grad(cost, [matrix.tensors[1]])
    assert gradient.abs().sum(1).nonzero().flatten().tolist() == [int(lost.argmax())]
    strayed = {}
    for perturbation in (0.0, 10.0):
        ((_, edit),) = LowRank(steps=60, perturbation=perturbation).run(block({"a": target}))
        strayed[perturbation] = float((edit.low_rank.product() - target.weight).abs().sum(1).max())
    assert strayed[10.0] < strayed[0.0]


# --- in a pipeline ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low_rank", [LowRank(steps=4), LowRank(steps=0), LowRank(steps=0, method="svd")], ids=str)
def test_the_written_model_has_the_size_that_was_planned_and_computes_the_same(
    low_rank: LowRank, tokens: Tensor, tmp_path: Path
) -> None:
    make_llama().save_pretrained(tmp_path / "model")
    pipeline = Pipeline(passes=((low_rank,),), products="float32")
    report = compress.run(pipeline, tmp_path / "model", tmp_path / "out", calibration=tokens, evaluation=tokens)
    assert report.verified["max_logit_difference"] == 0
    assert report.rows[-1].bits_per_weight == pytest.approx(8, rel=0.05)
    assert report.rows[-1].sparsity == 0
    resident = compress.apply(make_llama(), [low_rank], calibration=tokens, products="float32")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, made in resident.weights.items():
        assert made.kind == "low-rank"
        packed = loaded.get_submodule(name)
        assert torch.equal(packed.dequantize(), made.dequantize()), name
        assert sorted(packed.state_dict()) == ["lora_a", "lora_b"]
        assert torch.equal(resident.model.get_submodule(name).weight, made.dequantize())


def test_learned_factors_predict_better_than_those_they_start_from_and_whitened_ones_than_svd(tokens: Tensor) -> None:
    passes = [LowRank(steps=60), LowRank(steps=0), LowRank(steps=0, method="svd")]
    results = [compress.apply(make_llama(), [p], calibration=tokens, evaluation=tokens) for p in passes]
    kl = [result.report.rows[-1].kl for result in results]
    assert kl == sorted(kl)


def test_plain_svd_needs_no_data_and_works_outside_the_blocks() -> None:
    pass_ = LowRank(steps=0, method="svd", include=("*",), overrides=(Override("lm_head", {"ratio": 0.8}),))
    result = compress.apply(make_llama(), [pass_])
    assert {w.kind for w in result.weights.values()} == {"low-rank"}
    assert result.weights["lm_head"].low_rank.rank == int(0.8 * 256 * 64 / (256 + 64))


def test_a_convolution_is_factored_like_its_matrix() -> None:
    model = nn.Sequential(nn.Conv2d(6, 12, 3), nn.ReLU(), nn.Conv2d(12, 8, 3), nn.Flatten(), nn.Linear(8 * 9, 4))
    images = torch.randn(16, 6, 7, 7)
    result = compress.apply(model, [LowRank(steps=4)], calibration=images)
    assert result.weights["0"].low_rank.shape == (12, 54)
    made = result.model(images)
    assert torch.nn.functional.mse_loss(made, model(images)) < model(images).var()


def test_a_layer_that_nothing_reaches_gets_the_factors_of_svd_and_the_report_says_so() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = Spare()
    result = compress.apply(model, [LowRank(steps=2)], calibration=torch.randn(32, 16))
    plain = factors(Target(model.spare.weight.detach()), method="svd")
    assert torch.equal(result.weights["spare"].dequantize(), plain.product())
    assert result.report.fallbacks == ["spare: 16 inputs are always zero (low_rank)"]


RESUMED = """\
calibration: {source: calibration.txt, samples: 4, length: 32}
passes:
  - low_rank: {steps: 3, allocate: relative}
"""


def test_killed_after_a_block_the_run_ends_bit_identical(tmp_path: Path) -> None:
    whole, killed = prepare(tmp_path, RESUMED)
    assert run_child(whole, "model") == 0
    assert run_child(killed, "model", kill_after=4) == -signal.SIGKILL
    assert {"s00-survey-b0001.json", "s00-b0000.safetensors"} <= {path.name for path in (killed / "out.work").iterdir()}
    assert run_child(killed, "model") == 0
    assert contents(killed / "out") == contents(whole / "out")


# --- what may come before and after -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "retrain", only([PerpReconstruct()], [Perp(objective="distill"), PerpReconstruct()]), ids=lambda p: p.key
)
@pytest.mark.parametrize("train", [("lora", "norm"), ("bias", "norm"), ("lora",)], ids=str)
def test_norms_biases_and_the_factors_themselves_may_be_trained_afterwards(
    retrain: Perp | PerpReconstruct, train: tuple[str, ...]
) -> None:
    text = (torch.randint(24, (32, 1)) + torch.arange(32)) % 24  # each token says what comes next
    first = LowRank(steps=0, method="svd", ratio=0.3)
    after = replace(retrain, train=train, new_biases="bias" in train, steps=20, learning_rate=2e-3)
    alone, trained = (compress.apply(make_llama(), p, text, evaluation=text) for p in ([first], [first, after]))
    assert trained.report.rows[-1].kl < alone.report.rows[-1].kl
    for name, weight in trained.weights.items():
        if weight.kind == "dense":  # a vector
            continue
        assert weight.kind == "low-rank"
        assert weight.low_rank.rank == alone.weights[name].low_rank.rank
        assert torch.equal(weight.dequantize(), alone.weights[name].dequantize()) == ("lora" not in train)


@pytest.mark.parametrize(
    ("passes", "said"),
    [
        ([Magnitude(), LowRank()], "keep neither zeros nor codes. Put low_rank first"),
        ([Rtn(bits=4), LowRank()], "keep neither zeros nor codes. Put low_rank first"),
        ([LowRank(), LowRank()], "nothing but two thin factors. `exclude` them"),
        ([LowRank(), Gptq(bits=4)], "gptq cannot work on low-rank weights .* nothing but two thin factors"),
        ([LowRank(), Magnitude()], "nothing but two thin factors"),
        ([LowRank(), Eora(rank=2)], "nothing but two thin factors"),
        ([LowRank(), Perp()], "which mask_lora cannot change. Train lora, which can"),
        ([LowRank(ratio=1.0)], "1.0 is not between 0 and 1"),
        ([LowRank(ratio=0.01)], r"ratio 0.01 of a 64 x 64 matrix pays for no rank; rank 1 takes 0\.0312"),
        ([LowRank(steps=-1)], "-1 is negative"),
        ([LowRank(batch_size=0)], "0 is not a positive number"),
        ([LowRank(floor=0.0)], "0.0 is not between 0 and 1"),
        ([LowRank(perturbation=-1.0)], "-1.0 is negative"),
        ([LowRank(overrides=(Override("*", {"steps": 3}),))], "is the same for all layers"),
        ([LowRank(overrides=(Override("*", {"allocate": "energy"}),))], "allocated over all layers of the pass"),
        ([LowRank(allocate="energy", overrides=(Override("*", {"ratio": 0.3}),))], "allocated over all layers"),
    ],
)
def test_impossible_orders_and_options(passes: list[Pass], said: str, tokens: Tensor) -> None:
    with pytest.raises(ConfigError, match=said):
        compress.apply(make_llama(), passes, calibration=tokens)


def test_a_matrix_of_one_row_is_refused() -> None:
    assert LowRank().check_shape((1, 100)) == "factors of a 1 x 100 matrix are no smaller than it is"
