"""What every pass promises, checked for everything in `PASSES`: a new pass is tested the moment it is listed."""

import dataclasses
import re
from collections.abc import Iterator
from functools import cache

import pytest
import textbook
import torch
from torch import Tensor

import compress
from compress.config.options import errors_in
from compress.config.pipeline import Pipeline
from compress.config.reading import parse
from compress.config.writing import dump
from compress.encodings import Weight
from compress.engine.validate import observed
from compress.models.site import Site, TensorRef
from compress.passes import PASSES, BlockPass, DepthPass, LinearPass, MergePass, ModelPass, Override, Pass
from compress.passes.base import Edit, Target
from compress.passes.merge.schedules import Matched

SHAPES = {"a": (8, 48), "b": (6, 48), "c": (10, 32)}

# Options worth trying beside the defaults. A pass that is not named here is tested with its defaults.
OPTIONS: dict[str, list[dict[str, object]]] = {
    "rtn": [
        {"bits": 3, "group_size": 16, "symmetric": True},
        {"bits": 8, "granularity": "tensor", "scale_search": "mse"},
        {"bits": 2, "granularity": "channel"},
        {"bits": 8, "activation_bits": 8},
        {"activation_bits": 4, "activation_scale": "tensor", "activation_grid": "olive"},
    ],
    "gptq": [
        {"bits": 3, "group_size": 16, "symmetric": True, "tile": 16},
        {"bits": 8, "granularity": "tensor", "damping": 0.1},
        {"act_order": True, "group_size": 16, "scale_search": "mse"},
        {"activation_bits": 8, "activation_scale": "tensor"},
    ],
    "olive": [
        {"normal": "flint4", "double_outlier": "even"},
        {"bits": 8, "lower": 1.0, "upper": 1.5, "step": 0.25},
        {"normal": "int4", "rescue_error": 0.05},
        {"activation_bits": 4, "activation_scale": "tensor", "activation_grid": "olive"},
    ],
    "powerquant": [
        {"bits": 3, "group_size": 16, "levels": "zero", "norm": 2.0},
        {"bits": 8, "granularity": "tensor", "scale_search": "minmax"},
        {"bits": 2, "levels": "half", "exponent": 0.8},
    ],
    "powerquant_shared": [
        {"bits": 3, "group_size": 16, "share": "block"},
        {"levels": "half", "scale_search": "minmax"},
    ],
    "codebook": [
        {"weighting": "none", "tables": 3},
        {"bits": 2, "scale": "row", "tables": 2, "iterations": 5},
        {"entries": 5, "scale": "row", "weighting": "none", "tolerance": 0.0},
        {"bits": 8},
    ],
    "flexround": [
        {"steps": 4, "bits": 2, "group_size": 16, "inputs": "mix"},
        {"steps": 4, "bits": 3, "objective": "layer", "symmetric": True},
        {"steps": 4, "granularity": "tensor", "rank": 2, "inputs": "original"},
    ],
    "nupes": [
        {"steps": 4, "bits": 2, "group_size": 16, "levels": "half"},
        {"steps": 4, "bits": 3, "granularity": "tensor", "objective": "layer", "learn_scale": False},
        {"steps": 4, "bits": 3, "learn_exponent": False, "scale_search": "minmax", "levels": "zero"},
    ],
    "jlcm": [
        {"steps": 4, "bits": 2, "mapping_rate": 0.5},
        {"steps": 4, "entries": 5, "tables": 2, "scale": "row", "mapping_gradient": "distance"},
        {"steps": 4, "bits": 3, "objective": "layer", "learn_mapping": False, "weighting": "none"},
    ],
    "reorder": [{"groups": 3}],
    "eora": [
        {"rank": None, "energy": 0.5},
        {"rank": 4, "adapter_bits": 8, "method": "activation"},
        {"rank": 2, "adapter_bits": 4, "method": "svd"},
    ],
    "low_rank": [
        {"ratio": 0.8, "method": "svd", "inputs": "mix"},
        {"ratio": 0.25, "perturbation": 0.1, "floor": 1e-4},
    ],
    "perp": [
        {"train": ("scale_lora",), "rank": 2},
        {"train": ("lora_prune", "bias"), "rank": 2, "new_biases": True},
        {"train": ("full",), "batch_size": 2},
        {"train": ("lora",), "rank": 2, "alpha": 1.0},
    ],
    "perp_reconstruct": [{"train": ("scale_lora", "mask_lora"), "rank": 2}, {"granularity": "matrix"}],
    "adaround": [{"steps": 4, "bits": 2, "group_size": 16}, {"steps": 4, "objective": "layer"}],
    "magnitude": [{"sparsity": "2:4"}, {"sparsity": 0.25}],
    "global_magnitude": [
        {"sparsity": 0.7, "min_keep": 0.01},
        {"sparsity": 0.0},
        {"sparsity": 0.95, "cuts": 2, "steps": 2, "regrow": True},
    ],
    "bip": [{"sparsity": 0.95, "mask_rate": 0.1}],
    "sparse_soup": [{"models": 2, "soup": "greedy"}, {"sparsity": 0.95, "phases": 2, "models": 2}],
    "wanda": [
        {"sparsity": "2:4"},
        {"sparsity": 0.3, "free_rows": True},
        {"update": "obs", "damping": 0.1},
        {"sparsity": "2:4", "update": "exact"},
    ],
    "layer_drop": [{"blocks": 2}, {"blocks": 3, "greedy": False}, {"blocks": 2, "criterion": "angular"}, {"blocks": 0}],
    "sparsegpt": [{"sparsity": "4:8", "damping": 0.1}, {"sparsity": 0.7, "tile": 16}],
    "average": [
        {"weights": (0.5, 1.0, 2.0), "normalize": False},
        {"weights": ((0.0, 1.0, 0.5), 1.0, (Matched("*.mlp.*", 0.25), Matched("*", (0.0, 1.0))))},
        {"vocabulary": "common"},
    ],
    "slerp": [{"t": 0.25}, {"t": (0.0, 0.5, 1.0)}, {"t": (Matched("*.mlp.*", 0.25), Matched("*.bias", (0.0, 1.0)))}],
    "interpolate": [{"alpha": 1.0}, {"alpha": (0.0, 1.0)}, {"alpha": (Matched("*.mlp.*", 0.25),)}],
    "task_arithmetic": [{"scale": -1.0, "weights": (Matched("a", 0.5),)}, {"weights": (1.0, -1.0), "combine": "mean"}],
    "ties": [
        {"scope": "model", "density": (0.3, 0.9), "combine": "sum"},
        {"density": ((0.1, 0.9),), "tie": "positive", "scale": (0.5, 1.0)},
    ],
    "dare": [
        {"density": 0.5, "rescale": "l1", "combine": "mean"},
        {"density": (0.5, 0.9), "merge": "ties", "rescale": "none", "tie": "positive"},
    ],
    "greedy_soup": [{"base": False}],
    "adamerging": [{"level": "task"}, {"trim": 0.5, "diversity": 0.1}, {"steps": 0}],
    "compeft": [
        {"density": 0.3, "magnitude": "std", "alpha": 2.0},
        {"scope": "tensor", "density": ((0.1, 0.9),), "magnitude": "mean", "alpha": (Matched("*.mlp.*", 0.5),)},
    ],
    "bitdelta": [{"bits": 3}, {"steps": 0}],
    "pcb": [{"scope": "tensor", "density": (0.2, (0.1, 0.5))}, {"clip": 0.0, "weights": (1.0, 0.5), "scale": 1.2}],
    "weight_matching": [{"sweeps": 3, "weights": (0.5, 1.0, 2.0)}, {"weights": ((0.0, 1.0), 1.0, 0.5)}],
    "robust_signature": [
        {"alpha": 0.5, "layers": 2, "bits": 4},
        {"target": "base", "alpha": ((0.0, 1.0),)},
        {"target": "last", "models": ("./standard", "./robust", "./other"), "alpha": (Matched("*.mlp.*", 0.25),)},
    ],
}

