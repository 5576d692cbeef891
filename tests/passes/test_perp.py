"""PERP: the properties of its paper, on single matrices and on small models."""

from collections.abc import Callable
from pathlib import Path

import pytest
import textbook
import torch
from commands import stop_at_state
from selection import only
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

import compress
from compress.calibration.training import Schedule
from compress.config.options import errors_in
from compress.engine.ledger import FolderLedger
from compress.errors import ConfigError
from compress.passes import Eora, Magnitude, Pass, Perp, PerpReconstruct, Rtn, Wanda
from compress.passes.base import Target
from compress.passes.retrain.adapters import AdaptedMatrix, Recipe
from compress.passes.retrain.importance import principal, sensitive

pytestmark = pytest.mark.usefixtures("one_thread")
SETS = ("mask_lora", "scale_lora", "lora_prune", "lora", "full", "principal", "sensitive")


def masked(seed: int = 0) -> Target:
    """A matrix with half of its weights gone, and a kept weight that is zero."""
    w, kept = textbook.weight(12, 20, seed), textbook.mask(12, 20, seed)
    w[kept.nonzero()[0][0], kept.nonzero()[0][1]] = 0
    return Target(w * kept, kept, generator=torch.Generator().manual_seed(seed))


def moved(target: Target, *sets: str, rank: int = 3) -> AdaptedMatrix:
    """Adapters after a few steps of descent towards other values."""
    matrix = AdaptedMatrix(target, Recipe(sets, rank, 6.0, 0.3), textbook.weight(12, 20, seed=4))
    wanted = textbook.weight(12, 20, seed=9)
    optimizer = torch.optim.Adam(matrix.tensors(), lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        (matrix.soft() - wanted).square().sum().backward()
        optimizer.step()
    return matrix


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETS)
def test_before_the_first_step_the_matrix_is_the_pruned_one(name: str) -> None:
    target = masked()
    matrix = AdaptedMatrix(target, Recipe((name,), 4, 8.0, 0.3), textbook.weight(12, 20, seed=4))
    assert torch.equal(matrix.soft(), target.weight)
    assert torch.equal(matrix.merged(), target.weight)


@pytest.mark.parametrize("name", ["mask_lora", "scale_lora", "full", "principal", "sensitive"])
def test_merging_changes_nothing_and_keeps_every_zero(name: str) -> None:
    matrix, kept = moved(masked(), name), masked().mask
    assert torch.equal(matrix.merged(), matrix.soft())
    assert bool((matrix.merged()[~kept] == 0).all())
    assert not torch.equal(matrix.merged(), masked().weight)


def test_lora_prune_trains_without_the_mask_and_merges_with_it() -> None:
    matrix, kept = moved(masked(), "lora_prune"), masked().mask
    assert bool((matrix.soft()[~kept] != 0).any())
    assert bool((matrix.merged()[~kept] == 0).all())
    assert torch.allclose(matrix.merged()[kept], matrix.soft()[kept], atol=1e-6)


def test_a_kept_weight_of_zero_is_trained_by_mask_lora() -> None:
    target = masked()
    place = tuple(target.mask.nonzero()[0].tolist())
    assert float(target.weight[place]) == 0
    assert float(moved(target, "mask_lora").merged()[place]) != 0


def test_without_zeros_mask_lora_is_lora() -> None:
    full = Target(textbook.weight(12, 20), torch.ones(12, 20, dtype=torch.bool), generator=torch.Generator())
    dense = Target(textbook.weight(12, 20), None, generator=torch.Generator())
    assert torch.allclose(moved(full, "mask_lora").merged(), moved(dense, "lora").merged(), atol=1e-5)


def test_the_components_of_scale_lora_become_different() -> None:
    matrix = moved(masked(), "scale_lora", rank=3)
    a, b = matrix.tensors()
    assert int(torch.linalg.matrix_rank(b @ a, rtol=1e-3)) == 3


def test_lora_beside_zeros_is_kept_and_leaves_the_matrix_as_it_is() -> None:
    edit = moved(masked(), "lora").edit({})
    assert torch.equal(edit.weight, masked().weight)
    assert edit.low_rank is not None
    assert edit.low_rank.rank == 3


