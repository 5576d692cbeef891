"""Stages: who runs a pass, what a stage may change, and how its work is shared."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import FrozenInstanceError, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from compress.calibration.data import Dataset
from compress.calibration.statistics import Statistics
from compress.checkpoint.artifact import Artifact
from compress.checkpoint.sources import ModuleSource
from compress.encodings import Weight
from compress.engine.context import Context
from compress.engine.executor import Done, SingleProcess, Work
from compress.engine.ledger import FolderLedger, MemoryLedger, Record
from compress.engine.parcels import Carrier
from compress.engine.stage import Stage, calibration_batches
from compress.engine.stages import RUNNERS
from compress.models import graph as graphs
from compress.passes import PASSES, Average, Gptq, LayerDrop, Rtn, SparseGpt
from compress.passes.base import Pass, Reach
from compress.passes.targets import make_target
from compress.planning.plan import PassPlan
from compress.progress import Bars


def context_of(model: LlamaForCausalLM, **options: Any) -> Context:
    graph = graphs.find(model)
    artifact = Artifact(graph, ModuleSource(model), dict(graph.tied))
    return Context(
        artifact=artifact, given=artifact, ledger=options.pop("ledger", MemoryLedger()), seed=0, dtype=torch.float32,
        products="float32", resident=options.pop("resident", True), bars=Bars(), **options,
    )  # fmt: skip


def stage_of(context: Context, *passes: Pass) -> Stage:
    def planned(pass_: Pass) -> PassPlan:
        sites = tuple(s for s in context.graph.sites if pass_.selects(s.name, s.block is not None))
        return PassPlan("passes[0]", pass_, sites, {})

    return Stage(0, tuple(map(planned, passes)))


def run(context: Context, data: Tensor | None, *passes: Pass) -> Context:
    stage = stage_of(context, *passes)
    return RUNNERS[stage.reach].run(context, stage, None if data is None else Dataset(data), "key").context


@dataclass(frozen=True)
class Watched(SingleProcess):
    """Notes what is asked of it."""

    asked: list[tuple[str, Any]] = field(default_factory=list)

    def shard(self, batches: Sequence[Tensor]) -> Sequence[Tensor]:
        self.asked.append(("shard", len(batches)))
        return super().shard(batches)

    def reduce(self, seen: Mapping[str, Statistics]) -> None:
        self.asked.append(("reduce", set(seen)))

    def map(
        self,
        solve: Callable[[Work], Done],
        work: Iterable[Work],
        carrier: Carrier[Done],
        cost: Callable[[Work], float] = lambda _: 1.0,
    ) -> Iterator[Done]:
        self.asked.append(("map", None))
        return super().map(solve, work, carrier, cost)

    def commit(self, ledger: MemoryLedger, unit: str, key: str, records: list[Record]) -> list[Record]:
        self.asked.append(("commit", unit))
        return super().commit(ledger, unit, key, records)


class Eager(SingleProcess):
    """Solves everything before anything is taken, as processes side by side would."""

    def map(
        self,
        solve: Callable[[Work], Done],
        work: Iterable[Work],
        carrier: Carrier[Done],
        cost: Callable[[Work], float] = lambda _: 1.0,
    ) -> Iterator[Done]:
        return iter([carrier.unpacked(*carrier.packed(solve(each))) for each in work])


class Half(SingleProcess):
    """Runs every second batch, and doubles the sums: the others' batches were the same."""

    def shard(self, batches: Sequence[Tensor]) -> Sequence[Tensor]:
        return batches[::2]

    def reduce(self, seen: Mapping[str, Statistics]) -> None:
        for statistics in {id(s): s for s in seen.values()}.values():
            statistics.tokens *= 2
            for part in statistics.sums():
                part.mul_(2)


def codes(context: Context) -> dict[str, Tensor]:
    found = {}
    for name, weight in context.artifact.committed.items():
        assert isinstance(weight, Weight)
        found[name] = weight.dequantize()
    return found


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- who runs a pass --------------------------------------------------------------------------------------------------


def test_every_reach_of_a_pass_has_a_runner() -> None:
    assert set(get_args(Reach)) == set(RUNNERS)
    assert {p.reach for p in PASSES} == set(RUNNERS)


def test_a_stage_of_one_pass_is_asked_for_it_by_kind(tiny_llama: LlamaForCausalLM) -> None:
    stage = stage_of(context_of(tiny_llama), Rtn())
    assert stage.single(Rtn) == Rtn()
    with pytest.raises(AssertionError):
        stage.single(Gptq)


# --- what a stage may change ------------------------------------------------------------------------------------------


