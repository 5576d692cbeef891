"""Image models: a small network trained here on scikit-learn's digits, and tiny ones of transformers in a folder."""

import copy
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import compress_command, write_pipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from selection import only
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import (
    AutoModelForImageClassification,
    CLIPConfig,
    CLIPForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    LlamaForCausalLM,
    PreTrainedModel,
    PvtConfig,
    PvtForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

import compress
from compress import (
    ActivationSparsity,
    CheckpointError,
    ConfigError,
    DataError,
    FlexRound,
    GateError,
    GlobalMagnitude,
    Gptq,
    Quality,
    Report,
    Result,
    Row,
    Rtn,
)
from compress.checkpoint.opening import open_model
from compress.config.reading import load_pipeline
from compress.encodings import Spec, pack
from compress.models import graph as graphs
from compress.passes import (
    PASSES,
    DepthPass,
    ExpertsPass,
    KvCache,
    MergePass,
    Pass,
    RecalibrateNorms,
    Rotate,
    ScalingPass,
    WidthPass,
)
from compress.report.report import caption, headings, markdown
from compress.runtime.conv import PackedConvolution
from compress.runtime.linear import unpack_all
from compress.runtime.packed import PackedModule
from compress.runtime.register import replace_modules

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = 10


# --- real data: 8x8 digits, and a network with residual blocks trained on them in seconds -----------------------------


class Residual(nn.Module):
    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        self.one = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.two = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norm_one, self.norm_two = nn.BatchNorm2d(after), nn.BatchNorm2d(after)
        self.skip = nn.Conv2d(before, after, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm_two(self.two(torch.relu(self.norm_one(self.one(x)))))
        return torch.relu(inner + self.skip(x))


@dataclass(frozen=True)
class Digits:
    """A trained network with images to calibrate on and others, with labels, to measure on."""

    model: nn.Sequential
    calibration: Tensor
    evaluation: tuple[Tensor, Tensor]

    def apply(self, *passes: Pass) -> Result:
        return compress.apply(self.model, passes, self.calibration, evaluation=self.evaluation)

    def row(self, *passes: Pass) -> Row:
        return self.apply(*passes).report.rows[-1]


@pytest.fixture(scope="module")
def digits() -> Digits:
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32)[order, None] / 16
    labels = torch.tensor(data.target)[order]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(inplace=True), Residual(12, 12, 1), Residual(12, 24, 2),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, CLASSES),
        )  # fmt: skip
        steps = [part for _ in range(5) for part in torch.randperm(1200).split(64)]
        optimizer = torch.optim.AdamW(model.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=len(steps))
        for part in steps:
            loss = nn.functional.cross_entropy(model(images[part]), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return Digits(model.eval(), images[:256], (images[1200:], labels[1200:]))


def test_the_network_has_learned_the_digits(digits: Digits) -> None:
    inputs, labels = digits.evaluation
    with torch.no_grad():
        right = (digits.model(inputs).argmax(1) == labels).float().mean()
    found = compress.evaluate(digits.model, digits.evaluation, against=digits.model)
    assert found.accuracy == pytest.approx(float(right))
    assert found.accuracy > 0.95
    assert (found.kl, found.kl_tokens, found.tokens, found.perplexity) == (0.0, len(inputs), len(inputs), None)


def test_eight_bits_lose_nothing(digits: Digits) -> None:
    row = digits.row(Rtn(bits=8))
    assert row.kl < 1e-3
    assert abs(row.change) <= 2 / len(digits.evaluation[1])
    assert row.bits_per_weight < 9


def test_gptq_is_better_than_rounding_at_three_bits(digits: Digits) -> None:
    rtn, gptq = digits.row(Rtn(bits=3)), digits.row(Gptq(bits=3))
    assert gptq.kl < 0.5 * rtn.kl
    assert gptq.accuracy >= rtn.accuracy


def test_flexround_is_better_than_rounding_at_three_bits(digits: Digits) -> None:
    assert digits.row(FlexRound(bits=3, steps=30)).kl < 0.5 * digits.row(Rtn(bits=3)).kl


def test_a_global_cut_ranks_convolutions_and_linear_layers_together(digits: Digits) -> None:
    result = digits.apply(GlobalMagnitude(sparsity=0.5))
    row = result.report.rows[-1]
    assert row.sparsity == pytest.approx(0.5, abs=1e-3)
    assert row.accuracy > 0.5
    kept, gone = [], []
    for name, weight in result.weights.items():
        before = digits.model.get_submodule(name).weight.detach().abs().reshape(weight.mask.shape)
        kept.append(before[weight.mask].min())
        gone.append(before[~weight.mask].max() if not bool(weight.mask.all()) else torch.zeros(()))
    assert len(kept) == 8
    assert max(gone) <= min(kept)


OTHERS = (
    DepthPass | ExpertsPass | KvCache | MergePass | RecalibrateNorms | Rotate | ScalingPass | WidthPass
)  # they edit no single weight
QUANTIZERS = [cls for cls in PASSES if cls().produces("dense").endswith("quantized")]


@pytest.mark.parametrize(
    "cls",
    only(
        [compress.Codebook, compress.Eora, Gptq, compress.LowRank, compress.SparseGpt],
        [c for c in PASSES if not c.preserves and not issubclass(c, OTHERS | ActivationSparsity)],
    ),
    ids=lambda cls: cls.key,
)
def test_every_pass_works_on_the_network_and_packed_it_computes_the_same(cls: type[Pass], digits: Digits) -> None:
    steps = {"steps": 2} if "steps" in {f.name for f in fields(cls)} and cls().calibrated else {}
    corrects = "dense" not in cls.accepts
    rank = {"rank": 2} if corrects else {}
    result = digits.apply(*([Rtn(bits=3)] if corrects else []), cls(**steps, **rank))
    assert len(result.weights) == 8
    assert {w.kind for w in result.weights.values()} == {cls().produces("quantized" if corrects else "dense")}
    packed = copy.deepcopy(digits.model)
    parts = {name: pack(weight) for name, weight in result.weights.items()}
    replace_modules(packed, {name: Spec.from_json(spec.to_json()) for name, (spec, _) in parts.items()})
    state = {f"{name}.{leaf}": value for name, (_, tensors) in parts.items() for leaf, value in tensors.items()}
    rest = {name: value for name, value in result.model.state_dict().items() if name in packed.state_dict()}
    packed.load_state_dict(rest | state)
    unpack_all(packed)
    with torch.no_grad():
        assert torch.equal(packed(digits.evaluation[0]), result.model(digits.evaluation[0]))
    if cls in QUANTIZERS:
        assert result.report.rows[-1].bytes < 0.35 * result.report.rows[0].bytes
        assert result.report.rows[-1].accuracy > 0.5


def test_every_row_of_the_report_is_measured_as_evaluate_would(digits: Digits) -> None:
    result = digits.apply(GlobalMagnitude(sparsity=0.2), Gptq(bits=4))
    start, *_, last = result.report.rows
    measured = compress.evaluate(result.model, digits.evaluation, against=digits.model)
    assert (last.accuracy, last.kl) == pytest.approx((measured.accuracy, measured.kl))
    assert last.change == pytest.approx(last.accuracy - start.accuracy)
    assert all(row.perplexity is None for row in result.report.rows)


def test_the_gate_on_accuracy_stops_a_run_that_loses_too_much(digits: Digits) -> None:
    lossy = [GlobalMagnitude(sparsity=0.9)]
    with pytest.raises(GateError, match=r"after global_magnitude accuracy is .* points under the original .*max_drop"):
        compress.apply(digits.model, lossy, evaluation=digits.evaluation, max_drop=0.01)
    fine = compress.apply(digits.model, [Rtn(bits=8)], evaluation=digits.evaluation, max_drop=0.01)
    assert fine.report.rows[-1].change >= -0.01


def test_a_fall_of_just_what_the_gate_allows_is_allowed() -> None:
    class Answers(nn.Module):
        """Says class 1 for an input above a half; a weight of zero never does."""

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Linear(1, 1, bias=False)
            self.scale.weight.data.fill_(1.0)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([torch.full_like(x, 0.5), self.scale(x)], 1)

    inputs = torch.zeros(100, 1)
    inputs[:29] = 1.0
    evaluation = (inputs, (inputs[:, 0] > 0.5).long())
    passes = [Rtn(bits=8), compress.Magnitude(sparsity=0.0)]
    compress.apply(Answers(), passes[1:], evaluation=evaluation, max_drop=0.0)

    class Zero(Rtn):
        def run(self, target: Any) -> Any:
            return super().run(type(target)(torch.zeros_like(target.weight)))

    assert compress.apply(Answers(), [Zero()], evaluation=evaluation, max_drop=0.29).report.rows[-1].accuracy == 0.71
    with pytest.raises(GateError, match=r"29\.00 points under the original 100\.00%.* allows 28\.90"):
        compress.apply(Answers(), [Zero()], evaluation=evaluation, max_drop=0.289)


# --- data that cannot be used -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("evaluation", "words"),
    [
        ((torch.zeros(4, 1, 8, 8), torch.zeros(3, dtype=torch.long)), r"labels must be \(4,\) integers"),
        ((torch.zeros(4, 1, 8, 8), torch.zeros(4)), r"labels must be \(4,\) integers"),
        ((torch.zeros(4, 1, 8, 8), torch.full((4,), 10)), r"labels outside 0\.\.9"),
        ((torch.full((4, 1, 8, 8), torch.nan), torch.zeros(4, dtype=torch.long)), "NaN"),
        ((torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.long)), "empty"),
    ],
    ids=["too few", "float", "no such class", "NaN", "empty"],
)
def test_evaluation_data_of_the_wrong_kind_is_said(evaluation: Any, words: str, digits: Digits) -> None:
    with pytest.raises(DataError, match=words):
        compress.apply(digits.model, [Rtn()], evaluation=evaluation)