@pytest.mark.parametrize("name", ["principal", "sensitive"])
def test_of_the_kept_weights_a_share_is_trained_and_no_other(name: str) -> None:
    target, kept = masked(), masked().mask
    matrix = moved(target, name)
    changed = matrix.merged() != target.weight
    assert matrix.tensors()[0].numel() == round(0.3 * int(kept.sum()))
    assert int(changed.sum()) == round(0.3 * int(kept.sum()))
    assert not bool(changed[~kept].any())


def test_principal_weights_are_the_largest_of_the_nearest_matrix_of_a_low_rank() -> None:
    target, kept = masked(), masked().mask
    u, s, v = torch.linalg.svd(target.weight.double(), full_matrices=False)
    nearest = ((u[:, :3] * s[:3]) @ v[:3]).abs()
    assert torch.allclose(principal(target.weight, 3).double(), nearest, atol=1e-5)
    changed = moved(target, "principal", rank=3).merged() != target.weight
    assert float(nearest[changed].min()) > float(nearest[kept & ~changed].max())
    assert not torch.equal(changed, moved(target, "principal", rank=1).merged() != target.weight)
    assert not bool(principal(torch.zeros(4, 5), 2).any())


def test_sensitive_weights_are_found_by_rows_and_columns_through_the_noise_of_gradients() -> None:
    rows, columns = torch.linspace(0.1, 2, 24)[:, None], torch.linspace(0.1, 2, 40)[None]
    true = rows * columns + rows + columns

    def found(values: Tensor) -> set[int]:
        return set(values.flatten().argsort(descending=True)[:96].tolist())

    by_score = by_sight = 0
    for seed in range(5):
        seen = true * textbook.weight(24, 40, seed).abs()  # of few samples: right only on average
        by_sight += len(found(seen) & found(true))
        by_score += len(found(sensitive(torch.ones(24, 40), -seen, rank=1)) & found(true))
    assert by_score > 1.25 * by_sight
    assert not bool(sensitive(torch.ones(3, 4), None, rank=1).any())


def test_the_learning_rate_rises_for_a_tenth_and_then_falls_to_nothing() -> None:
    schedule = Schedule(steps=100, batch_size=1)
    rates = [schedule.rate(step) for step in range(1, 101)]
    assert rates.index(max(rates)) == 9
    assert max(rates) == 1.0
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert 0 < rates[-1] < 0.02


@pytest.fixture
def tokens() -> Tensor:
    """(32, 32) tokens of which each says what comes next."""
    starts = torch.randint(24, (32, 1), generator=torch.Generator().manual_seed(1))
    return (starts + torch.arange(32)) % 24


# --- on models --------------------------------------------------------------------------------------------------------


def prune(share: float = 0.6) -> Magnitude:
    return Magnitude(sparsity=share)


def zeros(result: compress.Result) -> dict[str, Tensor]:
    return {name: w.mask for name, w in result.weights.items() if w.mask is not None}


@pytest.mark.parametrize(
    "train",
    [
        ("bias", "norm", "mask_lora"),
        pytest.param(("scale_lora",), marks=pytest.mark.real),
        ("lora_prune",),
        pytest.param(("full",), marks=pytest.mark.real),
        pytest.param(("principal",), marks=pytest.mark.real),
        ("sensitive",),
    ],
)
@pytest.mark.parametrize("objective", only(["distill"], ["next_token", "distill"]))
def test_training_lowers_the_loss_and_leaves_the_masks(
    tiny_llama: LlamaForCausalLM, tokens: Tensor, train: tuple[str, ...], objective: str
) -> None:
    pruned = compress.apply(tiny_llama, [prune()], tokens)
    pass_ = Perp(train=train, steps=12, rank=4, objective=objective, learning_rate=2e-3)
    trained = compress.apply(tiny_llama, [prune(), pass_], tokens, evaluation=tokens)
    notes = next(iter(trained.report.layers.values()))["perp"]
    assert notes["loss"] < notes["loss_start"]
    assert trained.report.rows[-1].kl is not None
    for name, mask in zeros(pruned).items():
        assert torch.equal(trained.weights[name].mask, mask)
        assert bool((trained.model.get_submodule(name).weight[~mask] == 0).all())


