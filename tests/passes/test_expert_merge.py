"""Merging experts: those that put out alike become one, and a result that is a model of its kind like any other."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import compress_command, write_pipeline
from expert_models import experts_of, make_mixture
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import compress
from compress import ConfigError, ExpertMerge, ExpertPrune, Gptq, Override, Rtn
from compress.calibration.experts import put_out
from compress.checkpoint.cut import CutSource
from compress.checkpoint.sources import ModuleSource
from compress.errors import NonFiniteError
from compress.models.cuts import Blend, Part
from compress.models.experts import neurons_of_experts, running_one_by_one
from compress.models.fewer_experts import mixture_of
from compress.models.graph import find
from compress.passes.interface import ExpertsSeen
from compress.passes.prune.expert_merge import clusters

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = torch.randint(3, 256, (8, 32), generator=torch.Generator().manual_seed(1))
DEMO = "calibration: {source: demo, samples: 2, length: 32}\n"
W4 = {"bits": 4, "granularity": "channel"}
KINDS = ("Mixtral", "Qwen3Moe", "Qwen2Moe", "Olmoe", "GptOss", "GraniteMoe", "DeepseekV3", "Glm4Moe", "Ernie4_5_Moe",
         "Phimoe", "HunYuanMoEV1", "NemotronH", "LongcatFlash")  # fmt: skip


def logits(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=tokens, use_cache=False).logits
    return found


def apply(model: nn.Module, pass_: Any) -> compress.Result:
    return compress.apply(model, [pass_], TOKENS, evaluation=TOKENS, products="float32")


def layers_of(report: Any) -> dict[str, dict[str, Any]]:
    (facts,) = report.experts
    found: dict[str, dict[str, Any]] = facts["layers"]
    return found


def groups_of(layer: dict[str, Any]) -> set[frozenset[int]]:
    """Which experts became one."""
    merged = [frozenset(numbers) for numbers in layer.get("merged", {}).values()]
    there = frozenset().union(*merged)
    return {*merged, *(frozenset({i}) for i in range(len(layer["tokens"])) if i not in there)}


# --- redundant experts: what the paper is about -----------------------------------------------------------------------


def redundant(
    kind: str = "Mixtral", noise: float = 0.0, permuted: bool = False, lean: float = 4.0, **changes: Any
) -> PreTrainedModel:
    """A mixture of four experts, each there twice: experts i and i + 4.

    The router sends a token to the first or the second of a pair by the side of a plane that it lies on, so that both
    are of use, and to pairs by what they have in common. Pairs differ in the length of what they put out: by REAP both
    of the long ones are worth more than either of the short ones.
    """
    model = make_mixture(kind, num_local_experts=8, **changes)
    made = torch.Generator().manual_seed(11)
    for module in experts_of(model).values():
        width = module.down_proj.shape[-1]
        for first in range(4):
            order = torch.randperm(width, generator=made) if permuted else torch.arange(width)
            with torch.no_grad():
                module.down_proj[first] *= 1 + first / 2
                module.down_proj[first + 4] = module.down_proj[first][:, order]
                module.gate_up_proj[first + 4] = module.gate_up_proj[first][torch.cat([order, width + order])]
                for value in (module.down_proj[first + 4], module.gate_up_proj[first + 4]):
                    value += noise * value.std() * torch.randn(value.shape, generator=made)
    for name in experts_of(model):
        rows = model.get_submodule(name.rpartition(".")[0]).gate.weight.data
        side = torch.randn(rows.shape[1], generator=made)
        rows[4:] = rows[:4]
        rows[:4] += lean * rows.std() * side
        rows[4:] -= lean * rows.std() * side
    return model


PAIRS = {frozenset({i, i + 4}) for i in range(4)}


def distance(model: nn.Module, other: nn.Module) -> float:
    expected = logits(other)
    return float((logits(model) - expected).norm() / expected.norm())


@pytest.mark.parametrize("permuted", [False, True])
def test_experts_that_are_there_twice_become_one_and_nothing_changes(permuted: bool) -> None:
    model = redundant(permuted=permuted)
    result = apply(model, ExpertMerge(keep=4, weigh="equal"))
    assert all(groups_of(layer) == PAIRS for layer in layers_of(result.report).values())
    assert distance(result.model, model) < 1e-5
    pruned = apply(model, ExpertPrune(keep=4))
    assert distance(pruned.model, model) > 0.1


def test_experts_that_are_nearly_the_same_become_their_mean_where_pruning_loses_much() -> None:
    model = redundant(noise=0.02)
    merged = distance(apply(model, ExpertMerge(keep=4)).model, model)
    pruned = {by: distance(apply(model, ExpertPrune(keep=4, by=by)).model, model) for by in ("reap", "frequency")}
    print(merged, pruned)
    assert merged < min(pruned.values()) / 3
