"""What every pass promises, checked for everything in `PASSES`: a new pass is tested the moment it is listed."""

import dataclasses
import re

import pytest
import textbook
import torch
from configured import CONFIGURED, FIRST, NEEDED
from selection import only

import compress
from compress.config.pipeline import Pipeline
from compress.config.reading import parse
from compress.config.writing import dump
from compress.passes import (
    PASSES,
    BlockPass,
    DepthPass,
    ExpertsPass,
    KvCache,
    MergePass,
    ModelPass,
    Override,
    Pass,
    RecalibrateNorms,
    Rotate,
    ScalingPass,
    WidthPass,
)
from compress.testing import check_runs, check_tensors
from compress.testing.merging import models
from compress.testing.promises import OF_OPTIONS
from compress.testing.trial import Trial

SCALING = [p for p in CONFIGURED if isinstance(p, ScalingPass)]
MERGES = [p for p in CONFIGURED if isinstance(p, MergePass)]
# One of every kind of pass runs on a whole model; a run of every pass is the matter of its own tests.
WHOLE = [
    compress.Rtn(bits=4, group_size=32), compress.FlexRound(bits=3, group_size=32, steps=2),
    compress.Perp(steps=2, train=("lora",), rank=2), compress.Average(models=("./one",)), compress.LayerDrop(blocks=1),
    compress.ExpertPrune(keep=2), compress.WidthPrune(sparsity=0.25), compress.Smooth(), compress.Rotate(),
]  # fmt: skip
QUICK = [WHOLE[0]]


def named(pass_: Pass) -> str:
    return f"{pass_.key}-{pass_.options()}"


@pytest.mark.parametrize("pass_", only(FIRST, CONFIGURED), ids=named)
def test_a_pass_keeps_what_every_pass_promises_about_tensors_and_options(pass_: Pass) -> None:
    check_tensors(pass_)


def test_a_pass_keeps_what_every_pass_promises_about_options_whatever_they_are() -> None:
    for pass_ in CONFIGURED:
        for promise in OF_OPTIONS:
            if isinstance(pass_, promise.kinds):
                promise.kept(Trial(pass_))


@pytest.mark.parametrize("pass_", only(QUICK, WHOLE), ids=named)
def test_a_pass_keeps_what_every_pass_promises_about_whole_runs(pass_: Pass) -> None:
    check_runs(pass_)


def test_a_pass_that_cuts_nothing_off_multiplies_by_its_scales() -> None:
    for pass_ in SCALING:
        if not getattr(pass_, "clip", False):
            shown = textbook.channels_seen(pass_, 4)
            found = pass_.run(shown)
            for made, w in zip(found.weights, shown.weights, strict=True):
                assert torch.equal(made, w * shown.of_columns(found.scales)), pass_


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


@pytest.mark.parametrize("pass_", [p for p in MERGES if getattr(p, "normalize", True)], ids=named)  # a sum is no mean
def test_merging_a_model_with_itself_leaves_it(pass_: MergePass) -> None:
    given = models(pass_, size=0)
    for name, value in textbook.merged(pass_, given).items():
        assert torch.allclose(value, given[0][name], rtol=1e-6)