def test_only_what_is_named_is_trained(tiny_llama: LlamaForCausalLM, tokens: Tensor) -> None:
    before = {n: p.clone() for n, p in tiny_llama.named_parameters()}
    made = compress.apply(
        tiny_llama, [Perp(train=("norm",), steps=6, learning_rate=0.01, objective="next_token")], tokens
    ).model
    changed = {n for n, p in made.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n, p in before.items() if p.dim() == 1}


def test_the_head_is_trained_by_lora_and_merged(tiny_llama: LlamaForCausalLM, tokens: Tensor) -> None:
    result = compress.apply(tiny_llama, [Perp(train=("head",), rank=2, steps=6, objective="next_token")], tokens)
    change = (result.model.lm_head.weight - tiny_llama.lm_head.weight).detach()
    assert list(result.weights) == ["lm_head"]
    assert int(torch.linalg.matrix_rank(change, rtol=1e-3)) == 2


def test_a_head_that_is_tied_to_the_embedding_is_refused(
    llama_maker: Callable[..., LlamaForCausalLM], tokens: Tensor
) -> None:
    with pytest.raises(ConfigError, match=r"lm_head is tied to model\.embed_tokens"):
        compress.apply(llama_maker(tie_word_embeddings=True), [Perp(train=("head",), steps=1)], tokens)


@pytest.mark.parametrize("tied", [False, True])
def test_by_default_the_head_is_trained_where_it_is_not_tied(
    llama_maker: Callable[..., LlamaForCausalLM], tokens: Tensor, tied: bool
) -> None:
    model = llama_maker(tie_word_embeddings=tied)
    result = compress.apply(model, [prune(), Perp(rank=2, steps=3, learning_rate=5e-3)], tokens)
    head = result.model.lm_head.weight
    assert ("lm_head" in result.weights) != tied
    assert torch.equal(head, model.lm_head.weight) == tied
    assert torch.equal(result.model.model.embed_tokens.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize("before", [Rtn(bits=8, include=("lm_head",)), Magnitude(sparsity=0.5, include=("lm_head",))])
def test_by_default_a_head_that_is_no_longer_dense_stays(
    tiny_llama: LlamaForCausalLM, tokens: Tensor, before: Pass
) -> None:
    result = compress.apply(tiny_llama, [before, Perp(rank=2, steps=3, learning_rate=5e-3)], tokens)
    alone = compress.apply(tiny_llama, [before], tokens)
    assert torch.equal(result.weights["lm_head"].dequantize(), alone.weights["lm_head"].dequantize())


def test_a_head_that_is_excluded_stays(tiny_llama: LlamaForCausalLM, tokens: Tensor) -> None:
    result = compress.apply(tiny_llama, [Perp(rank=2, steps=3, learning_rate=5e-3, exclude=("lm_h*",))], tokens)
    assert torch.equal(result.model.lm_head.weight, tiny_llama.lm_head.weight)


def test_weights_that_the_loss_depends_on_are_chosen_where_gradients_are(tokens: Tensor) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    with torch.no_grad():
        model[2].weight[:, 16:] = 0  # half of what the first layer makes counts for nothing
    inputs = textbook.inputs(24, tokens=64)
    options = {"steps": 20, "learning_rate": 1e-2, "share": 0.1}
    passes = [Magnitude(sparsity=0.3, include=("0",)), Perp(train=("sensitive",), include=("0",), **options)]
    made = compress.apply(model, passes, inputs)
    pruned = compress.apply(model, passes[:1], inputs)
    changed = made.model[0].weight != pruned.model[0].weight
    assert int(changed[:16].sum()) > 0.9 * round(0.1 * int(pruned.weights["0"].mask.sum()))
    assert not bool(changed[16:].any())


@pytest.mark.parametrize(
    ("pass_", "said"),
    [
        (PerpReconstruct(train=("sensitive",)), "sensitive chooses by the loss of the whole model"),
        (compress.SparseSoup(train=("sensitive",)), "sensitive chooses by the loss of the whole model"),
        (Perp(share=0.1), "changes nothing without principal or sensitive"),
        (Perp(train=("principal",), share=0.0), "share"),
    ],
)
def test_sets_of_some_weights_are_refused_where_they_mean_nothing(pass_: Pass, said: str) -> None:
    assert any(said in f"{error.option} {error.message}" for error in errors_in(pass_))


@pytest.mark.parametrize("checkpointing", [True, False])
def test_computing_activations_again_changes_no_result(
    tiny_llama: LlamaForCausalLM, tokens: Tensor, checkpointing: bool
) -> None:
    options = {"steps": 3, "rank": 2, "learning_rate": 1e-3}
    made = compress.apply(tiny_llama, [prune(), Perp(**options, checkpointing=checkpointing)], tokens)
    other = compress.apply(tiny_llama, [prune(), Perp(**options)], tokens)
    for p, q in zip(made.model.parameters(), other.model.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)


def test_the_model_is_called_as_before_when_training_is_over(tiny_llama: LlamaForCausalLM, tokens: Tensor) -> None:
    made = compress.apply(tiny_llama, [Perp(steps=2, rank=2)], tokens).model
    assert not any("forward" in vars(module) for module in made.modules())
    assert list(dict(made.named_parameters())) == list(dict(tiny_llama.named_parameters()))
    assert all(type(p) is nn.Parameter for p in made.parameters())


def test_convolutions_and_batch_normalisations_are_trained_and_statistics_stay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 10)
    ).eval()
    images = torch.randn(32, 3, 8, 8)
    options = {"objective": "distill", "steps": 20, "rank": 4, "learning_rate": 5e-3}
    made = compress.apply(model, [prune(), Perp(**options)], images)
    notes = next(iter(made.report.layers.values()))["perp"]
    assert notes["loss"] < 0.8 * notes["loss_start"]
    assert bool((made.model[1].weight != 1).any())
    assert torch.equal(made.model[1].running_mean, model[1].running_mean)
    assert bool((made.model[3].weight[~made.weights["3"].mask.view(8, 8, 3, 3)] == 0).all())


