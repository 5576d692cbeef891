"""The properties of weight matching: what is free, what is recovered, and what becomes of the loss between networks."""

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from children import contents
from safetensors.torch import save_file
from selection import only
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
)

import compress
from compress import WeightMatching
from compress.config.options import errors_in
from compress.engine import block_stage
from compress.errors import ConfigError
from compress.models import graph
from compress.models.families.llama import GatedDecoder
from compress.models.graph import Graph
from compress.models.symmetry import Place, Units
from compress.passes.merge import orders as orders_of_units
from compress.passes.merge.orders import Order, arranged, coupled, moves
from compress.passes.merge.permutation import Alignment, align_units, assigned, match
from compress.planning import memory

pytestmark = pytest.mark.usefixtures("one_thread")


def text(kind: str, **options: object) -> nn.Module:
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 32,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
    }
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**sizes, **options}))


def vit() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    return AutoModelForImageClassification.from_config(
        AutoConfig.for_model("vit", **sizes, image_size=16, patch_size=4)
    )


def resnet(kind: str) -> nn.Module:
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], layer_type=kind, num_labels=4)
    )


def head(auto: Any, kind: str, **options: object) -> nn.Module:
    """A model with another head."""
    return auto.from_config(text(kind, **options).config)


def sequence() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, bias=False), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 5)),
    )


class Residual(nn.Module):
    """Channels by themselves, a stream that is added to, a view for flatten, functions for modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.alone = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.into, self.back = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.wide, self.last = nn.Linear(16 * 16, 24), nn.Linear(24, 5)
        self.scaled = nn.LayerNorm(24)

    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        x = functional.max_pool2d(functional.relu(self.norm(self.first(x))), 2)
        x = x + self.back(torch.relu(self.into(self.alone(x))))
        x = functional.avg_pool2d(x, 2)
        x = self.scaled(self.wide(x.view(x.size(0), -1)).relu())
        return self.last(x) if scale is None else self.last(x) * scale


FAMILIES: dict[str, tuple[Callable[[], nn.Module], list[int]]] = {
    **{kind: (lambda kind=kind: text(kind), [2, 24, 2, 24]) for kind in GatedDecoder.code},
    "one group": (lambda: text("llama", num_key_value_heads=1, attention_bias=True, mlp_bias=True), [1, 24, 1, 24]),
    "no groups": (lambda: text("llama", num_key_value_heads=4), [4, 24, 4, 24]),
    "gpt2": (lambda: text("gpt2", n_embd=32, n_head=4, n_inner=24), [4, 24, 4, 24]),
    "gpt_neox": (lambda: text("gpt_neox", num_key_value_heads=None), [4, 24, 4, 24]),
    "opt": (lambda: text("opt", ffn_dim=24, word_embed_proj_dim=32), [24, 4, 24, 4]),
    "bert": (lambda: text("bert", is_decoder=True), [24, 4, 24, 4]),
    "roberta": (lambda: text("roberta", is_decoder=True), [24, 4, 24, 4]),
    "vit": (vit, [4, 24, 4, 24]),
    "resnet": (lambda: resnet("basic"), [16, 16, 32, 32]),
    "bottlenecks": (lambda: resnet("bottleneck"), [4, 4, 4, 4, 8, 8, 8, 8]),
    "sequence": (sequence, [8, 12, 16]),
    "residual": (Residual, [16, 8, 24]),
}
each_family = pytest.mark.parametrize("family", FAMILIES)


def made(family: str, seed: int = 3) -> nn.Module:
    return filled(FAMILIES[family][0], seed)


def filled(build: Callable[[], nn.Module], seed: int = 3) -> nn.Module:
    """A network none of whose tensors is constant."""
    torch.manual_seed(seed)
    model = build().eval()
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if value.is_floating_point() and value.dim() == 1:
                value.copy_(torch.rand(value.shape) + 0.5 if "var" in name else torch.randn(value.shape))
            elif value.is_floating_point() and isinstance(model, PreTrainedModel):
                value.mul_(5)
    return model


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    if not hasattr(model, "config"):
        found: Tensor = model(torch.randn(3, 3, 16, 16, generator=generator))
    elif model.main_input_name == "pixel_values":
        found = model(pixel_values=torch.randn(3, 3, 16, 16, generator=generator)).logits
    else:
        tokens = torch.randint(64, (2, 12), generator=generator)
        read = {"encoder_hidden_states": torch.randn(2, 5, 32, generator=generator)}  # what an encoder put out
        more = read if getattr(model.config, "add_cross_attention", False) else {}
        found = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), **more).logits
    return found


def at_random(units: Units, generator: torch.Generator) -> Order:
    inner = (tuple(at_random(each, generator) for each in units.inner) for _ in range(units.count))
    return Order(torch.randperm(units.count, generator=generator), tuple(inner) if units.inner else ())


def permuted(values: Mapping[str, Tensor], units: tuple[Units, ...], seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    orders = [(each, at_random(each, generator)) for each in units]
    return {name: arranged(v, moves(name, v.shape, orders)).clone() for name, v in values.items()}


def tied_to(found: Graph, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values of a model, with those of parameters that are tied to another taken from there."""
    return {name: values[found.tied.get(name, name)] for name in values}