LEARNED = (
    "bitdelta",
    "adamerging",
    "flexround",
    "adaround",
    "nupes",
    "jlcm",
    "low_rank",
    "perp",
    "perp_reconstruct",
    "sparse_soup",
    "bip",
)
QUICK: dict[str, dict[str, object]] = {key: {"steps": 4} for key in LEARNED}  # keeps a learned method quick
NEEDED: dict[str, dict[str, object]] = {  # what a pass cannot do without
    cls.key: {"models": ("./one",) if cls.pairwise else ("./one", "./two")}
    for cls in PASSES
    if issubclass(cls, MergePass)
}

CONFIGURED = [
    cls(**{**QUICK.get(cls.key, {}), **NEEDED.get(cls.key, {}), **options})
    for cls in PASSES
    for options in [{}, *OPTIONS.get(cls.key, [])]
]
EDITORS = [p for p in CONFIGURED if not isinstance(p, DepthPass | MergePass)]
SOLVERS = [p for p in CONFIGURED if isinstance(p, LinearPass | BlockPass)]
LINEAR = [p for p in CONFIGURED if isinstance(p, LinearPass)]
MERGES = [p for p in CONFIGURED if isinstance(p, MergePass)]
DEPTH = [p for p in CONFIGURED if isinstance(p, DepthPass)]


