"""Which pass may follow which: every pair is planned, and an impossible order is refused with what to do instead."""

import functools
from dataclasses import fields

import pytest
import torch
from conftest import make_llama
from selection import only

from compress.config.pipeline import Calibration, Pipeline
from compress.errors import ConfigError
from compress.models import graph
from compress.passes import PASSES, MergePass, Pass
from compress.planning import plan

PRUNERS = {"magnitude", "global_magnitude", "wanda", "sparsegpt", "bip"}
QUANTIZERS = {p.key for p in PASSES if p.__module__.startswith("compress.passes.quantize.")} - {"reorder", "kv_cache"}
MERGES = {p.key for p in PASSES if issubclass(p, MergePass)}
TRAINERS = {"perp", "perp_reconstruct", "sparse_soup"}
SMALL = {"rank": 4, "groups": 2}  # options that the narrow layers of the test model need


@functools.cache
def model() -> tuple[graph.Graph, dict[str, torch.dtype]]:
    found = graph.find(make_llama(num_hidden_layers=3))
    return found, {name: p.dtype for name, p in found.tensors()}


def made(key: str, **options: object) -> Pass:
    cls = next(p for p in PASSES if p.key == key)
    numbers = {f.name for f in fields(cls) if f.default is not None}
    known: dict[str, object] = {name: value for name, value in SMALL.items() if name in numbers}
    if issubclass(cls, MergePass):
        known["models"] = ("demo",)
    return cls(**{**known, **options})


@functools.cache
def refused(*passes: Pass) -> list[str]:
    """What is wrong with an order, in words."""
    pipeline = Pipeline(passes=tuple((p,) for p in passes), calibration=Calibration(length=64))
    found, dtypes = model()
    try:
        plan.make(pipeline, found, dtypes)
    except ConfigError as error:
        return [problem.message for problem in error.problems]
    return []


@pytest.mark.parametrize("first", only([p.key for p in PASSES[::6]], [p.key for p in PASSES]))
def test_an_order_is_possible_or_refused_with_what_to_do(first: str) -> None:
    for second in [p.key for p in PASSES]:
        alone = {*refused(made(first)), *refused(made(second))}
        for problem in refused(made(first), made(second)):
            said = any(word in problem for word in ("Put ", "put ", "Raise ", "Train ", "exclude"))
            assert said or problem in alone, f"{first}, {second}: {problem}"


def follows(first: str, second: str, **options: object) -> bool:
    return not refused(made(first), made(second, **options))


@pytest.mark.parametrize("quantizer", sorted(QUANTIZERS))
def test_pruning_comes_before_quantizing(quantizer: str) -> None:
    for pruner in PRUNERS:
        assert follows(pruner, quantizer)
        assert not follows(quantizer, pruner)


@pytest.mark.parametrize("pruner", sorted(PRUNERS))
def test_training_comes_after_pruning_and_before_quantizing(pruner: str) -> None:
    for trainer in TRAINERS:
        assert follows(pruner, trainer)
        assert follows(trainer, pruner)  # more may go, and be trained again
        assert follows(trainer, "gptq")
        assert not follows("gptq", trainer)


def test_after_quantizing_only_what_codes_can_take_is_trained() -> None:
    for trainer in ("perp", "perp_reconstruct"):
        assert follows("gptq", trainer, train=("bias", "norm", "scale", "lora"))
        for name in ("mask_lora", "scale_lora", "lora_prune", "full"):
            assert not follows("gptq", trainer, train=("norm", name))


@pytest.mark.parametrize("first", only(sorted(PRUNERS | QUANTIZERS)[::3], sorted(PRUNERS | QUANTIZERS)))
def test_compensation_follows_what_loses_something_and_is_never_folded(first: str) -> None:
    assert follows(first, "eora")
    for second in PRUNERS | QUANTIZERS | {"eora", "reorder", "sparse_soup"}:
        assert refused(made(first), made("eora"), made(second))
    for trainer in ("perp", "perp_reconstruct"):
        assert refused(made(first), made("eora"), made(trainer))
        assert not refused(made(first), made("eora"), made(trainer, train=("norm", "lora")))


def test_nothing_was_lost_in_a_dense_model() -> None:
    assert any("nothing was lost there" in p for p in refused(made("eora")))


@pytest.mark.parametrize("first", sorted(PRUNERS | QUANTIZERS))
def test_the_order_of_neurons_is_changed_first(first: str) -> None:
    assert follows("reorder", first)
    assert not follows(first, "reorder")


@pytest.mark.parametrize("merge", sorted(MERGES))
def test_merging_comes_first_and_may_be_repeated(merge: str) -> None:
    assert follows(merge, "slerp")
    assert follows(merge, "wanda")
    for other in PRUNERS | {"rtn", "layer_drop", "perp"}:
        assert any(f"put it before {other}" in problem for problem in refused(made(other), made(merge)))