def values_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


# --- what is free -----------------------------------------------------------------------------------------------------


# What the channels of a residual stream are counted by, with all that is between the stream and the outputs.
STREAMS: dict[str, tuple[Callable[[], nn.Module], list[int]]] = {
    **{kind: (FAMILIES[kind][0], [32]) for kind in (*GatedDecoder.code, "one group", "gpt2", "gpt_neox", "opt", "vit")},
    "tied llama": (lambda: text("llama", tie_word_embeddings=True), [32]),
    "untied gpt2": (lambda: text("gpt2", n_embd=32, n_head=4, n_inner=24, tie_word_embeddings=False), [32]),
    "projected opt": (lambda: text("opt", ffn_dim=24, word_embed_proj_dim=16), [16, 32]),
    "bert": (lambda: text("bert", is_decoder=True), [32]),
    "masked bert": (lambda: head(AutoModelForMaskedLM, "bert"), [32]),
    "untied bert": (lambda: head(AutoModelForMaskedLM, "bert", tie_word_embeddings=False), [32, 32]),
    "masked roberta": (lambda: head(AutoModelForMaskedLM, "roberta"), [32]),
    "bert classifier": (lambda: head(AutoModelForSequenceClassification, "bert"), [32, 32]),
    "roberta classifier": (lambda: head(AutoModelForSequenceClassification, "roberta"), [32, 32]),
    "bert tagger": (lambda: head(AutoModelForTokenClassification, "bert"), [32]),
    "llama classifier": (lambda: head(AutoModelForSequenceClassification, "llama"), [32]),
}


@pytest.mark.parametrize("kind", only(["tied llama"], STREAMS))
def test_the_residual_stream_in_another_order_computes_the_same_and_is_recovered_exactly(kind: str) -> None:
    build, counts = STREAMS[kind]
    model = filled(build)
    found = graph.find(model)
    units = found.units(residual=True)
    stream = units[len(found.units()) :]
    assert [each.count for each in stream] == counts
    ours, before = values_of(model), outputs(model)
    for moved in (stream, units):  # by itself, and with neurons and heads
        theirs = permuted(ours, moved)
        model.load_state_dict(tied_to(found, theirs))
        assert torch.allclose(outputs(model), before, rtol=1e-4, atol=1e-4)
        matrices = [name for name, value in theirs.items() if value.dim() > 1 and not torch.equal(value, ours[name])]
        assert len(matrices) > 0.9 * sum(value.dim() > 1 for value in theirs.values())
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            back = align_units(units, ours.__getitem__, theirs.__getitem__, generator, 100)
            assert back.before > 0
            assert back.after == 0, seed
            for name, _ in found.tensors():
                assert torch.equal(arranged(theirs[name], back.moves.get(name, ())), ours[name]), name


