"""BiP: the mask moves, its size does not; without gradients nothing does."""

import pytest
import textbook
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import compress
from compress.calibration.training import Make, ModelData, TrainingStore
from compress.passes import Bip, GlobalMagnitude
from compress.passes.base import Edit, Target, Whole
from compress.passes.prune.bip import Refinement

pytestmark = pytest.mark.usefixtures("one_thread")


def regression(seed: int = 0) -> Whole:
    """A matrix whose outputs are wanted from inputs of very different sizes: magnitudes are a bad guide."""
    w, x = textbook.weight(8, 24, seed), textbook.inputs(24, tokens=64, seed=seed)
    x = x * torch.logspace(-1, 1, 24)
    wanted = x @ w.T

    def loss(make: Make, numbers: Tensor) -> Tensor:
        return (x[numbers] @ make(["a"])["a"].T - wanted[numbers]).square().mean()

    target = Target(w, generator=torch.Generator().manual_seed(seed))
    return Whole(
        ("a",), {"a": target}.__getitem__, {}, ModelData(loss, 64, TrainingStore()), torch.Generator().manual_seed(seed)
    )


def refined(**options: float) -> Edit:
    return dict(Bip(sparsity=0.5, steps=60, batch_size=16, **options).run(regression()))["a"]


def test_the_share_of_zeros_is_exact_and_the_mask_is_another_one() -> None:
    start = dict(GlobalMagnitude(sparsity=0.5).run(regression()))["a"].mask
    mask = refined(mask_rate=0.05).mask
    assert int(mask.sum()) == 8 * 24 // 2
    assert not torch.equal(mask, start)


def test_a_refined_mask_loses_less_than_magnitudes_do() -> None:
    notes = refined(mask_rate=0.05, learning_rate=0.0).notes
    assert notes["loss"] < 0.7 * notes["loss_start"]


def test_without_mask_steps_only_the_kept_weights_are_trained() -> None:
    start = dict(GlobalMagnitude(sparsity=0.5).run(regression()))["a"]
    edit = refined(mask_rate=0.0, learning_rate=1e-2)
    assert torch.equal(edit.mask, start.mask)
    assert edit.notes["loss"] < edit.notes["loss_start"]


def test_weights_that_are_gone_have_gradients_for_their_scores() -> None:
    model = regression()
    assert model.data is not None
    mask = textbook.mask(8, 24)
    learner = Refinement({"a": model.load("a")}, model.data, Bip(batch_size=16), 0)
    learner.masks = {"a": mask}
    found = learner.slopes(1)[1]["a"]
    assert bool((found[~mask] != 0).all())


def test_masks_that_were_there_stay(tiny_llama: LlamaForCausalLM, tokens: Tensor) -> None:
    before = compress.apply(tiny_llama, [compress.Magnitude(sparsity=0.3)], tokens)
    after = compress.apply(tiny_llama, [compress.Magnitude(sparsity=0.3), Bip(sparsity=0.6, steps=3)], tokens)
    assert after.report.rows[-1].sparsity == pytest.approx(0.6, abs=1e-3)
    for name, weight in before.weights.items():
        assert not bool((after.weights[name].mask & ~weight.mask).any())