def test_matrices_that_are_stored_transposed_are_trained(tokens: Tensor) -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=64, initializer_range=0.2)
    model = GPT2LMHeadModel(config).eval()
    made = compress.apply(model, [prune(), Perp(steps=10, rank=4, learning_rate=5e-3)], tokens)
    notes = next(iter(made.report.layers.values()))["perp"]
    assert notes["loss"] < notes["loss_start"]
    weight = made.model.transformer.h[0].mlp.c_fc.weight
    assert bool((weight.T[~made.weights["transformer.h.0.mlp.c_fc"].mask] == 0).all())


def test_training_goes_through_inputs_that_are_rounded(tiny_llama: LlamaForCausalLM, tokens: Tensor) -> None:
    rounding = Rtn(bits=3, activation_bits=4)
    made = compress.apply(tiny_llama, [rounding, Perp(train=("norm", "scale"), steps=15, learning_rate=5e-3)], tokens)
    notes = next(iter(made.report.layers.values()))["perp"]
    assert notes["loss"] < notes["loss_start"]
    assert all(w.inputs is not None for w in made.weights.values())


def pipeline(*passes: object) -> dict[str, object]:
    return {"passes": list(passes), "products": "float32"}


PERP = {"perp": {"steps": 10, "rank": 2, "learning_rate": 2e-3, "objective": "next_token"}}


def test_new_biases_are_stored_and_load_with_equal_logits(tiny_folder: Path, tmp_path: Path, tokens: Tensor) -> None:
    perp = {"perp": {"steps": 6, "train": ["bias", "norm"], "new_biases": True, "learning_rate": 0.01}}
    steps = pipeline({"rtn": {"scheme": "w4g32"}}, perp)
    report = compress.run(steps, tiny_folder, tmp_path / "out", calibration=tokens, evaluation=tokens)
    assert report.verified["max_logit_difference"] == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    biases = [p for n, p in loaded.named_parameters() if n.endswith("_proj.bias")]
    assert len(biases) == 14
    assert all(bool(b.any()) for b in biases)