def test_a_model_that_is_no_classifier_cannot_be_evaluated_as_one() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3))
    with pytest.raises(DataError, match=r"outputs \(samples, classes\) logits; this model outputs \(4, 4, 6, 6\)"):
        compress.apply(model, [Rtn()], evaluation=(torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.long)))


def test_a_classifier_in_training_mode_is_measured_as_it_is_used(digits: Digits) -> None:
    model = copy.deepcopy(digits.model).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert compress.evaluate(model, digits.evaluation) == compress.evaluate(digits.model, digits.evaluation)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items()), "no running mean moved"


def test_a_language_model_has_no_labels(tiny_llama: LlamaForCausalLM, tokens: Tensor) -> None:
    with pytest.raises(DataError, match="without labels"):
        compress.apply(tiny_llama, [Rtn()], evaluation=(tokens, tokens[:, 0]))


@pytest.mark.parametrize(("kind", "gate"), [("image", "max_increase"), ("language", "max_drop")])
def test_the_gate_must_be_of_the_kind_of_the_model(
    kind: str, gate: str, digits: Digits, tiny_llama: LlamaForCausalLM, tokens: Tensor
) -> None:
    model, data = (digits.model, digits.evaluation) if kind == "image" else (tiny_llama, tokens)
    other = "max_drop" if kind == "image" else "max_increase"
    with pytest.raises(ConfigError, match=rf"evaluate\.{gate}: this model is judged by its .*; its gate is {other}"):
        compress.apply(model, [Rtn()], evaluation=data, **{gate: 0.1})


