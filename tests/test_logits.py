"""Logits of a large vocabulary are computed in pieces, and nothing that is measured or learned with them changes."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

import compress
from compress.calibration import metrics
from compress.calibration.reference import Reference
from compress.calibration.training import Loss
from compress.checkpoint.sources import FolderSource
from compress.engine import loss_in_pieces, model_training
from compress.models import logits
from compress.report.report import Report

VOCABULARY = 96
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.5,
}  # fmt: skip
KINDS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "scaled, tied": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=7.0, tie_word_embeddings=True)),
    "soft-capped": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=0.5)),
    "scaled by a factor": lambda: Cohere2ForCausalLM(Cohere2Config(**SIZES, logit_scale=0.3)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_head=2, n_layer=1, n_positions=16, bos_token_id=1)
    ),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**{**SIZES, "num_key_value_heads": None})),
    "a decoder inside its base": lambda: OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=16)),
    "a head of two layers": lambda: BertLMHeadModel(BertConfig(**SIZES, is_decoder=True)),
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=1, n_head=2)),
}


@pytest.fixture
def five_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """All logits of a batch are too many, and those of five positions are not."""
    monkeypatch.setattr(logits, "WHOLE", 10 * VOCABULARY)
    monkeypatch.setattr(logits, "PIECE", 5 * VOCABULARY)


def called(model: nn.Module, tokens: Tensor) -> Tensor:
    return logits.logits_in(model(input_ids=tokens, use_cache=False))


@pytest.fixture
def tokens() -> Tensor:
    """(4, 12) token ids."""
    return torch.randint(VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.usefixtures("five_at_once")
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_logits_are_what_the_model_says_whatever_it_does_behind_its_head(kind: str, tokens: Tensor) -> None:
    torch.manual_seed(0)
    model = KINDS[kind]().eval()
    with torch.no_grad():
        whole = called(model, tokens)
        found = logits.logits_of(model, partial(model, input_ids=tokens, use_cache=False), tokens)
        assert not isinstance(found, Tensor)
        pieces = list(found)
        again = called(model, tokens)
    assert {len(piece) for piece in pieces} == {5, 4}
    torch.testing.assert_close(torch.cat(pieces), whole[:, :-1].flatten(0, 1), rtol=1e-5, atol=1e-6)
    assert torch.equal(whole, again)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_what_fits_is_the_very_output_of_the_model(tokens: Tensor) -> None:
    model = KINDS["llama"]().eval()
    call = partial(model, input_ids=tokens, use_cache=False)
    with torch.no_grad():
        found = logits.logits_of(model, call, tokens)
        assert isinstance(found, Tensor)
        assert torch.equal(found, called(model, tokens))


@pytest.mark.usefixtures("five_at_once")
def test_a_model_with_no_body_that_is_known_gives_all_its_logits(tokens: Tensor) -> None:
    class Whole(LlamaForCausalLM):
        base_model_prefix = "missing"

    model = Whole(LlamaConfig(**SIZES)).eval()
    assert logits.bodies(model) == ()
    found = logits.logits_of(model, partial(model, input_ids=tokens, use_cache=False), tokens)
    assert isinstance(found, Tensor)
    assert found.shape == (4, 12, VOCABULARY)


@pytest.mark.usefixtures("five_at_once")
def test_an_error_of_the_model_leaves_it_as_it_was(tokens: Tensor) -> None:
    model = KINDS["llama"]()
    with pytest.raises(IndexError):
        logits.logits_of(model, partial(model, input_ids=tokens + VOCABULARY, use_cache=False), tokens)
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("room", [100 * VOCABULARY, 12 * VOCABULARY])
def test_quality_is_the_same_in_pieces(room: int, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = (KINDS["soft-capped"]().eval() for _ in range(2))

    def quality(whole: bool) -> metrics.Quality:
        monkeypatch.setattr(logits, "WHOLE", (48 if whole else 5) * VOCABULARY)
        monkeypatch.setattr(logits, "PIECE", 5 * VOCABULARY)
        reference = Reference(room)
        for each, keep in ((other, True), (model, False)):
            call = partial(called, each) if whole else metrics._logits_of(each, "next token")
            found = metrics.measure(call, tokens, reference=reference, keep=keep)
        return found

    there, here = quality(True), quality(False)
    assert here.loss == pytest.approx(there.loss, rel=1e-6)
    assert here.kl_tokens == min(44, room // VOCABULARY // 5 * 5)
    assert here.kl is not None
    assert there.kl is None or here.kl == pytest.approx(there.kl, rel=1e-5)
    assert (here.tokens, here.negative_flips) == (there.tokens, there.negative_flips)


def test_the_original_may_come_in_other_pieces_than_the_model(tokens: Tensor) -> None:
    model = KINDS["llama"]().eval()
    reference, rows = Reference(), called(model, tokens).detach()[:, :-1].flatten(0, 1)
    metrics.measure(lambda _: iter(torch.split(rows, 7)), tokens, reference=reference, keep=True)
    found = metrics.measure(lambda _: iter(torch.split(rows, 9)), tokens, reference=reference)
    assert (found.kl, found.kl_tokens, found.negative_flips) == (0.0, 44, 0.0)


@pytest.mark.parametrize("objective", ["next_token", "distill"])
def test_what_is_learned_is_the_same_in_pieces(
    objective: Loss, llama_maker: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    head = logits.Body.logits

    def counted(self: logits.Body, hidden: Tensor) -> Tensor:
        rows.append(len(hidden))
        return head(self, hidden)

    monkeypatch.setattr(logits.Body, "logits", counted)
    tokens = torch.randint(256, (1, 12), generator=torch.Generator().manual_seed(1)).repeat(6, 1)  # can be learned
    train = ("norm", "mask_lora", "head")
    found = []
    for positions in (48, 10):
        for module in (model_training, loss_in_pieces):
            monkeypatch.setattr(module, "WHOLE_LEARNED", positions * 256)
        monkeypatch.setattr(logits, "PIECE", positions * 256)
        passes = [compress.Magnitude(sparsity=0.5), compress.Perp(objective=objective, train=train, steps=3, rank=2)]
        found.append(compress.apply(llama_maker(num_hidden_layers=1), passes, calibration=tokens).model.state_dict())
        assert bool(rows) == (positions == 10)
    assert max(rows) == 10
    started = llama_maker(num_hidden_layers=1).state_dict()
    for name, whole in found[0].items():
        torch.testing.assert_close(found[1][name], whole, rtol=1e-4, atol=1e-5, msg=name)
    assert not torch.equal(found[1]["lm_head.weight"], started["lm_head.weight"])
    assert not torch.equal(found[1]["model.norm.weight"], started["model.norm.weight"])


def test_parts_of_a_model_on_disk_are_read_once_for_all_pieces_of_a_batch(
    tiny_folder: Path, tmp_path: Path, evaluation_tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    read = FolderSource.read

    def counted(self: FolderSource, name: str) -> Tensor:
        reads.append(name)
        return read(self, name)

    monkeypatch.setattr(FolderSource, "read", counted)

    def measured(positions: int) -> tuple[int, Report]:
        monkeypatch.setattr(logits, "WHOLE", positions * 256)
        monkeypatch.setattr(logits, "PIECE", positions * 256)
        reads.clear()
        report = compress.run({"passes": ["rtn"]}, tiny_folder, tmp_path / str(positions), evaluation=evaluation_tokens)
        return reads.count("lm_head.weight"), report

    (whole, there), (pieces, here) = measured(1000), measured(7)
    assert pieces == whole
    assert here.verified["max_logit_difference"] == 0.0
    assert [row.perplexity for row in here.rows] == pytest.approx([row.perplexity for row in there.rows], rel=1e-6)
