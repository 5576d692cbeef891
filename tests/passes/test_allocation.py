"""Where sparsity goes: budgets are exact, and what makes a layer lose more is what the papers say."""

import pytest
import torch
from conftest import make_llama
from torch import Tensor

import compress
from compress.errors import ConfigError
from compress.passes import Magnitude, Override, Pass, SparseGpt, Wanda
from compress.passes.prune.allocation import MOST, Scores, allocation_facts, fill, shares, whole_columns
from compress.passes.prune.spectra import alpha, farms_alpha, hill

KINDS = ("global", "owl", "alphapruning", "farms")


def gaussian(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def heavy(rows: int, columns: int, tail: float, seed: int = 0) -> Tensor:
    """Singular values that fall as a power: the smaller `tail`, the heavier."""
    side = min(rows, columns)
    left, right = (torch.linalg.qr(gaussian(n, side, seed + i))[0] for i, n in enumerate((rows, columns)))
    return left * torch.arange(1, side + 1).float().pow(-1 / tail) @ right.T


def surveyed(kind: str, weights: dict[str, Tensor]) -> dict[str, dict[str, object]]:
    return {name: allocation_facts(kind, w, w.abs()) for name, w in weights.items()}  # type: ignore[arg-type]


def blocks() -> dict[str, Tensor]:
    return {
        "layers.0.a": heavy(64, 96, 1.0),
        "layers.0.b": heavy(96, 64, 1.2, seed=5),
        "layers.1.a": gaussian(64, 96, seed=1),
        "layers.1.b": gaussian(96, 64, seed=2),
        "layers.2.a": heavy(32, 96, 2.5, seed=3) * 10,
    }


def zeros(decided: dict[str, float], weights: dict[str, Tensor]) -> float:
    return sum(decided[n] * w.numel() for n, w in weights.items()) / sum(w.numel() for w in weights.values())


# --- spectra ----------------------------------------------------------------------------------------------------------


def test_hill_recovers_the_exponent_of_a_power_law() -> None:
    u = torch.rand(20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for exponent in (1.5, 2.5, 4.0):
        values = u.pow(-1 / (exponent - 1)).sort().values
        assert hill(values, 0) == pytest.approx(exponent, rel=0.03)


@pytest.mark.parametrize("estimate", [alpha, farms_alpha])
def test_size_of_the_weights_does_not_count(estimate: object) -> None:
    w = heavy(64, 96, 1.5)
    assert estimate(w * 100) == pytest.approx(estimate(w), rel=1e-6)  # type: ignore[operator]
    assert estimate(w * 1e-3) == pytest.approx(estimate(w), rel=1e-4)  # type: ignore[operator]


def test_turning_a_matrix_changes_nothing() -> None:
    w = heavy(64, 96, 1.5)
    left, right = torch.linalg.qr(gaussian(64, 64, 7))[0], torch.linalg.qr(gaussian(96, 96, 8))[0]
    assert alpha(left @ w @ right) == pytest.approx(alpha(w), rel=1e-2)
    assert alpha(w.T) == pytest.approx(alpha(w), rel=1e-6)


def test_a_heavier_tail_has_a_smaller_exponent() -> None:
    found = [alpha(heavy(128, 128, tail)) for tail in (0.5, 1.0, 2.0, 4.0)]
    assert found == sorted(found)  # type: ignore[type-var]


def test_windows_take_the_shape_out_of_it() -> None:
    """The exponent of plain noise rises with the aspect ratio; that of its windows does not."""
    shapes = [(128, 128), (128, 512), (128, 1024)]
    whole = [hill_mid(gaussian(*s)) for s in shapes]
    windows = [farms_alpha(gaussian(*s)) or 0 for s in shapes]
    assert whole[2] > 2 * whole[0]
    assert max(windows) < 1.15 * min(windows)


def hill_mid(w: Tensor) -> float:
    ascending = torch.linalg.svdvals(w.double()).square().sort().values
    return hill(ascending, len(ascending) // 2) or 0


@pytest.mark.parametrize("w", [torch.zeros(16, 16), torch.eye(16), gaussian(2, 50)])
def test_a_spectrum_that_says_nothing_has_no_exponent(w: Tensor) -> None:
    assert alpha(w) is None


# --- scores -----------------------------------------------------------------------------------------------------------


def test_scores_are_counted_by_size() -> None:
    scores = gaussian(100, 100).abs()
    counted = Scores.of(scores)
    assert counted.total == pytest.approx(float(scores.double().sum()))
    for threshold in (0.1, 0.5, 1.0, 3.0):
        assert counted.above(threshold) == pytest.approx(float((scores > threshold).sum()), rel=0.02, abs=3)
    assert counted.above(0.0) == 10000
    assert counted.above(1e9) == 0


# --- shares -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by", ["block", "site"])
@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_the_budget_is_exact_to_a_column(kind: str, by: str, share: float) -> None:
    weights = blocks()
    decided = shares(kind, surveyed(kind, weights), share, by, None)  # type: ignore[arg-type]
    largest_column = max(len(w) for w in weights.values())
    assert abs(zeros(decided, weights) - share) * sum(w.numel() for w in weights.values()) <= largest_column
    for name, w in weights.items():
        assert (decided[name] * w.shape[1]) % 1 == pytest.approx(0, abs=1e-6)
        assert 0 <= decided[name] <= MOST


@pytest.mark.parametrize("kind", ["owl", "alphapruning", "farms"])
def test_without_spread_it_is_uniform_and_with_more_it_is_less_so(kind: str) -> None:
    weights = blocks()
    found = surveyed(kind, weights)
    width = {}
    for spread in (0.0, 0.1, 0.3):
        decided = shares(kind, found, 0.5, "block", spread)  # type: ignore[arg-type]
        width[spread] = max(decided.values()) - min(decided.values())
    assert width[0.0] <= 1 / 64  # a column
    assert width[0.0] < width[0.1] < width[0.3]


@pytest.mark.parametrize("kind", ["alphapruning", "farms"])
def test_heavy_tails_lose_less(kind: str) -> None:
    weights = {f"layers.{i}.a": heavy(96, 96, tail) for i, tail in enumerate((0.5, 1.0, 2.0, 4.0))}
    decided = list(shares(kind, surveyed(kind, weights), 0.5, "block", 0.2).values())  # type: ignore[arg-type]
    assert decided == sorted(decided)
    assert decided[0] < decided[-1]


@pytest.mark.parametrize("kind", ["alphapruning", "farms"])
def test_blocks_that_hardly_differ_are_given_shares_that_hardly_differ(kind: str) -> None:
    """Stretched to the published range, noise would decide as much as what a large model has learned."""
    alike = {f"layers.{i}.a": gaussian(64, 96, seed=i) for i in range(4)}
    apart = {f"layers.{i}.a": heavy(96, 96, tail) for i, tail in enumerate((0.5, 1.0, 2.0, 4.0))}

    def width(weights: dict[str, Tensor]) -> float:
        decided = shares(kind, surveyed(kind, weights), 0.5, "block", None)  # type: ignore[arg-type]
        return max(decided.values()) - min(decided.values())

    assert width(alike) < 0.05
    assert width(apart) > 0.1


def test_owl_spares_blocks_with_outliers_and_keeps_within_twice_its_spread() -> None:
    weights = {f"layers.{i}.a": gaussian(64, 512, i) for i in range(3)}
    weights["layers.1.a"][:, :20] *= 30
    decided = shares("owl", surveyed("owl", weights), 0.7, "block", 0.08)
    assert decided["layers.1.a"] < min(decided["layers.0.a"], decided["layers.2.a"])
    assert max(decided.values()) - min(decided.values()) <= 0.16 + 1 / 512


def test_global_is_one_threshold_for_all() -> None:
    weights = {"a": gaussian(64, 512), "b": gaussian(64, 512, 1) * 2, "c": gaussian(64, 512, 2) * 0.5}
    decided = shares("global", surveyed("global", weights), 0.5, "site", None)
    threshold = torch.cat([w.abs().flatten() for w in weights.values()]).median()
    for name, w in weights.items():
        assert decided[name] == pytest.approx(float((w.abs() < threshold).float().mean()), abs=0.01)


def test_layers_that_are_all_alike_share_evenly() -> None:
    weights = {f"layers.{i}.a": gaussian(64, 100) for i in range(3)}
    for kind in KINDS:
        decided = shares(kind, surveyed(kind, weights), 0.5, "block", None)  # type: ignore[arg-type]
        assert set(decided.values()) == {0.5}


def test_what_cannot_go_in_one_place_goes_in_the_others() -> None:
    sizes = torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64)
    found = fill(torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64), sizes, 0.7)
    assert float(found @ sizes) / 4 == pytest.approx(0.7)
    assert float(found[2]) == MOST
    assert float(found[1] / found[0]) == pytest.approx(5)
    nothing = torch.tensor([0.0, 1.0], dtype=torch.float64)
    even = fill(nothing, torch.ones(2, dtype=torch.float64), 0.9)
    assert float(even.mean()) == pytest.approx(0.9)
    assert float(even.max()) == MOST


def test_whole_columns_are_as_near_to_the_budget_as_they_can_be() -> None:
    found = whole_columns({"a": 0.5, "b": 0.5}, {"a": (8, 7), "b": (8, 7)}, 0.5)
    assert sorted(found.values()) == [3 / 7, 4 / 7]


# --- in a pipeline ----------------------------------------------------------------------------------------------------


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("allocate", KINDS)
@pytest.mark.parametrize("pruner", [Magnitude, Wanda, SparseGpt])
def test_every_pruner_takes_every_allocation(pruner: type[Magnitude], allocate: str, tokens: Tensor) -> None:
    spread = None if allocate in ("owl", "global") else 0.2
    made = pruner(sparsity=0.6, allocate=allocate, spread=spread)  # type: ignore[arg-type]
    result = compress.apply(make_llama(), [made], calibration=tokens, evaluation=tokens)
    assert result.report.rows[-1].sparsity == pytest.approx(0.6, abs=0.01)
    by_layer = {n: round(1 - float(w.mask.float().mean()), 3) for n, w in result.weights.items() if w.mask is not None}
    by_block = {n.split(".")[2]: share for n, share in by_layer.items()}
    assert len(by_layer) == 14
    if spread:  # random weights are all alike
        assert len(set(by_block.values())) > 1


def test_allocation_by_weights_alone_needs_no_data() -> None:
    for kind in ("global", "alphapruning", "farms"):
        result = compress.apply(make_llama(), [Magnitude(sparsity=0.5, allocate=kind)])  # type: ignore[arg-type]
        assert result.report.rows[-1].sparsity == pytest.approx(0.5, abs=0.01)
    assert Magnitude(allocate="owl").calibrated
    assert not Magnitude(allocate="farms").calibrated


def test_other_options_of_a_layer_stay(tokens: Tensor) -> None:
    pass_ = SparseGpt(sparsity=0.5, allocate="farms", overrides=(Override("*.up_proj", {"tile": 32}),))
    result = compress.apply(make_llama(), [pass_], calibration=tokens)
    assert len(result.weights) == 14
    found = {"model.layers.0.mlp.up_proj": {"shape": [4, 8], "alpha": 2.0}}
    assert pass_.allocated(found).at("model.layers.0.mlp.up_proj").tile == 32


@pytest.mark.parametrize(
    ("pass_", "said"),
    [
        (Wanda(sparsity="2:4", allocate="owl"), "cannot be combined with 2:4"),
        (Wanda(spread=0.1), "changes nothing with allocate: uniform"),
        (Wanda(allocate="global", spread=0.1), "changes nothing with allocate: global"),
        (Wanda(allocate="owl", spread=1.5), "not from 0 to below 1"),
        (Wanda(allocate="owl", overrides=(Override("*", {"sparsity": 0.1}),)), "allocated over all layers"),
        (Wanda(overrides=(Override("*", {"allocate": "owl"}),)), "allocated over all layers"),
    ],
)
def test_impossible_allocations(pass_: Pass, said: str, tokens: Tensor) -> None:
    with pytest.raises(ConfigError, match=said):
        compress.apply(make_llama(), [pass_], calibration=tokens)
