"""What every pass promises, checked for everything in `PASSES`: a new pass is tested the moment it is listed."""

import dataclasses
import re
from collections.abc import Iterator
from functools import cache

import pytest
import textbook
import torch
from configured import CONFIGURED, FIRST, NEEDED, SHAPES, models
from selection import only
from torch import Tensor

import compress
from compress.calibration.statistics import Statistics
from compress.config.options import errors_in
from compress.config.pipeline import Pipeline
from compress.config.reading import parse
from compress.config.writing import dump
from compress.encodings import Weight
from compress.engine.validate import observed
from compress.models.site import Site, TensorRef
from compress.passes import (
    PASSES,
    BlockPass,
    DepthPass,
    ExpertsPass,
    KvCache,
    LinearPass,
    MergePass,
    ModelPass,
    Override,
    Pass,
    RecalibrateNorms,
    Rotate,
    ScalingPass,
    WidthPass,
)
from compress.passes.base import Edit, Target

OTHERS = DepthPass | ExpertsPass | KvCache | MergePass | RecalibrateNorms | Rotate | ScalingPass | WidthPass
EDITORS = [p for p in CONFIGURED if not isinstance(p, OTHERS)]
SOLVERS = [p for p in CONFIGURED if isinstance(p, LinearPass | BlockPass)]
LINEAR = [p for p in CONFIGURED if isinstance(p, LinearPass)]
MERGES = [p for p in CONFIGURED if isinstance(p, MergePass)]
DEPTH = [p for p in CONFIGURED if isinstance(p, DepthPass)]
EXPERTS = [p for p in CONFIGURED if isinstance(p, ExpertsPass)]
WIDTHS = [p for p in CONFIGURED if isinstance(p, WidthPass)]
SCALING = [p for p in CONFIGURED if isinstance(p, ScalingPass)]


def named(pass_: Pass) -> str:
    return f"{pass_.key}-{pass_.options()}"


each_editor = pytest.mark.parametrize("pass_", only(FIRST, EDITORS), ids=named)
each_merge = pytest.mark.parametrize("pass_", only(FIRST, MERGES), ids=named)
SHARES = (None, 0.1, 0.5, 0.9)  # of zeros in what a pass is given; None: dense


def works_on(pass_: Pass, masked: float | None) -> bool:
    return ("dense" if masked is None else "sparse") in pass_.accepts


def targets(pass_: Pass, masked: float | None = None) -> dict[str, Target]:
    """One target a name, with the statistics the pass needs and, if asked, a mask with this share of zeros."""
    found = {}
    for seed, (name, (rows, columns)) in enumerate(SHAPES.items()):
        w = textbook.weight(rows, columns, seed)
        kept = None if masked is None else textbook.mask(rows, columns, seed, masked)
        x = textbook.inputs(columns, tokens=64, seed=seed)
        statistics = textbook.seen_by(pass_, x)
        generator = torch.Generator().manual_seed(seed)
        original = w if pass_.compares else None
        found[name] = Target(w if kept is None else w * kept, kept, statistics, generator, original=original)
    return found


def edits(pass_: Pass, given: dict[str, Target]) -> dict[str, Edit]:
    if isinstance(pass_, ModelPass):
        return dict(pass_.run(textbook.whole(given)))
    if isinstance(pass_, BlockPass):
        return dict(pass_.run(textbook.block(given)))
    assert isinstance(pass_, LinearPass)
    return {name: pass_.run(target) for name, target in given.items()}


@cache
def once(pass_: Pass, masked: float | None) -> tuple[dict[str, Target], dict[str, Edit]]:
    """What a pass was given and what it made of that, for every test that only looks at it."""
    given = targets(pass_, masked)
    return given, edits(pass_, given)


def tensors(thing: object) -> Iterator[Tensor]:
    """Every tensor inside a target or an edit."""
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, Statistics):  # which makes its Gram matrix when it is first asked for
        yield from (t for t in (thing.gram, thing.square_sum, thing.mean) if t is not None)
    elif dataclasses.is_dataclass(thing):
        for f in dataclasses.fields(thing):
            yield from tensors(getattr(thing, f.name))
    elif hasattr(thing, "__dict__") and not isinstance(thing, torch.Generator):
        for value in vars(thing).values():
            yield from tensors(value)


