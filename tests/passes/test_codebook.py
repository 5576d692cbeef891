"""Codebooks: k-means on a line, groups of rows, and what the pass makes of them."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from selection import only
from sklearn.cluster import KMeans
from textbook import inputs, mask, statistics, target, weight
from torch import Tensor

import compress
from compress.config.options import errors_in
from compress.encodings import Codebooks, Encoding, Weight, pack, spec_of
from compress.errors import SolveError
from compress.passes import Codebook, Override, Rtn
from compress.passes.base import Target
from compress.passes.quantize.grouping import group, quantiles, table_losses
from compress.passes.quantize.kmeans import kmeans, points
from compress.passes.quantize.tables import fit_scales, root_mean_square, solve

ONES = torch.ones(1, 1)


def uneven(rows: int = 64, columns: int = 96, seed: int = 0, spread: float = 0.5) -> Tensor:
    """Gaussian rows of log-normal scale."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=g) * torch.exp(spread * torch.randn(rows, 1, generator=g))


def lost(w: Tensor, e: Encoding, importance: Tensor = ONES) -> float:
    return float(((e.dequantize() - w).double().square() * importance).sum() / (w.double().square() * importance).sum())


def squared_error(places: Tensor, masses: Tensor, centres: Tensor) -> float:
    return float((masses * (places[:, None] - centres).square().amin(1)).sum())