@pytest.mark.parametrize("kind", only(["bert"], ["bert", "roberta"]))
def test_cross_attention_reads_another_stream_whose_order_is_not_free(kind: str) -> None:
    model = filled(lambda: text(kind, is_decoder=True, add_cross_attention=True))
    found = graph.find(model)
    units = found.units(residual=True)
    stream = units[len(found.units()) :]
    assert [each.count for each in stream] == [32]
    ours, before = values_of(model), outputs(model)
    for moved in (stream, units):
        theirs = permuted(ours, moved)
        model.load_state_dict(tied_to(found, theirs))
        assert torch.allclose(outputs(model), before, rtol=1e-4, atol=1e-4)
        back = align_units(units, ours.__getitem__, theirs.__getitem__, torch.Generator().manual_seed(0), 100)
        assert back.before > back.after == 0


def test_a_stream_that_is_not_known_in_full_or_that_comes_out_keeps_its_order() -> None:
    class Shifted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).roll(1, -1)

    own, more = text("llama"), text("llama")
    own.model.layers[1].mlp.down_proj.__class__ = Shifted
    more.model.extra = nn.Linear(32, 32)
    without_head = vit()
    without_head.classifier = nn.Identity()
    kept = {
        "code of its own": own,
        "a layer more": more,
        "no head": text("llama").model,
        "no classifier": without_head,
        "another attention": text("gpt2", n_embd=32, n_head=4, n_inner=24, add_cross_attention=True),
        "a classifier of patches": AutoModelForMaskedImageModeling.from_config(vit().config),
    }
    for what, model in kept.items():
        found = graph.find(model)
        assert len(found.units(residual=True)) == len(found.units()) > 0, what
    assert len(graph.find(text("llama")).units(residual=True)) == 5


@each_family
def test_another_order_computes_the_same_and_is_recovered_exactly(family: str) -> None:
    model = made(family)
    units = graph.find(model).units()
    assert [each.count for each in units] == FAMILIES[family][1]
    ours, before = values_of(model), outputs(model)
    theirs = permuted(ours, units)
    model.load_state_dict(theirs)
    assert torch.allclose(outputs(model), before, rtol=1e-4, atol=1e-4)
    changed = [name for name, value in theirs.items() if not torch.equal(value, ours[name])]
    assert len(changed) >= 2 * len(units)
    found = align_units(units, ours.__getitem__, theirs.__getitem__, torch.Generator().manual_seed(0), 100)
    assert found.before > 0
    assert found.after == 0
    for name, value in theirs.items():
        assert torch.equal(arranged(value, found.moves.get(name, ())), ours[name]), name


def test_without_rotary_positions_queries_and_keys_are_free_within_a_head() -> None:
    for family, within in (("gpt2", [8, 8]), ("opt", [8, 8]), ("gpt_neox", [8]), ("llama", [2, 8]), ("no groups", [8])):
        heads = next(each for each in graph.find(made(family)).units() if each.inner)
        assert [each.count for each in heads.inner] == within, family


def test_what_a_trace_does_not_know_keeps_its_order() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    class Softmax(Own):
        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.relu(self.b(torch.softmax(self.a(x), -1).roll(1, -1))))

    class Twice(Own):
        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.relu(self.b(torch.relu(self.b(torch.relu(self.a(x)))))))

    class Read(Own):
        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.relu(self.b(torch.relu(self.a(x))))) + self.a.weight.sum(0)[:4]

    class Branches(Own):
        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(x)) if x.sum() > 0 else self.c(self.b(self.a(x)))

    def free(model: nn.Module) -> list[set[str]]:
        return [each.tensors() for each in graph.find(model).units()]

    behind = {"b.weight", "b.bias", "c.weight"}
    assert free(Softmax()) == [behind]
    assert free(Twice()) == []
    assert free(Read()) == [behind]
    assert free(Branches()) == []


def test_tied_layers_share_one_order() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 4)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.relu(self.a(x))) + self.c(torch.tanh(self.b(x)))

    (units,) = graph.find(Tied()).units()
    assert units.tensors() == {"a.weight", "a.bias", "b.bias", "c.weight"}


# --- how it is found --------------------------------------------------------------------------------------------------


def two(build: Callable[[], nn.Module]) -> tuple[list[Units], dict[str, Tensor], dict[str, Tensor]]:
    a, b = filled(build, 3), filled(build, 4)
    units = list(graph.find(a).units(residual=True))
    ours, theirs = ({n: v.double() for n, v in values_of(model).items()} for model in (a, b))
    return units, ours, theirs