def test_new_biases_are_refused_where_a_plain_model_is_written(tiny_folder: Path, tmp_path: Path) -> None:
    steps = {**pipeline({"perp": {"new_biases": True}}), "calibration": {}, "export": ["safetensors", "hf"]}
    with pytest.raises(ConfigError, match=r"export\.hf: a plain LlamaForCausalLM has no place for the biases"):
        compress.run(steps, tiny_folder, tmp_path / "out")


def test_a_plain_model_has_the_trained_norms(tiny_folder: Path, tmp_path: Path, tokens: Tensor) -> None:
    steps = {**pipeline(PERP), "export": ["safetensors", "hf"]}
    report = compress.run(steps, tiny_folder, tmp_path / "out", calibration=tokens, evaluation=tokens)
    assert report.verified["hf"]["max_logit_difference"] == 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out/hf")
    assert bool((plain.model.norm.weight != 1).any())


@pytest.mark.parametrize("tied", only([True], [False, True]))
def test_a_run_in_memory_and_one_out_of_core_agree(
    llama_maker: Callable[..., LlamaForCausalLM], tmp_path: Path, tokens: Tensor, tied: bool
) -> None:
    model = llama_maker(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "model")
    steps = pipeline({"magnitude": {"sparsity": 0.6}}, PERP)
    report = compress.run(steps, tmp_path / "model", tmp_path / "out", calibration=tokens, evaluation=tokens)
    assert report.rows[-1].perplexity < report.rows[-2].perplexity
    assert report.trained[0]["parameters"] == sum(p.numel() for p in model.parameters())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    made = compress.apply(
        model, [prune(), Perp(steps=10, rank=2, learning_rate=2e-3, objective="next_token")], tokens, products="float32"
    ).model
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, made(tokens).logits)


def test_codes_stay_and_their_scales_corrections_and_norms_are_trained(
    tiny_folder: Path, tmp_path: Path, tokens: Tensor
) -> None:
    steps = {"steps": 8, "rank": 2, "learning_rate": 2e-3, "train": ["norm", "scale", "lora"]}
    first = pipeline({"rtn": {"scheme": "w3g32"}}, {"eora": {"rank": 2}})
    compress.run(first, tiny_folder, tmp_path / "first", calibration=tokens)
    second = pipeline(*first["passes"], {"perp": steps})  # type: ignore[misc]
    report = compress.run(second, tiny_folder, tmp_path / "second", calibration=tokens, evaluation=tokens)
    assert report.verified["max_logit_difference"] == 0
    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / n).state_dict() for n in ("first", "second"))
    changed = {n.rpartition(".")[2] for n, t in after.items() if not torch.equal(t, before[n])}
    assert changed == {"weight", "scale", "lora_a", "lora_b"}
    assert all(torch.equal(t, before[n]) for n, t in after.items() if n.endswith("codes"))
    assert report.rows[-1].perplexity < report.rows[-2].perplexity


@pytest.mark.parametrize("name", ["mask_lora", "full"])
def test_training_codes_is_refused_before_work_starts(tiny_llama: LlamaForCausalLM, tokens: Tensor, name: str) -> None:
    with pytest.raises(ConfigError, match=f"codes cannot take what {name} adds"):
        compress.apply(tiny_llama, [Rtn(bits=4), Perp(train=(name,))], tokens)


def test_training_a_pruned_model_with_a_correction_is_refused(tiny_llama: LlamaForCausalLM, tokens: Tensor) -> None:
    with pytest.raises(ConfigError, match="Put perp before eora, or train lora"):
        compress.apply(tiny_llama, [Wanda(), Eora(rank=2), Perp()], tokens)


def test_next_token_needs_a_language_model() -> None:
    model = nn.Sequential(nn.Linear(32, 8))
    with pytest.raises(ConfigError, match="a Sequential predicts no next token; set it to distill"):
        compress.apply(model, [Perp(steps=1, objective="next_token")], torch.randn(8, 32))


