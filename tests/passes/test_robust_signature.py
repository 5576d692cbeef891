"""The properties of robust weight signatures."""

import pytest
import textbook
import torch
from textbook import fine_tunes
from torch import Tensor

from compress import RobustSignature
from compress.config.options import errors_in


def patched(models: list[dict[str, Tensor]], **options: object) -> dict[str, Tensor]:
    chosen = {"layers": 100, **options}
    return textbook.merged(RobustSignature(models=("m",) * (len(models) - 1), **chosen), models, piece=13)


def matrices(model: dict[str, Tensor]) -> list[str]:
    return [name for name, value in model.items() if value.dim() > 1]


def vectors(model: dict[str, Tensor]) -> list[str]:
    return [name for name, value in model.items() if value.dim() == 1]


def test_a_signature_has_no_part_along_what_the_standard_fine_tune_changed() -> None:
    base, standard, robust = models = fine_tunes(2, size=1.0)
    found = patched(models)
    for name in matrices(base):
        signature, common = (found[name] - standard[name]).double(), (standard[name] - base[name]).double()
        change = (robust[name] - base[name]).double()
        assert abs(float((signature * common).sum())) < 1e-5 * float(signature.norm() * common.norm())
        share = (change * common).sum() / common.square().sum()
        assert torch.allclose(signature, change - share * common, atol=1e-6)


def test_without_alpha_it_is_the_target_bit_for_bit() -> None:
    base, standard, _, other = models = fine_tunes(3)
    for target, expected in (("standard", standard), ("base", base), ("last", other)):
        found = patched(models, alpha=0.0, target=target)
        assert all(torch.equal(value, expected[name]) for name, value in found.items()), target


def test_it_is_linear_in_alpha() -> None:
    models = fine_tunes(3)
    nothing, one, two = (patched(models, alpha=alpha) for alpha in (0.0, 1.0, 2.0))
    for name, value in two.items():
        assert torch.allclose(value - nothing[name], 2 * (one[name] - nothing[name]), atol=1e-5)


def test_several_signatures_count_for_their_parts() -> None:
    base, standard, first, second = fine_tunes(3)
    both = patched([base, standard, first, second], alpha=(1.0, 0.5))
    alone = [patched([base, standard, robust], alpha=share) for robust, share in ((first, 1.0), (second, 0.5))]
    for name, value in both.items():
        assert torch.allclose(value, (alone[0][name] + alone[1][name]) / 2, atol=1e-6)


def test_vectors_go_towards_the_robust_models_and_reach_their_mean() -> None:
    base, _, first, second = models = fine_tunes(3)
    found = patched(models)
    assert vectors(base)
    for name in vectors(base):
        assert torch.allclose(found[name], (first[name] + second[name]) / 2, atol=1e-6)


def test_a_model_of_another_task_gets_the_same_patch() -> None:
    base, standard, robust, other = fine_tunes(3)
    here = patched([base, standard, robust])
    there = patched([base, standard, robust, other], target="last")
    for name in matrices(base):
        assert torch.allclose(there[name] - other[name], here[name] - standard[name], atol=1e-6)


@pytest.mark.parametrize("layers", [1, 2])
def test_deeper_layers_are_the_targets(layers: int) -> None:
    models = fine_tunes(2)
    found = patched(models, layers=layers)
    for i, (name, value) in enumerate(found.items()):
        assert torch.equal(value, models[1][name]) == (i >= layers), name


def test_where_the_standard_fine_tune_changed_nothing_all_of_the_robust_one_is_added() -> None:
    base, robust = fine_tunes(1)
    found = patched([base, base, robust])
    assert all(torch.allclose(value, robust[name], atol=1e-6) for name, value in found.items())


def test_rounded_signatures_have_few_values_and_keep_their_ends() -> None:
    base, standard, _ = models = fine_tunes(2, size=1.0)
    exact, rounded = patched(models), patched(models, bits=2)
    for name in matrices(base):
        signature = exact[name] - standard[name]
        found = (rounded[name] - standard[name]).double()
        step = (signature.max() - signature.min()).double() / 3
        place = (found - signature.min()) / step
        assert torch.allclose(place, place.round(), atol=1e-4)
        assert torch.allclose(found.max().float(), signature.max(), atol=1e-5)
        assert (found - signature).abs().max() <= step / 2 + 1e-5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"models": ("a",)}, "name the standard fine-tune first, then at least one robust one"),
        ({"models": ("a", "b"), "target": "last"}, "and the one that is patched"),
        ({"models": ("a", "b"), "alpha": (1.0, 2.0)}, "2 values for 1 robust models"),
        ({"models": ("a", "b"), "layers": 0}, "0 is not a positive number"),
        ({"models": ("a", "b"), "bits": 20}, "20 is not between 1 and 16"),
    ],
)
def test_what_cannot_be_done_is_refused(options: dict[str, object], said: str) -> None:
    assert any(said in error.message for error in errors_in(RobustSignature(**options)))