@pytest.mark.parametrize(
    "build", [*(FAMILIES[f][0] for f in ("sequence", "residual", "llama", "gpt2", "resnet")), STREAMS["masked bert"][0]]
)
def test_no_step_agrees_less_than_the_one_before(build: Callable[[], nn.Module]) -> None:
    units, ours, theirs = two(build)
    for group in coupled(units):
        found = match(group, ours, theirs, torch.Generator().manual_seed(0))
        assert len(found.agreement) > 1
        assert all(b > a for a, b in itertools.pairwise(found.agreement))
        orders = list(zip(group, found.orders, strict=True))
        names = {p.tensor for each in group for p in each.places if p.counts}
        placed = sum(float((ours[n] * arranged(theirs[n], moves(n, theirs[n].shape, orders))).sum()) for n in names)
        assert placed == pytest.approx(found.agreement[-1])


def test_one_hidden_layer_is_solved_in_one_sweep_and_at_its_best() -> None:
    index = torch.arange(5)[:, None]
    units = Units((Place("up", 0, index), Place("bias", 0, index), Place("down", 1, index)))
    generator = torch.Generator().manual_seed(2)
    ours, theirs = (
        {n: torch.randn(s, generator=generator).double() for n, s in (("up", (5, 3)), ("bias", (5,)), ("down", (2, 5)))}
        for _ in range(2)
    )
    once = match([units], ours, theirs, generator, sweeps=1)
    assert torch.equal(once.orders[0].units, match([units], ours, theirs, generator).orders[0].units)

    def agreement(order: tuple[int, ...]) -> float:
        p = list(order)
        return float(
            (ours["up"] * theirs["up"][p]).sum()
            + (ours["bias"] * theirs["bias"][p]).sum()
            + (ours["down"] * theirs["down"][:, p]).sum()
        )

    assert once.agreement[-1] == pytest.approx(max(agreement(p) for p in itertools.permutations(range(5))))


def test_units_along_both_axes_of_a_matrix_are_swept_until_none_gains() -> None:
    index = torch.arange(12)[:, None]
    units = Units((Place("square", 0, index), Place("square", 1, index), Place("read", 1, index)))
    gained = 0
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        ours, theirs = (
            {n: torch.randn(s, 12, generator=generator).double() for n, s in (("square", 12), ("read", 3))}
            for _ in range(2)
        )
        once, found = (match([units], ours, theirs, torch.Generator(), sweeps=sweeps) for sweeps in (1, 100))
        again = assigned(units, ours, theirs, torch.Generator(), 1, found.orders[0])
        placed = [
            sum(float((ours[n] * arranged(theirs[n], moves(n, theirs[n].shape, [(units, order)]))).sum()) for n in ours)
            for order in (found.orders[0], again)
        ]
        assert placed[0] == pytest.approx(found.agreement[-1])
        assert placed[1] <= placed[0] + 1e-9
        gained += found.agreement[-1] > once.agreement[-1] + 1e-9
    assert gained


def test_heads_are_matched_by_the_best_order_within_each_pair() -> None:
    units, ours, theirs = two(FAMILIES["no groups"][0])
    heads = units[0]
    found = assigned(heads, ours, theirs, torch.Generator(), 10)
    names = {p.tensor for p in heads.places}

    def agreement(order: Order) -> float:
        return sum(
            float((ours[n] * arranged(theirs[n], moves(n, theirs[n].shape, [(heads, order)]))).sum()) for n in names
        )

    best = agreement(found)
    generator, four = torch.Generator(), range(4)
    pairs = [[match(heads.inner, *blocks_of(heads, ours, theirs, i, j), generator) for j in four] for i in four]
    for chosen in itertools.permutations(range(4)):
        within = tuple(pairs[i][j].orders for i, j in enumerate(chosen))
        assert agreement(Order(torch.tensor(chosen), within)) <= best + 1e-9


def blocks_of(
    heads: Units, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], i: int, j: int
) -> list[dict[str, Tensor]]:
    within = {p.tensor for each in heads.inner for p in each.places}
    return [
        {p.tensor: model[p.tensor].index_select(p.axis, p.index[k]) for p in heads.places if p.tensor in within}
        for model, k in ((ours, i), (theirs, j))
    ]