def test_a_context_cannot_be_changed(tiny_llama: LlamaForCausalLM) -> None:
    context = context_of(tiny_llama)
    with pytest.raises(FrozenInstanceError):
        context.artifact = context.artifact.plain()  # type: ignore[misc]


def test_a_stage_that_drops_blocks_returns_another_artifact(tiny_folder: Path, tokens: Tensor) -> None:
    context = context_of(LlamaForCausalLM.from_pretrained(tiny_folder), resident=False)
    before = context.artifact
    after = run(context, tokens, LayerDrop(blocks=1))
    assert context.artifact is before
    assert (len(before.graph.blocks), len(after.graph.blocks)) == (2, 1)
    assert after.given is before


def test_a_stage_that_merges_returns_another_artifact(tiny_folder: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_folder)
    context = context_of(model, resident=False, ledger=FolderLedger(tmp_path / "work"))
    before, source = context.artifact, context.artifact.source
    after = run(context, None, Average(models=(str(tiny_folder),)))
    assert context.artifact is before
    assert before.source is source
    assert after.artifact.source is not source
    assert after.given is before
    name = next(iter(after.graph.sites)).parameter
    assert torch.equal(after.artifact.tensor(name), before.tensor(name))


# --- how work is shared -----------------------------------------------------------------------------------------------


def test_the_sweep_shards_batches_reduces_statistics_maps_over_matrices_and_commits(
    tiny_llama: LlamaForCausalLM, tokens: Tensor
) -> None:
    executor = Watched()
    context = context_of(tiny_llama, executor=executor)
    run(context, tokens, SparseGpt(sparsity=0.5), Gptq(bits=4))
    by_block = [{s.name for s in context.graph.in_block(i)} for i in range(2)]
    assert executor.asked == [
        ("shard", len(calibration_batches(context, Dataset(tokens)))),
        ("reduce", by_block[0]), ("map", None), ("map", None), ("commit", "s00-b0000"),
        ("reduce", by_block[1]), ("map", None), ("map", None), ("commit", "s00-b0001"),
    ]  # fmt: skip


def test_matrices_of_a_unit_may_all_be_solved_before_any_is_taken(tiny_folder: Path, tokens: Tensor) -> None:
    def made(executor: SingleProcess) -> dict[str, Tensor]:
        context = context_of(LlamaForCausalLM.from_pretrained(tiny_folder), executor=executor)
        return codes(run(context, tokens, SparseGpt(sparsity=0.5), Gptq(bits=4)))

    assert same(made(Eager()), made(SingleProcess()))


def test_statistics_of_half_the_batches_are_made_whole_by_reducing(
    tiny_folder: Path, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.engine.stage.CALIBRATED_AT_ONCE", tokens.shape[1])
    twice = tokens[:4].repeat_interleave(2, 0)

    def made(executor: SingleProcess) -> dict[str, Tensor]:
        context = context_of(LlamaForCausalLM.from_pretrained(tiny_folder), executor=executor)
        return codes(run(context, twice, Gptq(bits=4)))

    half, whole = made(Half()), made(SingleProcess())
    first = [n for n in whole if ".layers.0." in n]
    assert first
    assert all(float((half[n] != whole[n]).float().mean()) < 0.05 for n in first)


# --- what a pass is given ---------------------------------------------------------------------------------------------


def test_a_target_of_one_site_says_how_it_is_stored_and_a_stack_does_not(tiny_llama: LlamaForCausalLM) -> None:
    artifact = context_of(tiny_llama).artifact
    q, k = (artifact.sites[f"model.layers.0.self_attn.{name}_proj"] for name in "qk")
    weights = [artifact.weight(q), artifact.weight(k)]
    alone = make_target(artifact.graph, [q], weights[:1], original=artifact.original)
    assert alone.stored is weights[0]
    assert alone.original is not None
    assert torch.equal(alone.weight, alone.original)
    both = make_target(artifact.graph, [q, k], weights)
    assert (both.stored, both.original, both.rows, both.columns) == (None, None, None, None)
    assert torch.equal(both.weight, torch.cat([weights[0].dequantize(), weights[1].dequantize()]))


def test_a_stack_is_masked_where_its_sites_are(tiny_llama: LlamaForCausalLM) -> None:
    artifact = context_of(tiny_llama).artifact
    q, k = (artifact.sites[f"model.layers.0.self_attn.{name}_proj"] for name in "qk")
    masked = [replace(w, mask=torch.ones(s.shape, dtype=torch.bool)) for s in (q, k) for w in [artifact.weight(s)]]
    mask = make_target(artifact.graph, [q, k], masked).mask
    assert mask is not None
    assert mask.shape == (q.shape[0] + k.shape[0], q.shape[1])
