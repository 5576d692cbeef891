"""Blocks that do not simply feed one another are learned too: from every call, as the whole model makes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from selection import only
from test_sweep import Backwards, CalledByWhatWasMade, ChangedInPlace, FirstTwice, SkipOutside, TwiceThrough
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    PreTrainedModel,
    XLMConfig,
    XLMWithLMHeadModel,
    YolosConfig,
    YolosForObjectDetection,
)
from wirings import WIDTH, Block, Model

import compress
from compress.calibration import collect
from compress.engine.block_view import View
from compress.passes import Gptq, Rtn
from compress.passes.base import Pass

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"vocab_size": 128, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}


@pytest.fixture
def samples() -> Tensor:
    return torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 128, (16, 12), generator=torch.Generator().manual_seed(3))


def albert() -> PreTrainedModel:
    torch.manual_seed(4)
    config = AlbertConfig(**SMALL, num_hidden_layers=4, embedding_size=16, initializer_range=0.2)
    return AlbertForMaskedLM(config).eval()


def xlm() -> PreTrainedModel:
    torch.manual_seed(4)
    config = XLMConfig(vocab_size=128, emb_dim=32, n_layers=2, n_heads=2, init_std=0.2, max_position_embeddings=32)
    return XLMWithLMHeadModel(config).eval()


def gemma3n(**changes: Any) -> PreTrainedModel:
    torch.manual_seed(4)
    sizes = {
        **SMALL, "num_hidden_layers": 4, "num_key_value_heads": 1, "head_dim": 16, "laurel_rank": 8,
        "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 128, "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "activation_sparsity_pattern": [0.0] * 4,
        "initializer_range": 0.2, "pad_token_id": 0,
    }  # fmt: skip
    return Gemma3nForCausalLM(Gemma3nTextConfig(**{**sizes, **changes})).eval()


def distance(model: nn.Module, made: nn.Module, inputs: Tensor) -> float:
    with torch.no_grad():
        pair = [m(inputs) for m in (model, made)]
    one, other = (p if isinstance(p, Tensor) else p.logits for p in pair)
    return float((one - other).square().mean())


def learned_beside_rounded(make: Callable[[], nn.Module], inputs: Tensor, **options: Any) -> float:
    """The squared error of the outputs with learned rounding, in that with rounding to nearest."""
    errors = []
    passes: list[Pass] = [compress.FlexRound(bits=3, steps=60, batch_size=8), Rtn(bits=3)]
    for pass_ in passes:
        made = compress.apply(make(), [pass_], calibration=inputs, **options).model
        errors.append(distance(make(), made, inputs))
    return errors[0] / errors[1]


@pytest.mark.parametrize(
    "wiring",
    only(
        [Backwards, TwiceThrough],
        [SkipOutside, ChangedInPlace, Backwards, TwiceThrough, FirstTwice, CalledByWhatWasMade],
    ),
    ids=lambda c: c.__name__,
)
def test_blocks_are_learned_however_they_are_wired(wiring: type[Model], samples: Tensor) -> None:
    assert learned_beside_rounded(wiring, samples) < 0.85


@pytest.mark.parametrize("make", only([albert], [albert, xlm, gemma3n]), ids=lambda f: f.__name__)
def test_models_whose_blocks_do_not_form_a_plain_chain_are_learned(
    make: Callable[[], PreTrainedModel], tokens: Tensor
) -> None:
    assert learned_beside_rounded(make, tokens) < 0.8


def test_a_model_that_adds_positions_between_its_blocks_is_learned() -> None:
    torch.manual_seed(4)
    config = YolosConfig(
        **{k: v for k, v in SMALL.items() if k != "vocab_size"}, num_hidden_layers=2, image_size=[16, 16],
        patch_size=4, num_detection_tokens=3, initializer_range=0.2,
    )  # fmt: skip
    assert config.use_mid_position_embeddings
    model = YolosForObjectDetection(config).eval()
    images = torch.rand(16, 3, 16, 16)
    made = compress.apply(model, [compress.FlexRound(bits=4, steps=5)], calibration=images)
    assert made.report.fallbacks == []
    assert len(made.weights) >= 12


def views_of(
    model: nn.Module, inputs: Tensor, monkeypatch: pytest.MonkeyPatch, pass_: compress.FlexRound
) -> dict[int, View]:
    found: dict[int, View] = {}
    before = View.data

    def data(self: View, fixed: Any) -> Any:
        found[self.index] = self
        return before(self, fixed)

    monkeypatch.setattr(View, "data", data)
    compress.apply(model, [pass_], calibration=inputs, products="float32")
    return found


@torch.no_grad()
def test_a_block_that_runs_again_and_again_is_learned_from_all_its_calls(
    samples: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = TwiceThrough()
    arrived: list[tuple[int, Tensor]] = []
    made: list[tuple[int, Tensor]] = []
    plain = TwiceThrough()
    blocks = list(plain.blocks)
    collect.watched(
        lambda: plain(samples),
        blocks,
        lambda i, hidden, _: arrived.append((i, hidden.clone())),
        lambda i, hidden: made.append((i, hidden.clone())),
    )
    views = views_of(model, samples, monkeypatch, compress.FlexRound(bits=4, steps=1))
    for index, view in views.items():
        for got, wanted in ((view.original, arrived), (view.outputs, made)):
            mine = [hidden for i, hidden in wanted if i == index]
            assert len(got.hidden) == len(mine) == 2
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got.hidden, mine, strict=True))
    assert not torch.equal(views[1].chain.hidden[0], views[1].original.hidden[0])  # the first block is compressed
    assert torch.equal(views[0].chain.hidden[0], views[0].original.hidden[0])


def test_samples_of_several_batches_and_calls_keep_their_arguments(
    tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma 3n hands each sample's own embeddings to every block."""
    pass_ = compress.FlexRound(bits=4, steps=1)
    monkeypatch.setattr("compress.engine.stage.CALIBRATED_AT_ONCE", 4 * tokens.shape[1])
    view = views_of(gemma3n(), tokens, monkeypatch, pass_)[0]
    assert len(view.original.hidden) == 4
    numbers = torch.tensor([13, 2, 7])
    with torch.no_grad():
        hidden, wanted = view.original.samples().take(numbers), view.outputs.samples().take(numbers)
        with view.ready((), {}):
            found = view.original.run(view.block, hidden, numbers, view.original_values(), view.index)
    assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.real