def line(count: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    places = torch.randn(count, generator=g, dtype=torch.float64).sort().values
    return places, torch.rand(count, generator=g, dtype=torch.float64) + 0.1


def data_free(w: Tensor, **options: object) -> Codebooks:
    found = Codebook(weighting="none", **options).run(target(w)).encoding
    assert isinstance(found, Codebooks)
    return found


# --- k-means on a line ------------------------------------------------------------------------------------------------


def optimum(places: Tensor, masses: Tensor, count: int) -> float:
    """The least squared error of `count` clusters, by dynamic programming over where the last cluster begins."""
    zero = torch.zeros(1, dtype=torch.float64)
    m, s, q = (torch.cat([zero, t.cumsum(0)]) for t in (masses, masses * places, masses * places**2))
    begin, end = torch.meshgrid(torch.arange(len(places) + 1), torch.arange(len(places) + 1), indexing="ij")
    inside = (m[end] - m[begin]).clamp(min=1e-12)
    cost = torch.where(begin < end, q[end] - q[begin] - (s[end] - s[begin]) ** 2 / inside, torch.inf)
    best = cost[0].clone()
    for _ in range(count - 1):
        best = (best[:, None] + cost).amin(0)
    return float(best[-1])


@pytest.mark.parametrize("count", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("seed", range(3))
def test_kmeans_comes_near_the_optimum(count: int, seed: int) -> None:
    places, masses = line(seed=seed)
    found = squared_error(places, masses, kmeans(places, masses, count, iterations=200, tolerance=0.0))
    best = optimum(places, masses, count)
    assert best * (1 - 1e-9) <= found <= best * 1.1


@pytest.mark.parametrize("count", [2, 5, 16])
def test_every_centre_is_the_weighted_mean_of_what_is_nearest_to_it(count: int) -> None:
    places, masses = line()
    centres = kmeans(places, masses, count, iterations=1000, tolerance=0.0)
    owner = (places[:, None] - centres).abs().argmin(1)
    for k in range(count):
        own = owner == k
        assert float(centres[k]) == pytest.approx(float((masses * places)[own].sum() / masses[own].sum()), abs=1e-9)


@pytest.mark.parametrize("count", [2, 5, 16])
def test_no_iteration_makes_the_error_larger(count: int) -> None:
    places, masses = line()
    start = torch.linspace(2, 3, count, dtype=torch.float64)
    errors = [
        squared_error(places, masses, kmeans(places, masses, count, start=start, iterations=n, tolerance=0.0))
        for n in range(1, 30)
    ]
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(errors))


def test_clusters_that_are_empty_begin_again_where_most_is_lost() -> None:
    places = torch.tensor([-5.0, -4.9, 0.0, 0.1, 5.0, 5.1], dtype=torch.float64)
    far = torch.tensor([100.0, 101.0, 102.0], dtype=torch.float64)
    centres = kmeans(places, torch.ones_like(places), 3, start=far, tolerance=0.0)
    assert centres.tolist() == pytest.approx([-4.95, 0.05, 5.05])


@pytest.mark.parametrize("number", [0, 1, 2, 7, 8])
def test_no_more_places_than_centres_are_met_exactly(number: int) -> None:
    places = torch.arange(number, dtype=torch.float64) ** 2 - 3
    centres = kmeans(places, torch.ones_like(places), 8)
    assert centres.shape == (8,)
    assert bool((centres.diff() >= 0).all())
    assert set(places.tolist()) <= set(centres.tolist())


def test_a_mass_of_two_is_two_points() -> None:
    places, _ = line(100)
    masses = torch.ones_like(places)
    masses[::3] = 2
    twice = torch.cat([places, places[::3]]).sort().values
    start = torch.linspace(-2, 2, 6, dtype=torch.float64)
    a = kmeans(places, masses, 6, start=start, iterations=200, tolerance=0.0)
    b = kmeans(twice, torch.ones_like(twice), 6, start=start, iterations=200, tolerance=0.0)
    assert torch.allclose(a, b)


@pytest.mark.parametrize("rows", [100, 700])
def test_points_keep_the_sums(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    w, h = weight(50, 48).repeat(30, 1) * 3, torch.rand(1, 48, generator=torch.Generator().manual_seed(0))
    places, masses = points(w, h)
    assert bool((places.diff() > 0).all())
    assert float(masses.sum()) == pytest.approx(float(h.double().sum()) * 1500)
    assert float((places * masses).sum()) == pytest.approx(float((w * h).double().sum()), rel=1e-6)
    monkeypatch.setattr("compress.passes.quantize.kmeans.CHUNK", rows * 48)
    again = points(w, h)
    assert torch.allclose(again[0], places)
    assert torch.allclose(again[1], masses)


def test_every_float16_number_is_a_point_of_its_own() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    every = every[torch.isfinite(every)]
    large = every[(every.abs() >= 2.0**-13) | (every == 0)]  # the largest is 2**16: smaller ones are beneath its notice
    for times in (1, 2):  # each value once, and too many to look at each
        places, masses = points(large.repeat(times, 1), ONES)
        assert torch.equal(places.float(), torch.unique(large))
        assert float(masses[places == 0]) == 2 * times  # and both zeros are one


def test_points_of_no_importance_are_left_out() -> None:
    w, kept = weight(8, 48), mask(8, 48)
    places, masses = points(w, kept.float())
    alone = points(w[kept][None], ONES)
    assert torch.equal(places, alone[0])
    assert torch.equal(masses, alone[1])
    assert points(w, torch.zeros(1, 1))[0].shape == (0,)


# --- which rows share a table -----------------------------------------------------------------------------------------


def test_quantiles_do_not_see_the_order_of_a_row() -> None:
    w, kept = weight(9, 50), mask(9, 50)
    order = torch.randperm(50)
    assert torch.equal(quantiles(w), quantiles(w[:, order]))
    assert torch.equal(quantiles(w, kept), quantiles(w[:, order], kept[:, order]))


def test_quantiles_are_those_of_the_kept_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    w, kept = weight(9, 50), mask(9, 50)
    kept[3] = False
    found = quantiles(w, kept)
    for row in range(9):
        own = w[row][kept[row]].sort().values
        wanted = [float(own[int((m + 0.5) / 16 * len(own))]) if len(own) else 0.0 for m in range(16)]
        assert found[row].tolist() == wanted
    monkeypatch.setattr("compress.passes.quantize.grouping.CHUNK", 2 * 50)
    assert torch.equal(quantiles(w, kept), found)


def test_rows_of_like_distribution_share_a_group_whatever_the_size_of_the_weights() -> None:
    kinds = torch.tensor([0, 1, 2, 1, 0, 2, 2, 1, 0])
    w = weight(9, 400) * torch.tensor([1.0, 4.0, 1.0])[kinds][:, None]
    w = torch.where((kinds == 2)[:, None], w + 6, w)
    for size in (1e-30, 1.0, 1e6):
        found = group(quantiles(w * size), 3)
        assert found.dtype == torch.uint8
        assert [int(g) for g in found] == [int(found[[0, 1, 2][k]]) for k in kinds]
        assert sorted(set(found.tolist())) == [0, 1, 2]


@pytest.mark.parametrize("different", [1, 2, 3])
def test_there_are_no_more_groups_than_different_rows(different: int) -> None:
    features = weight(different, 16)[torch.arange(12) % different]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = group(features, 5)
    assert sorted(set(found.tolist())) == list(range(different))


def test_rows_that_differ_by_nothing_that_counts_still_get_groups() -> None:
    features = torch.ones(12, 16) + torch.rand(12, 16) * 1e-7
    found = group(features, 6)
    assert sorted(set(found.tolist())) == list(range(int(found.max()) + 1))


@pytest.mark.parametrize("entries", [2, 5, 16])
@pytest.mark.parametrize("masked", [False, True])
def test_the_best_table_of_a_row_is_the_one_that_loses_least(
    entries: int, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = uneven(20, 48)
    table = torch.randn(6, entries, generator=torch.Generator().manual_seed(1)).sort(1).values
    h = torch.rand(1, 48, generator=torch.Generator().manual_seed(2))
    importance = h * mask(20, 48) if masked else h
    errors = ((w[:, None, :, None] - table[:, None, :]).square().amin(3) * importance[:, None]).sum(2)
    found = table_losses(w, importance, table).argmin(1)
    assert torch.equal(found, errors.argmin(1))
    monkeypatch.setattr("compress.passes.quantize.grouping.CHUNK", 1)
    assert torch.equal(table_losses(w, importance, table).argmin(1), found)


# --- the algorithm ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "wanted"), [(4, (0.186, 0.155, 0.139, 0.128)), (8, (0.0596, 0.0498, 0.0435, 0.0355))]
)
def test_errors_are_those_of_the_reference(entries: int, wanted: Sequence[float]) -> None:
    """Of another implementation on one draw of the same distribution; here the mean of eight draws."""
    found = torch.zeros(4)
    for seed in range(8):
        w = uneven(seed=seed)
        for i, tables in enumerate((1, 2, 4, 8)):
            found[i] += lost(w, solve(w, ONES, group(quantiles(w), tables), entries, regroup=False)) / 8
    assert all(0.75 * b < a < 1.02 * b for a, b in zip(found.tolist(), wanted, strict=True))


@pytest.mark.parametrize("entries", [2, 4, 8, 16])
def test_one_table_is_plain_kmeans(entries: int) -> None:
    w = uneven(16, 48)
    theirs = KMeans(entries, n_init=10, random_state=0).fit(w.reshape(-1, 1).double().numpy()).inertia_
    ours = lost(w, data_free(w, entries=entries, tables=1)) * float(w.double().square().sum())
    assert ours < 1.05 * theirs


@pytest.mark.parametrize("scale", only(["row"], ["none", "row"]))
def test_more_entries_never_lose_more(scale: str) -> None:
    w = uneven()
    errors = [
        lost(w, data_free(w, entries=k, tables=3, scale=scale)) for k in (2, 3, 4, 5, 8, 16, 17, 32, 64, 128, 256)
    ]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("entries", [2, 4, 16])
def test_splitting_groups_never_loses_more(entries: int) -> None:
    w = uneven(32)
    spread = torch.argsort(torch.argsort(w.std(1)))
    errors = [
        lost(w, solve(w, ONES, (spread // (32 // g)).to(torch.uint8), entries, regroup=False))
        for g in (1, 2, 4, 8, 16, 32)
    ]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("entries", [4, 16])
@pytest.mark.parametrize("scaled", [False, True])
def test_rows_that_may_change_their_table_lose_less(entries: int, scaled: bool) -> None:
    w = uneven()
    first = group(quantiles(w), 6)
    scale = root_mean_square(w, None) if scaled else None
    errors = [lost(w, solve(w, ONES, first, entries, scale=scale, regroup=regroup)) for regroup in (True, False)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("scale", ["none", "row"])
@pytest.mark.parametrize("tables", [1, 4])
def test_no_round_makes_the_error_larger(scale: str, tables: int) -> None:
    w = uneven(32)
    errors = [
        lost(w, data_free(w, entries=8, tables=tables, scale=scale, iterations=n, tolerance=0.0)) for n in range(1, 8)
    ]
    # but for the rounding of tables and scales to float16
    assert all(after <= before * (1 + 1e-3) for before, after in pairwise(errors))
    assert (scale == "none" and tables == 1) or errors[-1] < 0.99 * errors[0]


def test_scales_are_the_best_for_the_entries_they_multiply() -> None:
    w, h = uneven(8, 48), torch.rand(1, 48)
    entry = data_free(w, entries=4, scale="row", tables=1).dequantize() / root_mean_square(w, None)
    scale = fit_scales(w, h, entry)

    def error(s: Tensor) -> Tensor:
        return (h * (w - s * entry).square()).sum(1)

    assert bool((error(scale) <= error(scale * 1.01)).all())
    assert bool((error(scale) <= error(scale * 0.99)).all())
    assert bool((fit_scales(w, h, -entry) == 0).all())  # a scale is never negative


def test_a_scale_for_each_group_of_columns_is_the_best_one_and_loses_less_than_one_a_row() -> None:
    w = uneven(12, 64) * torch.logspace(-1, 1, 4).repeat_interleave(16)
    e, of_rows = (data_free(w, bits=3, tables=1, **o) for o in ({"scale": "group", "group_size": 16}, {"scale": "row"}))
    assert e.defect() is None
    assert e.scale is not None
    assert e.scale.shape == (12, 4)
    assert lost(w, e) < 0.6 * lost(w, of_rows)
    entry = replace(e, scale=None).dequantize().view(12, 4, 16)
    best = (entry * w.view(12, 4, 16)).sum(2) / entry.square().sum(2)
    assert torch.allclose(e.scale.float(), best, rtol=0.1)


def test_one_group_for_a_whole_row_is_a_scale_a_row() -> None:
    a, b = (data_free(uneven(), bits=3, **o) for o in ({"scale": "group", "group_size": 96}, {"scale": "row"}))
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.dequantize(), b.dequantize())


def test_groups_that_do_not_divide_the_columns_are_refused() -> None:
    assert "group_size 64 divides; it has 96" in str(Codebook(scale="group").check_shape((8, 96)))
    assert Codebook(scale="group", group_size=32).check_shape((8, 96)) is None


def test_scales_free_a_table_from_the_size_of_rows() -> None:
    w = uneven(spread=2.0)
    scaled, plain = (lost(w, data_free(w, entries=8, tables=1, scale=s)) for s in ("row", "none"))
    assert scaled < 0.6 * plain
    powers = 2.0 ** torch.arange(-3, 5).repeat(8)[:, None]
    one, other = data_free(w, scale="row", tables=1), data_free(w * powers, scale="row", tables=1)
    assert lost(w * powers, other) == pytest.approx(lost(w, one), rel=0.3)


@pytest.mark.parametrize("scale", ["none", "row"])
@pytest.mark.parametrize("tables", [1, 3])
def test_as_many_entries_as_different_values_lose_nothing(scale: str, tables: int) -> None:
    values = torch.tensor([-3.5, -0.125, 0.0, 0.25, 0.3125, 2.0, 1000.0])
    w = values[torch.randint(7, (12, 40), generator=torch.Generator().manual_seed(0))]
    for entries in (7, 8, 256):
        e = data_free(w, entries=entries, tables=tables, scale=scale)
        assert scale == "row" or torch.equal(e.dequantize(), w)
        assert scale == "none" or tables > 1 or lost(w, e) < 1e-2


@pytest.mark.parametrize("scale", ["none", "row"])
def test_codes_are_of_the_nearest_entry_that_is_stored(scale: str) -> None:
    w = uneven(12, 40)
    e = data_free(w, entries=9, tables=3, scale=scale)
    assert e.table.dtype == torch.float16
    values = e.table.float()[e.row_group.long()][:, None, :]
    values = values if e.scale is None else values * e.scale.float()[..., None]
    nearest = (values - w[..., None]).abs().amin(2)
    assert torch.allclose((e.dequantize() - w).abs(), nearest, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [1e-12, 1e-6, 1e6, 1e12])
@pytest.mark.parametrize("scale", ["none", "row"])
def test_weights_outside_the_range_of_float16_lose_no_more(size: float, scale: str) -> None:
    w = uneven(16, 48)
    e = data_free(w * size, bits=4, tables=2, scale=scale)
    assert e.defect() is None
    assert (e.table.dtype if scale == "none" else e.scale.dtype) == torch.float32
    assert lost(w * size, e) == pytest.approx(lost(w, data_free(w, bits=4, tables=2, scale=scale)), rel=0.05)


@pytest.mark.parametrize("scale", ["none", "row"])
def test_rows_and_matrices_of_zeros_stay_zero(scale: str) -> None:
    e = data_free(torch.zeros(6, 40), scale=scale)
    assert e.defect() is None
    assert torch.equal(e.dequantize(), torch.zeros(6, 40))
    w = uneven(6, 40)
    w[2] = 0
    e = data_free(w, scale=scale, tables=2)
    assert e.defect() is None
    assert bool(torch.isfinite(e.dequantize()).all())
    assert scale == "none" or bool((e.dequantize()[2] == 0).all())


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"scale": "row", "tables": 2}, {"entries": 5, "tables": 3}], ids=str)
@pytest.mark.parametrize("weighting", ["none", "hessian"])
def test_masked_weights_stay_zero_and_change_nothing(options: dict[str, object], weighting: str) -> None:
    w, kept, x = uneven(12, 48), mask(12, 48), inputs(48)
    kept[5] = False
    pass_ = Codebook(weighting=weighting, **options)
    edits = [pass_.run(Target(v, kept, statistics(x, "norm"))) for v in (w * kept, torch.where(kept, w, 77.0))]
    a, b = (edit.encoding for edit in edits)
    assert isinstance(a, Codebooks)
    assert isinstance(b, Codebooks)
    if "scale" not in options:  # there the mask is what zeroes them before their row's scale is measured
        assert torch.equal(a.codes, b.codes)
        assert torch.equal(a.table, b.table)
    assert torch.equal(a.codes[~kept], a.idle().expand(a.codes.shape)[~kept])
    dense = Weight(mask=edits[0].mask, encoding=a).dequantize()
    assert bool((dense[~kept] == 0).all())
    assert bool(torch.isfinite(dense).all())


def test_tables_of_a_sparse_matrix_serve_only_what_is_kept() -> None:
    w = uneven()
    kept = w.abs() > w.abs().median(1, keepdim=True).values
    e = Codebook(weighting="none", bits=2, tables=1).run(Target(w * kept, kept)).encoding
    assert isinstance(e, Codebooks)
    alone = data_free((w[kept])[None], bits=2, tables=1)
    assert torch.allclose(e.table.float(), alone.table.float(), rtol=2e-3)


# --- the weighting ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["none", "row"])
def test_weighting_lowers_the_error_it_weighs(scale: str) -> None:
    w, x = uneven(), inputs(96)
    x[:, :8] *= 20
    given = Target(w, None, statistics(x, "norm"))
    weighed = given.statistics.square_sum
    plain, hessian = (Codebook(bits=2, scale=scale, weighting=how).run(given).encoding for how in ("none", "hessian"))
    assert lost(w, hessian, weighed) < 0.9 * lost(w, plain, weighed)
    assert lost(w, plain) < lost(w, hessian)


def test_the_weighting_is_what_needs_data() -> None:
    assert Codebook().needs == "norm"
    assert Codebook(weighting="none").needs == "none"
    assert Codebook(weighting="none", overrides=(Override("*.a", {"weighting": "hessian"}),)).needs == "norm"
    assert Codebook(overrides=(Override("*.a", {"weighting": "none"}),)).needs == "norm"


@pytest.mark.parametrize("x", [None, torch.zeros(4, 48)], ids=["none", "zeros"])
def test_without_inputs_it_falls_back_to_no_weighting(x: Tensor | None) -> None:
    w = uneven(8, 48)
    pass_ = Codebook(bits=3)
    given = Target(w, None, None if x is None else statistics(x, "norm"))
    with pytest.raises(SolveError, match="no input"):
        pass_.run(given)
    assert pass_.stand_in() == Codebook(bits=3, weighting="none")
    assert torch.equal(pass_.stand_in().run(given).encoding.codes, data_free(w, bits=3).codes)


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("scale", ["none", "row"])
@pytest.mark.parametrize("shape", [(64, 96), (256, 768), (4096, 4096)], ids=str)
def test_by_default_tables_take_the_room_of_a_scale_and_zero_point_a_row(
    bits: int, scale: str, shape: tuple[int, int]
) -> None:
    def stored(**options: object) -> float:
        form = Codebook(bits=bits, scale=scale, **options).form(shape)
        numbers = shape[0] * (form.num_tables - 1).bit_length()
        return 16 * form.num_tables * form.entries + numbers + 16 * shape[0] * form.scaled

    room = shape[0] * (16 + bits)
    chosen = Codebook(bits=bits, scale=scale).form(shape).num_tables
    assert 1 <= chosen <= min(256, shape[0])
    assert stored() <= room or chosen == 1
    if chosen < min(256, shape[0]):
        assert stored(tables=chosen + 1) > room


@pytest.mark.parametrize(
    "options",
    [{}, {"bits": 2, "scale": "row"}, {"entries": 5, "tables": 4}, {"scale": "group", "group_size": 24}],
    ids=str,
)
def test_the_plan_knows_the_size(options: dict[str, object]) -> None:
    w = uneven()
    pass_ = Codebook(weighting="none", **options)
    spec, tensors = pack(Weight(encoding=data_free(w, **options)))
    assert spec.form == pass_.form((64, 96))
    assert spec == spec_of(Weight(encoding=data_free(w, **options)))
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == spec.num_bytes


def test_entries_overrule_bits() -> None:
    form = Codebook(bits=8, entries=5).form((64, 96))
    assert (form.bits, form.entries) == (3, 5)
    assert data_free(uneven(), entries=5).form.bits == 3


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"bits": 1}, "bits"),
        ({"bits": 9}, "bits"),
        ({"entries": 1}, "entries"),
        ({"entries": 257}, "entries"),
        ({"tables": 0}, "tables"),
        ({"tables": 257}, "tables"),
        ({"iterations": 0}, "iterations"),
        ({"tolerance": -0.1}, "tolerance"),
    ],
)
def test_impossible_options_are_named(options: dict[str, object], option: str) -> None:
    assert [e.option for e in errors_in(Codebook(**options))] == [option]


def test_more_tables_than_rows_are_refused() -> None:
    assert Codebook(tables=8).check_shape((8, 64)) is None
    assert "9 tables are more than its 8 rows" in (Codebook(tables=9).check_shape((8, 64)) or "")


# --- the claim --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", only([3], [4, 3, 2]))
def test_on_the_demo_model_tables_lose_less_than_a_grid_a_row_in_no_more_bits(bits: int) -> None:
    model, _ = compress.demo.load()
    for name, parameter in model.named_parameters():
        if "layers.3.self_attn" in name:
            w = parameter.detach()
            ours = data_free(w, bits=bits)
            for search in ("minmax", "mse"):
                grid = Rtn(bits=bits, scale_search=search).run(target(w)).encoding
                assert pack(Weight(encoding=ours))[0].num_bytes <= pack(Weight(encoding=grid))[0].num_bytes
                assert lost(w, ours) < 0.95 * lost(w, grid), name