def named(pass_: Pass) -> str:
    return f"{pass_.key}-{pass_.options()}"


each_editor = pytest.mark.parametrize("pass_", EDITORS, ids=named)
each_merge = pytest.mark.parametrize("pass_", MERGES, ids=named)
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
        statistics = None if pass_.needs == "none" else textbook.statistics(x, pass_.needs)
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
        if isinstance(pass_, ModelPass | DepthPass):  # one decision over all layers: nothing to override for some
            assert [e.option for e in dataclasses.replace(pass_, overrides=(Override("*", {}),)).check()] == [
                "overrides"
            ], pass_
            continue
        common = {
            o
            for o in pass_.options()
            if o in ("steps", "inputs", "objective", "granularity") and isinstance(pass_, BlockPass)
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


@pytest.mark.parametrize("pass_", LINEAR, ids=named)
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


@each_editor
def test_no_zero_comes_back(pass_: Pass) -> None:
    for share in SHARES:
        if share is None or not works_on(pass_, share):
            continue
        given, found = once(pass_, share)
        for name, edit in found.items():
            kept = given[name].mask
            assert kept is not None
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
        fallback = pass_.fallback()
        assert fallback.needs == "none", pass_
        assert errors_in(fallback) == [], pass_
        for kind in pass_.accepts:
            assert fallback.produces(kind) == pass_.produces(kind), (pass_, kind)


@pytest.mark.parametrize("pass_", [p for p in LINEAR if p.rowwise], ids=named)
def test_rows_of_a_rowwise_pass_may_be_stacked(pass_: LinearPass) -> None:
    a, b = (textbook.weight(rows, 48, seed) for rows, seed in ((8, 0), (6, 1)))
    x = textbook.inputs(48, tokens=64)
    made = [pass_.run(textbook.target(w, x)) for w in (torch.cat([a, b]), a, b)]
    dense = [e.encoding.dequantize() if e.encoding else e.weight for e in made]
    assert textbook.rows_that_differ(dense[0].ne(0), torch.cat(dense[1:]).ne(0)) <= 1
    assert torch.allclose(dense[0], torch.cat(dense[1:]), atol=1e-4)


def models(pass_: MergePass, size: float = 0.1) -> list[dict[str, Tensor]]:
    """The base and as many others as a pass merges with it: two blocks, and a tensor before and behind them."""
    shapes = {"first.weight": (9, 4), "blocks.0.mlp.weight": (6, 8), "blocks.1.bias": (7,), "last.weight": (5, 5)}
    generator = torch.Generator().manual_seed(5)
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    others = range(len(pass_.models))
    return [base, *({n: v + size * torch.randn(v.shape, generator=generator) for n, v in base.items()} for _ in others)]


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


@pytest.mark.parametrize("pass_", [p for p in MERGES if getattr(p, "normalize", True)], ids=named)  # a sum is no mean
def test_merging_a_model_with_itself_leaves_it(pass_: MergePass) -> None:
    given = models(pass_, size=0)
    for name, value in textbook.merged(pass_, given).items():
        assert torch.allclose(value, given[0][name], rtol=1e-6)