def test_a_training_that_is_killed_goes_on_and_ends_the_same(
    tiny_folder: Path, tmp_path: Path, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = pipeline({"magnitude": {"sparsity": 0.6}}, PERP)
    compress.run(steps, tiny_folder, tmp_path / "whole", calibration=tokens)
    saved = stop_at_state(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        compress.run(steps, tiny_folder, tmp_path / "parts", calibration=tokens)
    compress.run(steps, tiny_folder, tmp_path / "parts", calibration=tokens)
    assert len(saved) == 5  # two of five looks were left
    for file in ("compress.safetensors", "config.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()


# --- by reconstruction ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", only(["half_block", "matrix"], ["block", "half_block", "matrix"]))
def test_reconstruction_ends_with_no_larger_error_and_the_same_zeros(
    tiny_llama: LlamaForCausalLM, tokens: Tensor, granularity: str
) -> None:
    pass_ = PerpReconstruct(granularity=granularity, steps=20, rank=4, learning_rate=3e-3)
    pruned = compress.apply(tiny_llama, [prune()], tokens, evaluation=tokens)
    made = compress.apply(tiny_llama, [prune(), pass_], tokens, evaluation=tokens)
    for notes in made.report.layers.values():
        assert notes["perp_reconstruct"]["block_error"] < notes["perp_reconstruct"]["block_error_start"]
    for name, mask in zeros(pruned).items():
        assert torch.equal(made.weights[name].mask, mask)
    assert made.report.rows[-1].kl < pruned.report.rows[-1].kl


def test_reconstruction_trains_the_norms_of_its_block_and_no_others(
    tiny_llama: LlamaForCausalLM, tokens: Tensor
) -> None:
    before = {n: p.clone() for n, p in tiny_llama.named_parameters()}
    pass_ = PerpReconstruct(train=("norm", "mask_lora"), include=("model.layers.0.*",), steps=10, learning_rate=0.01)
    made = compress.apply(tiny_llama, [prune(), pass_], tokens).model
    changed = {n for n, p in made.named_parameters() if p.dim() == 1 and not torch.equal(p, before[n])}
    assert changed == {f"model.layers.0.{n}_layernorm.weight" for n in ("input", "post_attention")}


@pytest.mark.parametrize("granularity", ["block", "half_block"])
def test_norms_alone_are_trained_too(tiny_llama: LlamaForCausalLM, tokens: Tensor, granularity: str) -> None:
    pass_ = PerpReconstruct(train=("norm",), steps=20, learning_rate=0.02, granularity=granularity)
    made = compress.apply(tiny_llama, [prune(), pass_], tokens).model
    changed = {n.split(".")[2] for n, p in made.named_parameters() if p.dim() == 1 and bool((p != 1).any())}
    assert changed == ({"0", "1"} if granularity == "block" else set())


def test_reconstruction_out_of_core_resumes_to_the_same_bytes(
    tiny_folder: Path, tmp_path: Path, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = pipeline({"magnitude": {"sparsity": 0.6}}, {"perp_reconstruct": {"steps": 4, "rank": 2}})
    compress.run(steps, tiny_folder, tmp_path / "whole", calibration=tokens)
    commit, done = FolderLedger.commit, []

    def once(self: FolderLedger, unit: str, key: str, records: list[object]) -> object:
        made = commit(self, unit, key, records)  # type: ignore[arg-type]
        done.append(unit)
        if unit == "s01-b0000" and done.count(unit) == 1:
            raise KeyboardInterrupt
        return made

    monkeypatch.setattr(FolderLedger, "commit", once)
    with pytest.raises(KeyboardInterrupt):
        compress.run(steps, tiny_folder, tmp_path / "parts", calibration=tokens)
    compress.run(steps, tiny_folder, tmp_path / "parts", calibration=tokens)
    assert done.count("s01-b0000") == 1
    assert (tmp_path / "whole/compress.safetensors").read_bytes() == (
        tmp_path / "parts/compress.safetensors"
    ).read_bytes()
