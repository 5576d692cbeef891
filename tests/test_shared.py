"""A matrix that several blocks share is one site: learned from all its uses, packed once, shared again when loaded."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Zamba2Config, Zamba2ForCausalLM

import compress
from compress.calibration.statistics import Statistics
from compress.models import graph as graphs
from compress.passes import Gptq, Rtn, Wanda
from compress.passes.interface import Edit, Target
from compress.runtime.tied import TiedLinear

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # of Zamba's slow path, and of what transformers ties
]
FIRST = "model.layers.1.shared_transformer"
SECOND = "model.layers.3.shared_transformer"
Q_PROJ = "self_attn.q_proj"


def zamba() -> PreTrainedModel:
    torch.manual_seed(4)
    config = Zamba2Config(
        vocab_size=256, hidden_size=32, num_hidden_layers=4, layers_block_type=["mamba", "hybrid"] * 2,
        intermediate_size=64, num_attention_heads=2, num_key_value_heads=2, attention_hidden_size=64,
        attention_head_dim=32, mamba_d_state=8, n_mamba_heads=4, mamba_headdim=16, mamba_ngroups=1, num_mem_blocks=1,
        initializer_range=0.2, adapter_rank=8, chunk_size=8,
    )  # fmt: skip
    return Zamba2ForCausalLM(config).eval()


@cache
def tokens() -> Tensor:
    return torch.randint(4, 250, (16, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("shared") / "model"
    zamba().save_pretrained(place)
    return place


def run(folder: Path, out: Path, *passes: dict[str, Any]) -> nn.Module:
    data = {"calibration": tokens(), "evaluation": tokens()[:4]}
    compress.run({"passes": list(passes), "allow_dense": True}, folder, out, **data)
    made: nn.Module = AutoModelForCausalLM.from_pretrained(out).eval()
    return made


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(tokens()).logits
    return found


def test_layers_that_blocks_share_are_one_site_by_all_their_names() -> None:
    graph = graphs.find(zamba())
    site = next(s for s in graph.sites if s.name == f"{FIRST}.{Q_PROJ}")
    assert site.names == (f"{FIRST}.{Q_PROJ}", f"{SECOND}.{Q_PROJ}")
    assert site.block == 1
    assert not any(s.name.startswith(SECOND) for s in graph.sites)
    assert site in graph.used_in(3)
    assert site not in graph.in_block(3)
    assert graph.users_of([site]) == (3,)


@torch.no_grad()
def test_statistics_are_those_of_every_use(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = zamba(), dict[str, Statistics]()

    def solved(self: Gptq, target: Target) -> Edit:
        assert target.statistics is not None
        seen[str(target.weight.shape)] = target.statistics
        return Edit(weight=target.weight)

    sums = torch.zeros(64, 64, dtype=torch.float64)

    def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].double().flatten(0, -2)
        sums.add_(x.T @ x)

    handles = [model.get_submodule(f"{p}.{Q_PROJ}").register_forward_pre_hook(see) for p in (FIRST, SECOND)]
    model(tokens())
    for handle in handles:
        handle.remove()
    monkeypatch.setattr(Gptq, "run", solved)
    compress.apply(model, [Gptq(include=(f"{FIRST}.{Q_PROJ}",))], calibration=tokens(), products="float32")
    (found,) = seen.values()
    assert found.tokens == 2 * tokens().numel()
    assert found.gram is not None
    assert torch.allclose(found.gram.double(), sums, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", [FIRST, SECOND])
def test_any_name_of_a_shared_layer_means_the_one_site(name: str) -> None:
    made = compress.apply(zamba(), [Rtn(bits=4, include=(f"{name}.{Q_PROJ}",))])
    assert list(made.weights) == [f"{FIRST}.{Q_PROJ}"]
    others = compress.apply(zamba(), [Rtn(bits=4, exclude=(f"{name}.{Q_PROJ}",))])
    assert f"{FIRST}.{Q_PROJ}" not in others.weights
    assert others.weights


def test_in_memory_every_use_has_the_new_weight() -> None:
    made = compress.apply(zamba(), [Rtn(bits=3)])
    one, other = (made.model.get_submodule(f"{p}.{Q_PROJ}").weight for p in (FIRST, SECOND))
    assert one is other
    assert torch.equal(one.detach(), made.weights[f"{FIRST}.{Q_PROJ}"].dequantize())


def test_it_is_packed_once_and_shared_when_loaded(folder: Path, tmp_path: Path) -> None:
    made = run(folder, tmp_path / "out", {"gptq": {"bits": 4, "group_size": 8}})
    with safe_open(tmp_path / "out" / "compress.safetensors", "pt") as file:
        names = set(file.keys())
    assert f"{FIRST}.{Q_PROJ}.codes" in names
    assert not any(name.startswith(SECOND) for name in names)
    user = made.get_submodule(f"{SECOND}.{Q_PROJ}")
    assert isinstance(user, TiedLinear)
    assert user.owner is made.get_submodule(f"{FIRST}.{Q_PROJ}")
    assert not list(user.buffers())
    here = compress.apply(zamba(), [Gptq(bits=4, group_size=8)], calibration=tokens())
    assert torch.allclose(logits(made), logits(here.model), atol=1e-4)


def test_a_copy_shares_its_own(folder: Path, tmp_path: Path) -> None:
    from copy import deepcopy

    made = deepcopy(run(folder, tmp_path / "out", {"rtn": {"bits": 4}}))
    user = made.get_submodule(f"{SECOND}.{Q_PROJ}")
    assert isinstance(user, TiedLinear)
    assert user.owner is made.get_submodule(f"{FIRST}.{Q_PROJ}")


def test_it_is_saved_and_loaded_again_by_transformers(folder: Path, tmp_path: Path) -> None:
    made = run(folder, tmp_path / "out", {"rtn": {"bits": 4}})
    made.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(logits(made), logits(again))


def test_inputs_are_rounded_at_every_use(folder: Path, tmp_path: Path) -> None:
    options = {"bits": 8, "activation_bits": 4, "activation_scale": "tensor"}
    here = compress.apply(zamba(), [Rtn(**options)], calibration=tokens())
    plain = compress.apply(zamba(), [Rtn(bits=8)], calibration=tokens())
    assert not torch.allclose(logits(here.model), logits(plain.model), atol=1e-2)
    made = run(folder, tmp_path / "out", {"rtn": options})
    assert torch.allclose(logits(made), logits(here.model), atol=1e-3)


@pytest.mark.real
def test_learning_sees_all_uses() -> None:
    before, errors = logits(zamba()), {}
    for pass_ in (compress.FlexRound(bits=3, steps=30, batch_size=8), Rtn(bits=3)):
        made = compress.apply(zamba(), [pass_], calibration=tokens()).model
        errors[pass_.key] = float((logits(made) - before).square().mean())
    assert errors["flexround"] < 0.8 * errors["rtn"]


def test_a_streamed_run_learns_what_one_in_memory_does(folder: Path, tmp_path: Path) -> None:
    options = {"bits": 4, "steps": 4}
    made = run(folder, tmp_path / "out", {"wanda": {"sparsity": 0.3}}, {"flexround": options})
    passes = [Wanda(sparsity=0.3), compress.FlexRound(**options)]
    here = compress.apply(zamba(), passes, calibration=tokens())
    assert torch.allclose(logits(made), logits(here.model), atol=1e-3)


def test_training_the_whole_model_changes_every_use(folder: Path, tmp_path: Path) -> None:
    made = run(
        folder, tmp_path / "out", {"wanda": {"sparsity": 0.3}}, {"perp": {"train": ["norm", "mask_lora"], "steps": 5}}
    )
    first = made.get_submodule(f"{FIRST}.{Q_PROJ}")
    second = made.get_submodule(f"{SECOND}.{Q_PROJ}")
    assert torch.equal(first.weight, second.weight)
    source = AutoModelForCausalLM.from_pretrained(folder)
    norms = [m.get_submodule(f"{p}.pre_ff_layernorm").weight for m in (made, source) for p in (FIRST, SECOND)]
    assert torch.equal(norms[0], norms[1])
    assert not torch.equal(norms[0], norms[2])


def test_a_container_without_shared_layers_is_refused(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "out", {"rtn": {"bits": 4, "group_size": 8}})
    compress.export_to(tmp_path / "out", [compress.Hf()])
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "hf").eval()
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(dense), logits(packed))
    with pytest.raises(compress.CompressError, match="are shared by blocks"):
        compress.export_to(tmp_path / "out", [compress.CompressedTensors()])
