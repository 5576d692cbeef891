"""Statistics of batch norms counted again: what torch counts, what it is good for, and where they are kept."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification

import compress
from compress import Average, Magnitude, RecalibrateNorms, WeightMatching
from compress.config.options import errors_in
from compress.engine import norms_stage
from compress.errors import ConfigError, DataError, NonFiniteError

pytestmark = pytest.mark.usefixtures("one_thread")


def network() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        *(nn.Dropout(0.5), nn.Linear(32, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 10)),
    )


def images(count: int = 50, seed: int = 0) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def statistics_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if "running_" in name}


@torch.no_grad()
def counted(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """What torch counts: batch norms in training, the mean of all batches."""
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
            module.train()
    for batch in batches:
        model(batch)
    return statistics_of(model)


def saved(folder: Path, model: nn.Module) -> str:
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def test_statistics_of_a_merge_are_those_that_torch_counts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first, second = network().eval(), network().eval()
    data = images()
    passes = [Average(models=(saved(tmp_path / "second", second),)), RecalibrateNorms(batch_size=16)]
    merged = compress.apply(first, passes[:1]).model
    result = compress.apply(first, passes, calibration=data)
    wanted = counted(merged, list(data.tensor_split(4)))
    found = statistics_of(result.model)
    assert len(wanted) == 6
    for name, value in wanted.items():
        assert torch.allclose(found[name], value, rtol=1e-5, atol=1e-6), name
        assert not torch.allclose(found[name], merged.state_dict()[name], rtol=0.05), name
    rest = merged.state_dict().keys() - wanted.keys()
    assert all(torch.equal(result.model.state_dict()[n], merged.state_dict()[n]) for n in rest)
    assert not any(module.training for module in result.model.modules())
    assert [module.momentum for module in result.model.modules() if hasattr(module, "momentum")] == [0.1] * 3
    (facts,) = result.report.norms
    assert facts["pass"] == "recalibrate_norms"
    assert list(facts["layers"]) == ["1", "5", "11"]
    assert all(each["batches"] == 4 and each["moved"] > 0.01 for each in facts["layers"].values())


def test_what_is_left_out_keeps_its_statistics_and_normalizes_by_them() -> None:
    torch.manual_seed(0)
    model, data = network().eval(), images()
    result = compress.apply(model, [RecalibrateNorms(exclude=("5",), batch_size=25)], calibration=data)
    found = statistics_of(result.model)
    assert torch.equal(found["5.running_mean"], model[5].running_mean)
    frozen = copy.deepcopy(model)
    for i in (1, 11):
        frozen[i].reset_running_stats()
        frozen[i].momentum = None
        frozen[i].train()
    with torch.no_grad():
        for batch in data.tensor_split(2):
            frozen(batch)
    for name, value in statistics_of(frozen).items():
        assert torch.allclose(found[name], value, rtol=1e-5, atol=1e-6), name


def test_networks_trained_apart_are_good_again_only_with_statistics_of_their_merge(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    inputs, labels = (torch.tensor(part)[order] for part in load_digits(return_X_y=True))
    inputs = inputs.float().view(-1, 1, 8, 8) / 16

    def trained(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model, generator = network(), torch.Generator().manual_seed(seed)
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(8):
            for batch in torch.randperm(1400, generator=generator).split(100):
                optimizer.zero_grad()
                functional.cross_entropy(model(inputs[batch]), labels[batch]).backward()
                optimizer.step()
        return model.eval()

    @torch.no_grad()
    def loss(model: nn.Module) -> float:
        return float(functional.cross_entropy(model(inputs[1400:]), labels[1400:]))

    first, second = trained(0), trained(1)
    matching = WeightMatching(models=(saved(tmp_path / "other", second),))
    before = loss(compress.apply(first, [matching]).model)
    repaired = compress.apply(first, [matching, RecalibrateNorms()], calibration=inputs[:1400]).model
    after = loss(repaired)
    assert after < before / 1.5
    pruned = [Magnitude(sparsity=0.5)]
    before = loss(compress.apply(first, pruned).model)
    after = loss(compress.apply(first, [*pruned, RecalibrateNorms()], calibration=inputs[:1400]).model)
    assert after < before / 2


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder with a model, and a file of images."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 4}
    folder = tmp_path_factory.mktemp("resnet")
    ResNetForImageClassification(ResNetConfig(**sizes, layer_type="basic")).save_pretrained(folder / "model")
    save_file({"images": torch.rand(20, 3, 16, 16) + 1}, folder / "images.safetensors")
    return folder / "model", folder / "images.safetensors"


def test_statistics_are_written_reload_and_a_run_goes_on_where_it_ended(
    resnet: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, file = resnet
    data = {"calibration": {"source": str(file), "samples": 20}, "evaluate": {"source": str(file), "samples": 8}}
    steps = {**data, "passes": [{"magnitude": {"sparsity": 0.5}}, {"recalibrate_norms": {"batch_size": 10}}]}
    report = compress.run(steps, model, tmp_path / "out")
    pruned = compress.run({**data, "passes": steps["passes"][:1]}, model, tmp_path / "pruned")
    assert len(pruned.norms) == 0
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "pruned")
    inputs = load_file(file)["images"]
    wanted = counted(loaded, list(inputs.tensor_split(2)))
    found = statistics_of(AutoModelForImageClassification.from_pretrained(tmp_path / "out"))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-5), name
    assert json.loads((tmp_path / "out" / "report.json").read_text())["norms"] == report.norms
    assert len(report.norms[0]["layers"]) == len(wanted) // 2

    def stop(*_: Any) -> None:
        raise AssertionError("counted twice")

    last = {**steps, "passes": [*steps["passes"], {"rtn": {"bits": 4}}]}
    with monkeypatch.context() as patched:
        patched.setattr("compress.engine.block_stage.run_passes", stop)
        with pytest.raises(AssertionError, match="counted twice"):
            compress.run({**last, "passes": last["passes"][1:]}, model, tmp_path / "resumed")
    monkeypatch.setattr(norms_stage, "_moments", stop)
    resumed = compress.run({**last, "passes": last["passes"][1:]}, model, tmp_path / "resumed")
    assert len(resumed.norms[0]["layers"]) == len(wanted) // 2


def test_passes_behind_it_see_the_new_statistics_and_keep_them() -> None:
    torch.manual_seed(0)
    model, data = network().eval(), images()
    passes = [Magnitude(sparsity=0.5), RecalibrateNorms()]
    alone = statistics_of(compress.apply(model, passes, calibration=data).model)
    for behind in (compress.Gptq(bits=4), compress.PerpReconstruct(steps=2), compress.Perp(steps=2)):
        found = statistics_of(compress.apply(model, [*passes, behind], calibration=data).model)
        assert all(torch.equal(value, found[name]) for name, value in alone.items()), behind.key


def test_what_cannot_be_counted_is_refused() -> None:
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    data = torch.randn(8, 4)
    with pytest.raises(ConfigError, match="a Sequential has no batch norm with running statistics"):
        compress.apply(plain, [RecalibrateNorms()], calibration=data)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    with pytest.raises(ConfigError, match="'norm' matches no batch norm; batch norms are named like 1"):
        compress.apply(model, [RecalibrateNorms(include=("norm",))], calibration=data)
    with pytest.raises(ConfigError, match="leave no batch norm to count again"):
        compress.apply(model, [RecalibrateNorms(exclude=("1",))], calibration=data)
    with pytest.raises(ConfigError, match="recalibrate_norms learns from data, and `calibration:` is missing"):
        compress.apply(model, [RecalibrateNorms()])
    with pytest.raises(DataError, match="a batch of 1 samples has one value of a channel"):
        compress.apply(model, [RecalibrateNorms()], calibration=data[:1])
    with pytest.raises(NonFiniteError, match="1: what arrives at it is NaN or infinite"):
        compress.apply(model, [RecalibrateNorms()], calibration=data * 1e37)
    assert not model[1].training
    assert [e.option for e in errors_in(RecalibrateNorms(batch_size=1))] == ["batch_size"]


def test_a_norm_that_nothing_reaches_keeps_its_statistics_and_the_report_says_so() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.spare = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.a(x))

    result = compress.apply(Spare().eval(), [RecalibrateNorms()], calibration=torch.randn(8, 4))
    assert torch.equal(result.model.spare.running_mean, torch.zeros(4))
    assert int(result.model.spare.num_batches_tracked) == 0
    assert result.report.fallbacks == ["spare: the calibration data never reach it, so it keeps its statistics"]
