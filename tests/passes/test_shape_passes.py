"""Behind other passes, and before them, those that change the shape of a model: what counts as the original, sizes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from expert_models import make_mixture
from selection import only
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import compress
from compress import ConfigError, WidthPrune
from compress.checkpoint import opening
from compress.checkpoint.artifact import Artifact
from compress.config.reading import parse
from compress.engine import manager
from compress.planning import plan

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = torch.randint(3, 96, (6, 16), generator=torch.Generator().manual_seed(1))
GIVEN = {"calibration": TOKENS, "evaluation": TOKENS}
CHANGES: dict[str, Any] = {
    "width_prune": {"sparsity": 0.34},
    "layer_drop": {},
    "expert_prune": {"keep": 4},
    "expert_merge": {"keep": 4},
}
TRAINED = {"train": ["bias", "norm", "lora"], "rank": 2, "objective": "next_token", "steps": 3, "learning_rate": 0.05}
BIASED = {**TRAINED, "new_biases": True}
NOT_EXPERTS = ["*.experts.*"]


def make(kind: str = "Llama") -> PreTrainedModel:
    """A small random model; of experts, where the kind is a mixture."""
    small = {"vocab_size": 96, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8}
    if kind != "Llama":
        return make_mixture(kind, vocab_size=96)
    torch.manual_seed(3)
    config = transformers.LlamaConfig(**small, intermediate_size=32, num_hidden_layers=3, initializer_range=0.3)
    return transformers.LlamaForCausalLM(config).eval()


def model_for(change: str) -> PreTrainedModel:
    return make("Qwen3Moe" if change.startswith("expert") else "Llama")


def values(artifact: Artifact) -> dict[str, Tensor]:
    return {name: artifact.tensor(name) for name, _ in artifact.graph.tensors()}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Tensor]]:
    """The model at the end of a run: as it stands, and what counts as the original then."""
    found: dict[str, dict[str, Tensor]] = {}
    execute = manager.execute

    def watched(*arguments: Any, **options: Any) -> Any:
        report, context = execute(*arguments, **options)
        artifact = context.artifact
        found.update(stands=values(artifact), original=values(artifact.plain()))
        for name, tensor in found["original"].items():
            stored = artifact.name_in_source(name)
            if stored in artifact.stored:
                found["pieces"] = found.get("pieces", {}) | {name: in_pieces(artifact, stored).view(tensor.shape)}
        return report, context

    monkeypatch.setattr(manager, "execute", watched)
    return found


def in_pieces(artifact: Artifact, stored: str) -> Tensor:
    source = artifact.source
    count = torch.Size(source.shape(stored)).numel()
    return torch.cat([source.piece(stored, i, min(i + 7, count)) for i in range(0, count, 7)])


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """The names of tensors that are the same."""
    return [name for name in one if torch.equal(one[name], other[name].to(one[name].dtype))]


def run(tmp_path: Path, model: PreTrainedModel, passes: list[Any]) -> Any:
    model.save_pretrained(tmp_path / "model")
    return compress.run({"passes": passes}, tmp_path / "model", tmp_path / "out", **GIVEN)


@pytest.mark.parametrize(
    ("trained", "parts"),
    [pytest.param(TRAINED, ["mlp"], marks=pytest.mark.real), (BIASED, ["heads", "mlp"])],
)
def test_behind_training_the_original_of_a_narrower_model_is_what_was_measured(
    trained: dict[str, Any], parts: list[str], tmp_path: Path, seen: dict[str, dict[str, Tensor]]
) -> None:
    model = make()
    untrained = dict(model.named_parameters())
    report = run(tmp_path, model, [{"perp": trained}, {"width_prune": {"sparsity": 0.34, "parts": parts}}])
    assert report.verified["max_logit_difference"] == 0
    assert same(seen["original"], seen["stands"]) == list(seen["stands"]), "no mixture"
    assert same(seen["pieces"], seen["stands"]) == [name for name in seen["stands"] if name in untrained]
    norm = "model.layers.1.input_layernorm.weight"
    assert not torch.equal(seen["original"][norm], untrained[norm])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(p, seen["stands"][n]) for n, p in loaded.named_parameters())
    here = compress.apply(model, [compress.Perp(**as_options(trained)), WidthPrune(sparsity=0.34, parts=tuple(parts))],
                          **GIVEN)  # fmt: skip
    assert here.report.rows[-1].perplexity == pytest.approx(report.rows[-1].perplexity, rel=1e-4)
    assert same(seen["original"], seen["stands"]) == list(seen["stands"])


def as_options(options: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}


@pytest.mark.parametrize("change", only(["layer_drop"], ["layer_drop", "expert_prune", "expert_merge"]))
def test_the_original_of_a_model_with_fewer_blocks_or_experts_is_none_of_what_was_trained(
    change: str, tmp_path: Path, seen: dict[str, dict[str, Tensor]]
) -> None:
    model, option = model_for(change), {"exclude": NOT_EXPERTS} if change.startswith("expert") else {}
    run(tmp_path, model, [{change: CHANGES[change]}])
    original = dict(seen["stands"])
    run(tmp_path / "again", model, [{"perp": {**TRAINED, **option}}, {change: CHANGES[change]}])
    parts = [name for name in original if "experts" not in name and "gate" not in name]
    assert set(same(seen["original"], original)) >= set(parts)
    assert len(same(seen["original"], seen["stands"])) < len(parts)


BEHIND: dict[str, tuple[str, list[Any]]] = {
    "trained": ("width_prune", [{"perp": TRAINED}]),
    "given biases": ("width_prune", [{"perp": BIASED}]),
    "reordered": ("width_prune", [{"reorder": {}}]),
    "attention quantized": ("width_prune", [{"rtn": {"bits": 4, "group_size": 16, "include": ["*self_attn*"]}}]),
    "narrower": ("width_prune", [{"width_prune": {"sparsity": 0.25, "parts": ["mlp"]}}, {"perp": BIASED}]),
    "shorter": ("layer_drop", [{"perp": BIASED}]),
    "experts": ("expert_prune", [{"perp": {**TRAINED, "exclude": NOT_EXPERTS}}]),
}


@pytest.mark.parametrize("case", only(["given biases", "narrower", "experts"], BEHIND))
def test_the_size_is_what_was_planned_behind_other_passes(case: str, tmp_path: Path) -> None:
    change, before = BEHIND[case]
    options = {**CHANGES[change], "parts": ["mlp"]} if case == "attention quantized" else CHANGES[change]
    passes = [*before, {change: options}]
    model = model_for(change)
    report = run(tmp_path, model, passes)
    opened = opening.open_model(tmp_path / "model")
    steps = parse(f"calibration: {{source: demo, samples: 2, length: 32}}\npasses: {passes}")
    expected = plan.make(steps, opened.artifact.graph, opened.dtypes)
    assert report.rows[-1].bytes == expected.final_bytes


def test_biases_that_a_pass_before_gives_may_be_repaired() -> None:
    bias = WidthPrune(sparsity=0.34, score="fluctuation", repair="bias")
    with pytest.raises(ConfigError, match="have no bias"):
        compress.apply(make(), [compress.Perp(**as_options(TRAINED)), bias], **GIVEN)
    result = compress.apply(make(), [compress.Perp(**as_options(BIASED)), bias], **GIVEN)
    assert result.model.model.layers[1].mlp.down_proj.bias.abs().max() > 0


def test_what_another_tower_calls_the_same_is_left_alone(tmp_path: Path) -> None:
    """Both towers have 32 neurons in a block; those of the language model go."""
    sizes = {"hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 6}
    seen = transformers.CLIPVisionConfig(**sizes, image_size=8, patch_size=4, projection_dim=16)
    text = transformers.LlamaConfig(**sizes, vocab_size=96, num_key_value_heads=3, head_dim=8)
    config = transformers.LlavaConfig(vision_config=seen, text_config=text, image_token_index=5)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    narrow = WidthPrune(parts=("mlp",), sparsity=0.25, score="magnitude", repair="none")
    made = compress.apply(model, [narrow]).model
    assert made.config.text_config.intermediate_size == 24
    assert made.config.vision_config.intermediate_size == 32
    model.save_pretrained(tmp_path / "model")
    steps = {"passes": [{"width_prune": {"parts": ["mlp"], "sparsity": 0.25, "score": "magnitude", "repair": "none"}}]}
    compress.run(steps, tmp_path / "model", tmp_path / "out")
    loaded = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert all(torch.equal(p, made.get_parameter(name)) for name, p in loaded.named_parameters())
