"""Sources of whose tensors some entries are gone, sums of several, or made anew: read whole or in pieces."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from expert_models import make_mixture
from torch import Tensor, nn

from compress.checkpoint import cut
from compress.checkpoint.artifact import Artifact
from compress.checkpoint.cut import CutSource
from compress.checkpoint.remade import settled
from compress.checkpoint.sources import ChangedSource, ModuleSource, Source
from compress.encodings import Weight
from compress.models.cuts import Blend, Cut, Part
from compress.models.graph import find


@pytest.mark.parametrize("whole", [0, 1 << 16], ids=["entry by entry", "at once"])
def test_a_cut_tensor_is_read_whole_or_in_pieces(whole: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cut, "WHOLE", whole)
    module = nn.Module()
    module.a = nn.Parameter(torch.arange(5 * 2 * 3).float().view(5, 2, 3))
    module.b = nn.Parameter(torch.arange(2 * 5).bfloat16().view(2, 5))
    module.c = nn.Parameter(torch.arange(4.0))
    source = CutSource(ModuleSource(module), {"a": Cut(0, (0, 3, 4), (3, 2, 3)), "b": Cut(1, (1, 4), (2, 2))})
    expected = {"a": module.a[[0, 3, 4]], "b": module.b[:, [1, 4]], "c": module.c}
    for name, value in expected.items():
        assert source.shape(name) == tuple(value.shape)
        read = source.read(name)
        assert torch.equal(read, value)
        assert read.dtype == value.dtype
        for start in range(value.numel()):
            for stop in range(start + 1, value.numel() + 1):
                assert torch.equal(source.piece(name, start, stop), value.flatten()[start:stop])
    assert list(source.names()) == ["a", "b", "c"]


def test_sums_of_entries_are_read_whole_or_in_pieces() -> None:
    module = nn.Module()
    module.a = nn.Parameter(torch.arange(4 * 2 * 3).float().view(4, 2, 3))
    module.b = nn.Parameter(torch.arange(4.0).bfloat16())
    swapped = {"a": ((1, torch.tensor([2, 1, 0])),)}
    parts = {0: (Part(0, 0.25, 0.5), Part(2, 0.75, 0.5, swapped))}
    cuts = {
        "a": Blend(0, (0, 1, 3), (3, 2, 3), parts, "a"),
        "b": Blend(0, (0, 1, 3), (3,), parts),
    }
    source = CutSource(ModuleSource(module), cuts)
    a, b = module.a.detach(), module.b.detach()
    expected = {
        "a": torch.stack([0.25 * a[0] + 0.75 * a[2].flip(-1), a[1], a[3]]),
        "b": torch.tensor([1.0, 1.0, 3.0]).bfloat16(),
    }
    assert torch.equal(b, torch.tensor([0.0, 1, 2, 3]).bfloat16())
    for name, value in expected.items():
        assert torch.equal(source.read(name), value)
        assert source.read(name).dtype == value.dtype
        assert torch.equal(cuts[name].of(module.get_parameter(name).detach()), value)
        for start in range(value.numel()):
            for stop in range(start + 1, value.numel() + 1):
                assert torch.equal(source.piece(name, start, stop), value.flatten()[start:stop])


class Counted(ChangedSource):
    """A source that counts the elements that are read."""

    def __init__(self, before: Source):
        super().__init__(before)
        self.count = 0

    def read(self, name: str) -> Tensor:
        value = super().read(name)
        self.count += value.numel()
        return value

    def piece(self, name: str, start: int, stop: int) -> Tensor:
        self.count += stop - start
        return super().piece(name, start, stop)


def pieces(source: Source, name: str, size: int) -> Iterator[Tensor]:
    count = torch.Size(source.shape(name)).numel()
    return (source.piece(name, start, min(start + size, count)) for start in range(0, count, size))


@pytest.mark.parametrize("part", [Cut(1, (1, 4, 5), (6, 3)), Cut(0, (0, 2, 5), (3, 8)),
                                  Blend(1, (0, 3), (6, 2), {0: (Part(0, 0.5, 0.5), Part(1, 0.5, 0.5))})])  # fmt: skip
def test_pieces_of_a_cut_tensor_read_hardly_more_than_they_are_made_of(part: Cut) -> None:
    module = nn.Module()
    module.a = nn.Parameter(torch.randn(6, 8))
    counted = Counted(ModuleSource(module))
    source = CutSource(counted, {"a": part})
    assert torch.equal(torch.cat(list(pieces(source, "a", part.shape[1]))).view(part.shape), part.of(module.a.detach()))
    assert counted.count <= module.a.numel()


def test_what_passes_made_is_read_once_piece_by_piece_and_experts_one_by_one() -> None:
    model = make_mixture("Mixtral")
    artifact = Artifact(find(model), ModuleSource(model))
    made = {s.name: Weight(torch.randn(s.shape)) for s in artifact.graph.sites if s.block == 1}
    artifact.committed.update(made)
    asked: list[str] = []

    class Watched(Artifact):
        def tensor(self, name: str) -> Tensor:
            asked.append(name)
            return super().tensor(name)

    watched = Watched(artifact.graph, artifact.source, committed=artifact.committed)
    after = settled(watched)
    assert not after.committed
    for site in artifact.graph.sites:
        assert torch.equal(after.original(site), made[site.name].dequantize() if site.name in made else
                           artifact.original(site))  # fmt: skip
    experts = [name for name in asked if "experts" in name]
    assert not experts, "a fused parameter is never put together for one of its experts"
    asked.clear()
    name = "model.layers.1.self_attn.q_proj.weight"
    whole = torch.cat(list(pieces(after.source, name, 100)))
    assert torch.equal(whole, made[name.removesuffix(".weight")].dequantize().flatten())
    assert asked == [name], "once"
    assert torch.equal(after.source.read("model.layers.0.self_attn.q_proj.weight"),
                       model.get_parameter("model.layers.0.self_attn.q_proj.weight"))  # fmt: skip


def test_what_is_masked_or_quantized_keeps_its_original() -> None:
    model = make_mixture("Mixtral")
    artifact = Artifact(find(model), ModuleSource(model))
    dense, masked = (s for s in artifact.graph.sites[:3] if "self_attn" in s.name and s.name[-6] in "qk")
    mask = torch.rand(masked.shape) > 0.5
    values = torch.randn(masked.shape)
    artifact.committed.update({dense.name: Weight(values[: dense.shape[0]]), masked.name: Weight(values * mask, mask)})
    artifact = replace(artifact, restated={masked.name: Weight(values)})
    after = settled(artifact)
    assert list(after.committed) == [masked.name]
    assert torch.equal(after.original(masked), values)
    assert torch.equal(after.original(dense), values[: dense.shape[0]])
    assert settled(after) is after, "nothing more to settle"