def test_keys_and_values_that_later_blocks_read_are_those_of_the_sample(tokens: Tensor) -> None:
    def shared() -> PreTrainedModel:
        return gemma3n(num_kv_shared_layers=2)

    assert learned_beside_rounded(shared, tokens) < 0.9
    solved, rounded = (compress.apply(shared(), [p], calibration=tokens).model for p in (Gptq(bits=4), Rtn(bits=4)))
    assert distance(shared(), solved, tokens) < 0.9 * distance(shared(), rounded, tokens)


def test_a_streamed_model_is_learned_to_the_bits_of_one_in_memory(tmp_path: Path, tokens: Tensor) -> None:
    model = albert()
    model.save_pretrained(tmp_path / "source")
    pass_ = compress.FlexRound(bits=4, steps=4)
    here = compress.apply(model, [pass_], calibration=tokens)
    steps = {"passes": [{"flexround": {"bits": 4, "steps": 4}}], "allow_dense": True}
    compress.run(steps, tmp_path / "source", tmp_path / "out", calibration=tokens, evaluation=tokens)
    again = AlbertForMaskedLM.from_pretrained(tmp_path / "out").eval()
    assert distance(here.model, again, tokens) < 1e-8


class SeveralSizes(Model):
    """One block for maps of several sizes."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.blocks[0](self.blocks[1](x).unsqueeze(1).expand(-1, 2, -1)).mean(1) + self.blocks[0](x)


class PairBlock(Block):
    def forward(self, x: Tensor) -> Any:
        return {"hidden": super().forward(x)}


class Named(Model):
    block = PairBlock

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)["hidden"]
        return x


class Unreached(Model):
    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in list(self.blocks)[:2]:
            x = block(x)
        return x


@pytest.mark.parametrize(
    ("wiring", "said"),
    [
        (SeveralSizes, "blocks.0 of SeveralSizes is called with hidden states of several shapes"),
        (Named, "puts out a dict instead of hidden states"),
        (Unreached, "blocks.2 of Unreached is never reached"),
    ],
    ids=lambda c: getattr(c, "__name__", ""),
)
def test_what_cannot_be_learned_says_why_and_what_to_use_instead(
    wiring: type[Model], said: str, samples: Tensor
) -> None:
    model = wiring()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(compress.CompressError, match=said) as raised:
        compress.apply(model, [compress.FlexRound(bits=4, steps=1)], calibration=samples, inplace=True)
    assert "such as gptq" in str(raised.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())  # before any is learned