# --- a ResNet of transformers in a folder -----------------------------------------------------------------------------


def make_resnet(**changes: Any) -> ResNetForImageClassification:
    """Random, its running statistics those of data, so that they matter."""
    options = {
        "num_channels": 1, "embedding_size": 8, "hidden_sizes": [8, 12], "depths": [2, 2], "layer_type": "basic",
        "num_labels": CLASSES, **changes,
    }  # fmt: skip
    torch.manual_seed(11)
    model = ResNetForImageClassification(ResNetConfig(**options)).train()
    with torch.no_grad():
        for _ in range(4):
            model(3 * torch.randn(16, 1, 16, 16) + 1)
    return model.eval()


def pictures(count: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(12)
    return torch.randn(count, 1, 16, 16, generator=generator), torch.randint(CLASSES, (count,), generator=generator)


def logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(images).logits
    return found


def load(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForImageClassification.from_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `save_pretrained` writes it; to be read only."""
    folder = tmp_path_factory.mktemp("resnet")
    make_resnet().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "passes",
    [
        [{"rtn": {"bits": 4}}, {"rtn": {"bits": 8, "include": ["*.embedder.convolution", "classifier.1"]}}],
        [{"gptq": {"bits": 3}}],
        pytest.param([{"flexround": {"bits": 3, "steps": 3}}], marks=pytest.mark.real),
        pytest.param([{"global_magnitude": {}}], marks=pytest.mark.real),
    ],
    ids=lambda passes: "+".join(key for p in passes for key in p),
)
def test_a_resnet_is_written_packed_and_loads_in_one_line_with_equal_logits(
    passes: list[dict[str, Any]], resnet: Path, tmp_path: Path
) -> None:
    images, labels = pictures()
    report = compress.run({"passes": passes}, resnet, tmp_path / "out", calibration=images, evaluation=(images, labels))
    assert report.verified["max_logit_difference"] == 0.0
    assert report.fallbacks == [] or "gptq" in passes[0]  # which says what inputs are always zero
    loaded = load(tmp_path / "out")
    assert sum(isinstance(m, PackedConvolution) for m in loaded.modules()) == (9 if len(passes) == 1 else 10)
    pipeline = load_pipeline({"passes": passes})
    result = compress.apply(load(resnet), pipeline.passes, images, evaluation=(images, labels))
    assert torch.equal(logits(loaded, images), logits(result.model, images))
    assert not torch.equal(logits(loaded, images), logits(load(resnet), images))
    for there, here in zip(report.rows, result.report.rows, strict=True):
        assert (there.accuracy, there.kl, there.bytes) == (here.accuracy, here.kl, here.bytes)


def make_vit() -> PreTrainedModel:
    torch.manual_seed(13)
    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=16,
                       patch_size=4, num_channels=1, num_labels=CLASSES, initializer_range=0.3)  # fmt: skip
    return ViTForImageClassification(config).eval()


def make_convnext() -> PreTrainedModel:
    """Its convolutions are depthwise; its blocks are whole stages."""
    torch.manual_seed(13)
    config = ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], num_channels=1, num_labels=CLASSES)
    return ConvNextForImageClassification(config).eval()


@pytest.mark.parametrize(
    ("make", "passes"),
    [
        (make_vit, [Gptq(bits=4), Rtn(bits=8, include=("*.projection", "classifier"))]),
        (make_convnext, [[Gptq(bits=4, exclude=("*.dwconv",)), Rtn(bits=8, include=("*.dwconv",))]]),
    ],
    ids=["ViT", "ConvNext"],
)
def test_other_image_classifiers_give_the_same_numbers_from_their_folder(
    make: Callable[[], PreTrainedModel], passes: list[Any], tmp_path: Path
) -> None:
    make().save_pretrained(tmp_path / "model")
    images, _ = pictures()
    stages = tuple(tuple(p) if isinstance(p, list) else (p,) for p in passes)
    compress.run(compress.Pipeline(passes=stages), tmp_path / "model", tmp_path / "out", calibration=images)
    result = compress.apply(load(tmp_path / "model"), passes, images)
    loaded = load(tmp_path / "out")
    assert {n for n, m in loaded.named_modules() if isinstance(m, PackedModule)} == result.weights.keys()
    assert any(isinstance(m, PackedConvolution) for m in loaded.modules())
    assert torch.equal(logits(loaded, images), logits(result.model, images))


def test_what_is_loaded_lies_in_memory_as_torch_would_put_it(resnet: Path, tmp_path: Path) -> None:
    # A 1x1 convolution of one place sums up in another order when its weight does not begin on a multiple of 32 bytes.
    compress.run({"passes": [{"rtn": {"bits": 3}}]}, resnet, tmp_path / "out")
    with safe_open(tmp_path / "out" / "compress.safetensors", "pt") as opened:
        assert any(opened.get_tensor(name).data_ptr() % 64 for name in opened.keys())  # noqa: SIM118
    assert not [name for name, tensor in load(tmp_path / "out").state_dict().items() if tensor.data_ptr() % 64]


def test_running_statistics_are_written_as_they_were(resnet: Path, tmp_path: Path) -> None:
    compress.run({"passes": ["rtn"]}, resnet, tmp_path / "out")
    before, after = load_file(resnet / "model.safetensors"), load_file(tmp_path / "out" / "compress.safetensors")
    buffers = [name for name in before if name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert len(buffers) == 3 * 10
    assert before["resnet.embedder.embedder.normalization.num_batches_tracked"] == 4
    for name in buffers:
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name], before[name]), name


def test_a_model_that_is_not_float32_gives_the_same_numbers_from_its_folder(tmp_path: Path) -> None:
    make_resnet().bfloat16().save_pretrained(tmp_path / "model")
    images, labels = pictures()
    compress.run({"passes": ["gptq"]}, tmp_path / "model", tmp_path / "out", calibration=images,
                 evaluation=(images, labels))  # fmt: skip
    loaded = load(tmp_path / "out")
    result = compress.apply(load(tmp_path / "model"), [Gptq()], images)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(logits(loaded, images.bfloat16()), logits(result.model, images.bfloat16()))


def test_saving_again_keeps_the_type_of_the_model_even_if_its_first_layer_is_packed(
    resnet: Path, tmp_path: Path
) -> None:
    compress.run({"passes": [{"rtn": {"include": ["*"]}}]}, resnet, tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert loaded.dtype == torch.float32
    loaded.save_pretrained(tmp_path / "again")
    images, _ = pictures()
    again = load(tmp_path / "again")
    assert sum(isinstance(m, PackedModule) for m in again.modules()) == 11
    assert torch.equal(logits(again, images), logits(loaded, images))


def test_residual_blocks_are_the_blocks_and_feed_one_another(resnet: Path) -> None:
    graph = open_model(resnet).artifact.graph
    assert graph.blocks == tuple(f"resnet.encoder.stages.{i}.layers.{j}" for i in (0, 1) for j in (0, 1))
    assert [s.name for s in graph.outside] == ["resnet.embedder.embedder.convolution", "classifier.1"]
    assert graph.is_image_model
    assert not graph.is_language_model


def test_a_block_brings_no_more_into_memory_than_itself(
    resnet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress.engine import sweep

    most = 0
    graph = None
    present = sweep.present

    @contextmanager
    def watched(context: Any, *rest: Any) -> Iterator[None]:
        nonlocal most, graph
        with present(context, *rest):
            graph = context.graph
            most = max(most, sum(p.numel() for p in graph.model.parameters() if not p.is_meta))
            yield

    monkeypatch.setattr(sweep, "present", watched)
    images, _ = pictures()
    compress.run({"passes": ["gptq"]}, resnet, tmp_path / "out", calibration=images)
    assert graph is not None
    sizes = [sum(p.numel() for p in graph.model.get_submodule(b).parameters()) for b in graph.blocks]
    assert most == max(sizes)
    assert all(p.is_meta for p in graph.model.parameters())


def rewritten(resnet: Path, folder: Path, without: str) -> Path:
    """A copy of the folder that lacks the tensors whose name ends like this."""
    folder.mkdir()
    (folder / "config.json").write_text((resnet / "config.json").read_text())
    tensors = {n: t for n, t in load_file(resnet / "model.safetensors").items() if not n.endswith(without)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("leaf", ["running_mean", "running_var"])
def test_a_folder_without_running_statistics_is_refused(leaf: str, resnet: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"10 parameters or buffers of ResNet\w+ are not .*\.{leaf}"):
        open_model(rewritten(resnet, tmp_path / "model", leaf))


def test_a_folder_without_batch_counts_is_fine_and_gets_none(resnet: Path, tmp_path: Path) -> None:
    folder = rewritten(resnet, tmp_path / "model", "num_batches_tracked")
    compress.run({"passes": ["rtn"]}, folder, tmp_path / "out")
    compress.run({"passes": ["rtn"]}, resnet, tmp_path / "whole")
    assert not [n for n in load_file(tmp_path / "out" / "compress.safetensors") if n.endswith("tracked")]
    images, _ = pictures()
    assert torch.equal(logits(load(tmp_path / "out"), images), logits(load(tmp_path / "whole"), images))


def test_running_statistics_that_are_not_finite_are_said(tmp_path: Path) -> None:
    model = make_resnet()
    model.resnet.encoder.stages[1].layers[0].shortcut.normalization.running_var[3] = torch.inf
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(compress.NonFiniteError, match=r"shortcut\.normalization\.running_var"):
        compress.run({"passes": ["rtn"]}, tmp_path / "model", tmp_path / "out")


@pytest.mark.parametrize(("depths", "block"), [([2], "stages.1"), ([2, 1], r"stages\.1\.layers\.1")])
def test_a_configuration_with_fewer_blocks_than_the_files_is_refused(
    depths: list[int], block: str, resnet: Path, tmp_path: Path
) -> None:
    folder = rewritten(resnet, tmp_path / "model", "nothing")
    config = json.loads((folder / "config.json").read_text())
    sizes = config["hidden_sizes"][: len(depths)]
    names = ["stem", *(f"stage{i + 1}" for i in range(len(depths)))]
    config |= {"depths": depths, "hidden_sizes": sizes, "stage_names": names}
    config |= {"out_features": names[-1:], "out_indices": [len(depths)]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"{block}|classifier"):
        open_model(folder)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(4, 3, 16, 16), r"must be \(images, 1, height, width\)"),
        (torch.zeros(4, 16, 16), r"must be \(images, 1, height, width\)"),
        (torch.zeros(4, 1, 16, 16, dtype=torch.uint8), "floating-point numbers, scaled as the model expects"),
    ],
    ids=["channels", "dimensions", "bytes"],
)
def test_images_the_model_cannot_take_are_said(images: Tensor, words: str, resnet: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        compress.run({"passes": ["gptq"]}, resnet, tmp_path / "out", calibration=images)


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images, labels = pictures(20)
    path = tmp_path_factory.mktemp("data") / "pictures.safetensors"
    save_file({"images": images, "labels": labels}, path)
    return path


PIPELINE = """\
calibration: {{source: {file}, samples: 8}}
evaluate: {{source: {file}, samples: 16{gate}}}
passes:
  - gptq: {{bits: {bits}}}
"""


def test_images_from_a_file_compress_a_folder_on_the_command_line(resnet: Path, file: Path, tmp_path: Path) -> None:
    pipeline = write_pipeline(tmp_path / "p.yaml", PIPELINE.format(file=file, gate=", max_drop: 100%", bits=4))
    for command in ("check", "plan"):
        assert compress_command(command, pipeline, resnet).code == 0
    ended = compress_command("run", pipeline, resnet, "-o", tmp_path / "out", "--json")
    assert ended.code == 0, ended.err
    images, labels = pictures(20)
    chosen = [i * 20 // 8 for i in range(8)]
    measured = [i * 20 // 16 for i in range(16)]
    result = compress.apply(
        load(resnet), [Gptq(bits=4)], images[chosen], evaluation=(images[measured], labels[measured])
    )
    assert torch.equal(logits(load(tmp_path / "out"), images), logits(result.model, images))
    row = json.loads(ended.out)["rows"][-1]
    assert (row["accuracy"], row["kl"]) == (result.report.rows[-1].accuracy, result.report.rows[-1].kl)
    again = compress_command("run", tmp_path / "out" / "pipeline.yaml", resnet, "-o", tmp_path / "again")
    assert again.code == 0, again.err
    first, second = ((tmp_path / name / "compress.safetensors").read_bytes() for name in ("out", "again"))
    assert first == second
    ended = compress_command("eval", tmp_path / "out", "--against", resnet, "--source", file, "--samples", 16, "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert (found["accuracy"], found["samples"]) == (row["accuracy"], 16)
    assert found["kl"] == pytest.approx(row["kl"], abs=1e-6)
    shown = compress_command("eval", tmp_path / "out", "--source", file, "--samples", 16)
    assert f"accuracy {row['accuracy']:.2%}, weights" in shown.out
    assert "16 images" in shown.out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "AutoModelForImageClassification.from_pretrained" in card
    assert "| after | accuracy | change | KL |" in card


def test_the_gate_on_accuracy_ends_the_command_with_its_own_code(resnet: Path, file: Path, tmp_path: Path) -> None:
    model = load(resnet)
    images, _ = pictures(20)
    own = tmp_path / "own.safetensors"  # labels that only the original has all right
    save_file({"images": images, "labels": logits(model, images).argmax(1)}, own)
    text = f"evaluate: {{source: {own}, samples: 20, max_drop: 0}}\npasses:\n  - global_magnitude: {{sparsity: 0.98}}\n"
    pipeline = write_pipeline(tmp_path / "p.yaml", text)
    ended = compress_command("run", pipeline, resnet, "-o", tmp_path / "out")
    assert (ended.code, "evaluate.max_drop allows 0.00" in ended.err) == (3, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("calibration: {source: demo}", "calibration.source: demo: ResNetForImageClassification takes images from a"),
        ("evaluate: {source: demo}", "evaluate.source: demo: ResNetForImageClassification takes images from a"),
        ("seed: 0", "for example calibration: {source: images.safetensors, samples: 128}"),
        ("evaluate: {source: nowhere.safetensors}", "no such file: nowhere.safetensors"),
    ],
)
def test_what_an_image_model_cannot_use_is_said_before_any_work(
    line: str, words: str, resnet: Path, tmp_path: Path
) -> None:
    pipeline = write_pipeline(tmp_path / "p.yaml", f"{line}\npasses: [gptq]\n")
    ended = compress_command("check", pipeline, resnet)
    assert ended.code == 2
    assert words in ended.err


def test_a_language_model_takes_no_images(tiny_folder: Path, file: Path, tmp_path: Path) -> None:
    pipeline = write_pipeline(tmp_path / "p.yaml", PIPELINE.format(file=file, gate="", bits=4))
    ended = compress_command("check", pipeline, tiny_folder)
    assert ended.code == 2
    assert "LlamaForCausalLM takes text" in ended.err
    ended = compress_command("eval", tiny_folder, "--source", file, "--samples", 4)
    assert (ended.code, "integer token ids" in ended.err) == (2, True)


@pytest.mark.parametrize(
    ("tensors", "samples", "words"),
    [
        ({"pixels": torch.zeros(4, 1)}, 2, "no tensor `images`; it has pixels"),
        ({"images": torch.zeros(4, 1, 16, 16)}, 2, "give labels"),
        ({"images": torch.zeros(4, 1, 16, 16), "labels": torch.zeros(3)}, 2, r"(3,) labels for 4 images"),
        ({"images": torch.zeros(4, 1, 16, 16), "labels": torch.zeros(4).long()}, 5, "holds 4 images; 5 were asked for"),
        (None, 2, "cannot be read"),
    ],
    ids=["no images", "no labels", "too few labels", "too few images", "damaged"],
)
def test_a_file_without_what_is_needed_is_said(
    tensors: dict[str, Tensor] | None, samples: int, words: str, resnet: Path, tmp_path: Path
) -> None:
    path = tmp_path / "data.safetensors"
    if tensors is None:
        path.write_bytes(b"not one")
    else:
        save_file(tensors, path)
    ended = compress_command("eval", resnet, "--source", path, "--samples", samples)
    assert ended.code == 2
    assert words in ended.err


def test_the_example_of_the_documentation_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parent.parent / "docs" / "images.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    exec(compile(example, "images.md", "exec"), {})
    assert capsys.readouterr().out == "['original', 'gptq'] ['0', '3', '6']\n"


# --- the report -------------------------------------------------------------------------------------------------------


def test_a_report_written_before_there_was_accuracy_is_still_read() -> None:
    old = {"name": "rtn", "perplexity": 2.0, "change": 0.1, "kl": 0.0, "bytes": 1, "bits_per_weight": 4.0,
           "sparsity": 0.0, "seconds": 1.0, "peak_mb": 1.0}  # fmt: skip
    report = Report("m", [Row(**old)], {"source": "demo", "windows": 1, "length": 2, "tokens": 1})
    assert headings(report)[1] == "perplexity"
    assert "| rtn | 2.000 | +10.00% |" in markdown(report)


def test_the_table_of_a_classifier_shows_points_of_accuracy(digits: Digits) -> None:
    report = digits.apply(Rtn(bits=2)).report
    row = report.rows[-1]
    assert headings(report)[1] == "accuracy"
    assert f"| rtn | {row.accuracy:.2%} | {100 * row.change:+.2f} points |" in markdown(report)
    assert caption(report) == "accuracy on given from Python, 597 samples; KL on 597 of them"


def test_a_quality_of_tokens_is_what_it_was() -> None:
    assert Quality(2.0, 10) == Quality(perplexity=2.0, tokens=10, kl=None, kl_tokens=0, accuracy=None)


def test_a_graph_lists_every_tensor_a_checkpoint_holds() -> None:
    model = make_resnet()
    assert [name for name, _ in graphs.find(model).tensors()] == [
        *(name for name, _ in model.named_parameters()),
        *(name for name, _ in model.named_buffers()),
    ]


@pytest.mark.parametrize("name", only(["gptq"], ["gptq", "flexround"]))
def test_blocks_in_lists_of_lists_are_found_and_a_model_of_several_stages_is_compressed(
    name: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = PvtConfig(
        image_size=32, num_encoder_blocks=2, depths=[2, 1], hidden_sizes=[16, 32], num_attention_heads=[1, 2],
        sequence_reduction_ratios=[2, 1], patch_sizes=[4, 2], strides=[4, 2], mlp_ratios=[2, 2], num_labels=CLASSES,
    )  # fmt: skip
    model = PvtForImageClassification(config).eval()
    found = graphs.find(model)
    assert [b for b in found.blocks if ".block." in b] == [f"pvt.encoder.block.{i}" for i in ("0.0", "0.1", "1.0")]
    model.save_pretrained(tmp_path / "model")
    images = torch.rand(4, 3, 32, 32)
    options = {"steps": 2, "exclude": ["*patch_embeddings*"]} if name == "flexround" else {}
    steps = {"passes": [{name: {"bits": 4, **options}}]}
    data = {"calibration": images, "evaluation": (images, torch.arange(4))}
    report = compress.run(steps, tmp_path / "model", tmp_path / "out", **data)
    assert report.verified["max_logit_difference"] == 0
    assert {s.name for s in found.sites if ".block." in s.name} <= report.layers.keys()


def test_images_may_have_more_numbers_than_a_text_has_positions(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**sizes, "vocab_size": 32, "max_position_embeddings": 8},
        vision_config={**sizes, "image_size": 16, "patch_size": 8}, projection_dim=16,
    )  # fmt: skip
    CLIPForImageClassification(config).save_pretrained(tmp_path / "model")
    images = torch.rand(4, 3, 16, 16)
    steps = {"passes": [{"gptq": {"bits": 4}}]}
    report = compress.run(
        steps, tmp_path / "model", tmp_path / "out", calibration=images, evaluation=(images, torch.arange(4) % 2)
    )
    assert report.verified["max_logit_difference"] == 0