def test_what_does_not_fit_in_memory_is_read_again_and_the_same_orders_are_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    units, ours, theirs = two(FAMILIES["llama"][0])
    reads: list[str] = []

    def read(name: str) -> Tensor:
        reads.append(name)
        return theirs[name]

    def found() -> Alignment:
        return align_units(units, ours.__getitem__, read, torch.Generator().manual_seed(0), 100)

    kept = found()
    assert len(reads) == len(set(reads))
    monkeypatch.setattr(orders_of_units, "HELD", 3000)
    again = found()
    assert len(reads) > 5 * len(set(reads))
    assert (again.before, again.after) == (kept.before, kept.after)
    for name, moved in kept.moves.items():
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(moved, again.moves[name], strict=True))


def test_running_statistics_move_along_and_do_not_count() -> None:
    units, ours, theirs = two(sequence)
    counted = {p.tensor: p.counts for each in units for p in each.places}
    assert counted["1.running_mean"] is False
    assert counted["1.weight"] is True
    louder = {**theirs, "1.running_mean": theirs["1.running_mean"] * 100}
    found = [match(units, ours, other, torch.Generator().manual_seed(0)) for other in (theirs, louder)]
    assert found[0].agreement == found[1].agreement


# --- the merge --------------------------------------------------------------------------------------------------------


def saved(folder: Path, values: Mapping[str, Tensor]) -> str:
    folder.mkdir()
    save_file({n: v.contiguous() for n, v in values.items()}, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def test_the_mean_with_permuted_copies_is_the_model(tmp_path: Path) -> None:
    model = made("residual")
    units, ours = graph.find(model).units(), values_of(model)
    others = tuple(saved(tmp_path / str(seed), permuted(ours, units, seed)) for seed in (1, 2))
    result = compress.apply(model, [WeightMatching(models=others, weights=(0.5, 0.25, 0.25))])
    assert all(torch.equal(value, ours[name]) for name, value in result.model.state_dict().items())
    (facts,) = result.report.merged
    assert [f["after"] for f in facts["notes"]["aligned"]] == [0, 0]
    assert all(f["before"] > 1 and f["units"] == 48 and 40 < f["moved"] <= 48 for f in facts["notes"]["aligned"])


@pytest.mark.parametrize("kind", only(["llama"], ["llama", "gpt2", "masked bert"]))
def test_from_files_the_same_comes_out_and_the_report_says_how_far_they_were(kind: str, tmp_path: Path) -> None:
    model, other = filled(STREAMS[kind][0]), filled(STREAMS[kind][0])
    model.save_pretrained(tmp_path / "base")
    known, ours = graph.find(model), values_of(model)
    other.load_state_dict(tied_to(known, permuted(ours, known.units(residual=True))))
    other.save_pretrained(tmp_path / "other")
    models = [str(tmp_path / "other")]
    steps = {"passes": [{"weight_matching": {"models": models}}]}
    report = compress.run(steps, tmp_path / "base", tmp_path / "out")
    found = type(model).from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(value, found[name]) for name, value in ours.items())
    (facts,) = json.loads((tmp_path / "out" / "report.json").read_text())["merged"]
    assert facts == report.merged[0]
    (aligned,) = facts["notes"]["aligned"]
    assert aligned["after"] == 0
    assert aligned["before"] > 1
    without = compress.apply(model, [WeightMatching(models=tuple(models), residual=False)])
    (aligned,) = without.report.merged[0]["notes"]["aligned"]
    assert aligned["after"] > 0.5 * aligned["before"]


def test_of_two_vocabularies_the_rows_that_both_have_are_matched(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = made("llama")
    known, ours = graph.find(model), values_of(model)
    theirs = permuted(ours, known.units(residual=True))
    longer = {n: torch.cat([v, torch.randn(6, 32)]) if len(v) == 64 else v for n, v in theirs.items()}
    other = text("llama", vocab_size=70)
    other.load_state_dict(longer)
    other.save_pretrained(tmp_path / "other")
    pass_ = WeightMatching(models=(str(tmp_path / "other"),), vocabulary="common")
    found = compress.apply(model, [pass_]).model.state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in found.items())