def assert_same(a: dict[str, Edit], b: dict[str, Edit]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert dict(a[name].notes) == dict(b[name].notes)
        pairs = list(zip(tensors(a[name]), tensors(b[name]), strict=True))
        assert pairs
        for x, y in pairs:
            assert x.dtype == y.dtype
            assert torch.equal(x, y)


def test_a_pass_is_a_frozen_dataclass() -> None:
    for cls in PASSES:
        assert dataclasses.is_dataclass(cls), cls
        with pytest.raises(dataclasses.FrozenInstanceError):
            cls().include = ("*",)  # type: ignore[misc]


def test_a_pass_has_no_state_but_its_options() -> None:
    for cls in PASSES:
        assert set(vars(cls())) == {f.name for f in dataclasses.fields(cls)}, cls
        assert cls() == cls()
        assert hash(cls()) == hash(cls()), cls


def test_a_pass_states_its_source_with_a_year() -> None:
    for cls in PASSES:
        doc = cls.__doc__ or ""
        assert "Source:" in doc, cls
        source = doc.split("Source:")[1].split("\n\n")[0]
        assert re.search(r"\b(19|20)\d\d\b", source), (cls, source)


def test_a_pass_shows_an_example() -> None:
    for cls in PASSES:
        assert ">>> " in (cls.__doc__ or ""), cls


def test_a_pass_is_public_under_its_key() -> None:
    for cls in PASSES:
        assert getattr(compress, cls.__name__) is cls, cls
        assert cls.__name__.lower() == cls.key.replace("_", ""), cls
        assert cls.__module__.endswith(f".{cls.key}"), cls


def test_no_two_passes_share_a_key() -> None:
    keys = [cls.key for cls in PASSES]
    assert len(set(keys)) == len(keys)


def test_every_option_has_a_default_and_is_documented() -> None:
    for cls in PASSES:
        described = " ".join(base.__doc__ or "" for base in cls.__mro__)
        for f in dataclasses.fields(cls):
            assert f.default is not dataclasses.MISSING, (cls, f.name)
            assert re.search(rf"^ +{f.name}: ", described, re.MULTILINE), f"{f.name} of {cls.key} is not described"


def test_unknown_options_are_refused() -> None:
    for cls in PASSES:
        with pytest.raises(TypeError):
            cls(nonsense=1)  # type: ignore[call-arg]


def test_possible_options_pass_the_check() -> None:
    for pass_ in CONFIGURED:
        assert errors_in(pass_) == [], pass_


def test_options_survive_the_yaml_file() -> None:
    for pass_ in CONFIGURED:
        pipeline = Pipeline(passes=((pass_,),))
        text = dump(pipeline)
        assert parse(text).passes == pipeline.passes, pass_
        assert dump(parse(text)) == text, pass_


def test_patterns_and_overrides_survive_the_yaml_file() -> None:
    for pass_ in CONFIGURED:
        if isinstance(
            pass_, ModelPass | DepthPass | ExpertsPass | KvCache | RecalibrateNorms | Rotate | ScalingPass | WidthPass
        ):  # one decision over all layers: nothing to override for some
            assert [e.option for e in dataclasses.replace(pass_, overrides=(Override("*", {}),)).check()] == [
                "overrides"
            ], pass_
            continue
        common = {
            o
            for o in pass_.options()
            if o in ("steps", "inputs", "objective", "granularity", "allocate") and isinstance(pass_, BlockPass)
        }
        if isinstance(pass_, MergePass):
            common = {*pass_.common, "density"}  # with scope: model, of whole models
        options = {name: value for name, value in pass_.options().items() if name not in common}
        overrides = (Override("*.c", options),)
        plain = type(pass_)(**NEEDED.get(pass_.key, {}))
        full = dataclasses.replace(plain, include=("*.mlp.*", "a"), exclude=("*.b",), overrides=overrides)
        back = parse(dump(Pipeline(passes=((full,),)))).passes[0][0]
        assert back == full, pass_
        assert back.at("x.c") == dataclasses.replace(plain, **options), pass_
        assert back.at("x.d") == plain, pass_


@each_editor
def test_the_same_input_gives_the_same_result_and_is_left_as_it_was(pass_: Pass) -> None:
    for masked in (None, 0.5):
        if works_on(pass_, masked):
            given = targets(pass_, masked)
            before = [t.clone() for target in given.values() for t in tensors(target)]
            torch.manual_seed(12345)  # the global generator must not matter
            assert_same(once(pass_, masked)[1], edits(pass_, given))
            after = [t for target in given.values() for t in tensors(target)]
            assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("pass_", only(FIRST, LINEAR), ids=named)
def test_the_result_of_a_site_does_not_depend_on_other_sites(pass_: LinearPass) -> None:
    masked = None if "dense" in pass_.accepts else 0.5
    together = once(pass_, masked)[1]
    backwards = edits(pass_, dict(reversed(targets(pass_, masked).items())))
    assert_same(together, {name: backwards[name] for name in together})
    for name in SHAPES:
        assert_same({name: together[name]}, edits(pass_, {name: targets(pass_, masked)[name]}))


@pytest.mark.parametrize("pass_", DEPTH, ids=named)
def test_as_many_blocks_go_as_a_pass_says_and_every_time_the_same_ones(pass_: DepthPass) -> None:
    first, left = textbook.dropped(pass_)
    assert len(first) == pass_.blocks == len(set(first))
    assert left == 6 - pass_.blocks
    if pass_.neighbours:
        assert first == list(range(first[0], first[0] + pass_.blocks))
    torch.manual_seed(12345)
    assert textbook.dropped(pass_) == (first, left)


@pytest.mark.parametrize("pass_", EXPERTS, ids=named)
def test_as_many_experts_of_every_group_stay_as_a_pass_says_and_every_time_the_same_ones(pass_: ExpertsPass) -> None:
    for groups in (1, 3):
        seen = textbook.experts_seen(pass_, groups)
        before = [t.clone() for t in tensors(seen)]
        left = pass_.run(seen)
        kept = left.numbers
        assert len(kept) == seen.keep
        assert list(kept) == sorted(set(kept))
        size = len(seen.tokens) // groups
        assert {sum(i // size == group for i in kept) for group in range(groups)} == {seen.keep // groups}
        assert set(range(len(seen.tokens))) - set(kept) <= seen.may
        torch.manual_seed(12345)
        assert pass_.run(seen) == left
        assert all(torch.equal(x, y) for x, y in zip(before, tensors(seen), strict=True))
        assert pass_.scores(seen).shape == seen.tokens.shape
        for number, shares in left.made_of.items():
            assert number in kept
            assert shares.keys() <= seen.may
            assert {i // size for i in shares} == {number // size}
            assert sum(shares.values()) == pytest.approx(1)
            assert shares[number] == max(shares.values())
        merged = [i for shares in left.made_of.values() for i in shares]
        assert len(merged) == len(set(merged))
        if pass_.merges:
            assert set(merged) | set(kept) == set(range(len(seen.tokens)))
        else:
            assert not merged


@pytest.mark.parametrize("pass_", WIDTHS, ids=named)
def test_as_many_units_stay_as_a_pass_is_told_and_every_time_the_same_ones(pass_: WidthPass) -> None:
    for width in (1, 4):
        for biased in (False, True):
            seen = textbook.units_seen(pass_, width, biased)
            before = [t.clone() for t in tensors(seen)]
            found = pass_.run(seen)
            assert list(found.kept) == sorted(set(found.kept))
            assert len(found.kept) == seen.keep
            assert max(found.kept) < len(seen.columns)
            assert found.weight.shape == (len(seen.weight), seen.keep * width)
            assert found.weight.dtype == torch.float32
            assert found.shift is None or biased
            assert 0 <= found.notes["error"] < 2
            torch.manual_seed(12345)
            again = pass_.run(seen)
            assert again.kept == found.kept
            assert torch.equal(again.weight, found.weight)
            assert all(torch.equal(x, y) for x, y in zip(before, tensors(seen), strict=True))
            assert pass_.stand_in().run(seen).weight.shape == found.weight.shape


@pytest.mark.parametrize("pass_", SCALING, ids=named)
def test_scales_are_positive_and_in_the_weights_and_every_time_the_same(pass_: ScalingPass) -> None:
    for width in (1, 4):
        seen = textbook.channels_seen(pass_, width)
        before = [t.clone() for t in tensors(seen)]
        found = pass_.run(seen)
        assert found.scales.shape == (len(seen.columns),)
        assert found.scales.dtype == torch.float32
        assert bool((found.scales > 0).all())
        for made, w in zip(found.weights, seen.weights, strict=True):
            assert made.dtype == torch.float32
            scaled = w * seen.of_columns(found.scales)
            assert bool((made.abs() <= scaled.abs()).all())  # what is cut off becomes smaller
            assert torch.equal(made, scaled) or getattr(pass_, "clip", False)
        torch.manual_seed(12345)
        again = pass_.run(seen)
        assert torch.equal(again.scales, found.scales)
        assert all(torch.equal(a, b) for a, b in zip(again.weights, found.weights, strict=True))
        assert all(torch.equal(x, y) for x, y in zip(before, tensors(seen), strict=True))


@each_editor
def test_no_zero_comes_back(pass_: Pass) -> None:
    for share in SHARES:
        if share is None or not works_on(pass_, share):
            continue
        given, found = once(pass_, share)
        for name, edit in found.items():
            kept = given[name].mask
            assert kept is not None
            if edit.keeps:
                continue
            assert edit.mask is not None
            assert not bool((edit.mask & ~kept).any())
            values = given[name].weight if edit.low_rank else edit.weight
            made = Weight(values, edit.mask, edit.encoding, low_rank=edit.low_rank).base()
            assert bool((made[~kept] == 0).all()), (share, name)


@each_editor
def test_the_manager_accepts_the_edit_and_finds_the_kind_it_was_promised(pass_: Pass) -> None:
    for masked in SHARES:
        if not works_on(pass_, masked):
            continue
        given, found = once(pass_, masked)
        for name, edit in found.items():
            before = Weight(given[name].weight, given[name].mask)
            assert before.kind in pass_.accepts
            site = Site(name, SHAPES[name], TensorRef(f"{name}.weight"), 0)
            original = given[name].original
            old = before.dequantize() if original is None else original
            after, error = observed(site, pass_, before, old, edit, torch.float32)
            assert after.kind == pass_.produces(before.kind)
            assert 0 <= error < 2, (masked, name)


def test_the_fallback_needs_no_data_and_makes_the_same_kind() -> None:
    for pass_ in SOLVERS:
        fallback = pass_.stand_in()
        assert fallback.needs == "none", pass_
        assert errors_in(fallback) == [], pass_
        for kind in pass_.accepts:
            assert fallback.produces(kind) == pass_.produces(kind), (pass_, kind)


@pytest.mark.parametrize("pass_", only(FIRST, [p for p in LINEAR if p.rowwise]), ids=named)
def test_rows_of_a_rowwise_pass_may_be_stacked(pass_: LinearPass) -> None:
    a, b = (textbook.weight(rows, 48, seed) for rows, seed in ((8, 0), (6, 1)))
    x = textbook.inputs(48, tokens=64)
    made = [pass_.run(textbook.target(w, x)) for w in (torch.cat([a, b]), a, b)]
    dense = [e.encoding.dequantize() if e.encoding else e.weight for e in made]
    assert textbook.rows_that_differ(dense[0].ne(0), torch.cat(dense[1:]).ne(0)) <= 1
    assert torch.allclose(dense[0], torch.cat(dense[1:]), atol=1e-4)


@cache
def merged_once(pass_: MergePass) -> textbook.Values:
    return textbook.merged(pass_, models(pass_))


@each_merge
def test_a_merge_changes_nothing_that_was_given_and_is_the_same_every_time(pass_: MergePass) -> None:
    given = models(pass_)
    torch.manual_seed(12345)  # the global generator must not matter
    made = textbook.merged(pass_, given)
    assert all(torch.equal(merged_once(pass_)[name], made[name]) for name in given[0])
    for before, after in zip(models(pass_), given, strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)


@each_merge
def test_how_a_tensor_is_cut_into_pieces_does_not_matter(pass_: MergePass) -> None:
    given = models(pass_)
    cut = textbook.merged(pass_, given, piece=11)  # no size of a tensor is a multiple of it
    for name, value in merged_once(pass_).items():
        assert value.shape == given[0][name].shape
        assert value.dtype == torch.float32
        assert torch.allclose(value, cut[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "pass_", only(FIRST, [p for p in MERGES if getattr(p, "normalize", True)]), ids=named
)  # a sum is no mean
def test_merging_a_model_with_itself_leaves_it(pass_: MergePass) -> None:
    given = models(pass_, size=0)
    for name, value in textbook.merged(pass_, given).items():
        assert torch.allclose(value, given[0][name], rtol=1e-6)