def test_the_plan_counts_what_is_kept_and_moved() -> None:
    large = text("llama", vocab_size=4096, hidden_size=64, head_dim=16)
    known = graph.find(large)
    need = [memory._aligning(known, residual) for residual in (False, True)]
    numbers = sum(p.numel() for p in large.parameters())
    assert need[0] < 8 * numbers / 4
    assert need[1] > 8 * (2 * numbers + 6 * 4096 * 64)


def test_an_interrupted_run_does_not_match_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seed in (("base", 3), ("other", 4)):
        made("llama", seed).save_pretrained(tmp_path / name)
    steps = {"passes": [{"weight_matching": {"models": [str(tmp_path / "other")]}}, {"rtn": {"bits": 4}}]}
    whole = compress.run(steps, tmp_path / "base", tmp_path / "whole")

    def stop(*_: Any) -> None:
        raise RuntimeError("stopped")

    with monkeypatch.context() as patched:
        patched.setattr(block_stage, "run_passes", stop)
        with pytest.raises(RuntimeError, match="stopped"):
            compress.run(steps, tmp_path / "base", tmp_path / "out")
    monkeypatch.setattr(WeightMatching, "align", stop)
    assert compress.run(steps, tmp_path / "base", tmp_path / "out").merged == whole.merged
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_of_what_is_not_merged_nothing_counts(tmp_path: Path) -> None:
    model = made("sequence")
    ours = values_of(model)
    theirs = permuted(ours, graph.find(model).units())
    strange = {n: torch.randn_like(v) if n in ("3.weight", "7.weight") else v for n, v in theirs.items()}
    pass_ = WeightMatching(models=(saved(tmp_path / "other", strange),), exclude=("3.*", "7.*"))
    found = compress.apply(model, [pass_]).model.state_dict()
    assert all(torch.equal(found[n], ours[n]) for n in ("0.weight", "0.bias", "1.running_var", "3.weight", "7.weight"))


def test_a_model_with_nothing_free_is_refused_with_what_is_known(tmp_path: Path) -> None:
    class Closed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.softmax(self.a(x), -1))

    with pytest.raises(ConfigError) as caught:
        compress.apply(Closed(), [WeightMatching(models=(saved(tmp_path / "m", Closed().state_dict()),))])
    said = str(caught.value)
    assert "weight_matching knows nothing of a Closed whose order is free, or it merges none of it" in said
    assert "Llama and its like, GPT-2, GPT-NeoX, OPT, BERT and ViT, ResNet" in said


def test_no_sweep_is_refused() -> None:
    assert [e.option for e in errors_in(WeightMatching(models=("m",), sweeps=0))] == ["sweeps"]


# --- the barrier ------------------------------------------------------------------------------------------------------


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def convolutions() -> nn.Module:
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )


@pytest.mark.parametrize("make", only([perceptron], [perceptron, convolutions]))
def test_the_barrier_between_two_networks_trained_apart_falls_by_more_than_half(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    numbers = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    images, labels = (torch.tensor(part)[numbers] for part in load_digits(return_X_y=True))
    images = images.float() / 16

    def trained(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model, generator = make(), torch.Generator().manual_seed(seed)
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        for _ in range(30):
            for batch in torch.randperm(1400, generator=generator).split(100):
                optimizer.zero_grad()
                functional.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
        return model.eval()

    first, second = trained(0), trained(1)
    other = saved(tmp_path / "other", second.state_dict())

    @torch.no_grad()
    def barrier(pass_: type[compress.Average]) -> float:
        losses = []
        for share in torch.linspace(0, 1, 11).tolist():
            merged = compress.apply(first, [pass_(models=(other,), weights=(1 - share, share))]).model
            losses.append(float(functional.cross_entropy(merged(images[1400:]), labels[1400:])))
        straight = torch.linspace(losses[0], losses[-1], 11)
        return float((torch.tensor(losses) - straight).max())

    before, after = barrier(compress.Average), barrier(WeightMatching)
    assert before > 0.5
    assert after < before / 2
