"""OliVe."""

import pytest
import torch
from textbook import mask, target, weight
from torch import Tensor, nn

import compress
from compress.config.options import errors_in
from compress.encodings.outlier_victim import PAIR_TYPES, encode, quantize_dequantize, search
from compress.passes import Olive, Override, Rtn
from compress.passes.base import Edit
from compress.passes.quantize.olive import solve

pytestmark = pytest.mark.usefixtures("one_thread")


def with_outliers(rows: int = 16, columns: int = 128, share: float = 0.01, times: float = 12.0) -> Tensor:
    w = weight(rows, columns)
    hit = torch.rand(rows, columns, generator=torch.Generator().manual_seed(5)) < share
    return torch.where(hit, w.sign() * times, w)


def relative_error(w: Tensor, edit: Edit) -> float:
    assert edit.encoding is not None
    return float((edit.encoding.dequantize() - w).norm() / w.norm())


@pytest.mark.parametrize("normal", ["int4", "flint4"])
@pytest.mark.parametrize("double", ["larger", "even"])
@pytest.mark.parametrize("columns", [64, 63])
def test_olive_is_the_search_and_the_encoding_and_nothing_else(normal: str, double: str, columns: int) -> None:
    w = with_outliers(8, columns, share=0.05)
    e = Olive(normal=normal, double_outlier=double, lower=0.8, upper=1.6, step=0.1).run(target(w)).encoding
    scale, _ = search(w, normal, double_outlier=double, lower=0.8, upper=1.6, step=0.1)
    assert e.normal == normal
    assert torch.equal(e.scale, scale)
    assert torch.equal(e.codes, encode(w, scale, normal, double))
    assert torch.equal(e.dequantize(), quantize_dequantize(w, scale, normal, double))


def test_auto_takes_the_type_with_the_lower_error_for_each_matrix() -> None:
    gaussian = weight(8, 256)
    heavy = gaussian * gaussian.abs().square()
    chosen = set()
    for w in (gaussian, heavy):
        errors = {n: relative_error(w, Olive(normal=n).run(target(w))) for n in ("int4", "flint4")}
        e = Olive().run(target(w))
        assert relative_error(w, e) == min(errors.values())
        assert e.encoding.normal == min(errors, key=errors.__getitem__)
        chosen.add(e.encoding.normal)
    assert chosen == {"int4", "flint4"}


@pytest.mark.parametrize("normal", ["auto", "int4", "flint4"])
def test_at_8_bits_it_is_always_int8(normal: str) -> None:
    w = with_outliers()
    edit = Olive(bits=8, normal=normal).run(target(w))
    assert edit.encoding.form == Olive(bits=8, normal=normal).form((16, 128))
    assert edit.encoding.normal == "int8"
    assert relative_error(w, edit) < 0.4 * relative_error(w, Olive(normal=normal).run(target(w)))


@pytest.mark.parametrize("normal", ["int4", "flint4"])
def test_the_form_is_known_beforehand(normal: str) -> None:
    assert Olive(normal=normal).run(target(weight(8, 64))).encoding.form == Olive(normal=normal).form((8, 64))


def test_outliers_cost_rounding_dearly_and_olive_little() -> None:
    clean, dirty = weight(16, 256), with_outliers(16, 256)
    small = dirty.abs() < 6

    def error_of_the_small(edit: Edit, w: Tensor) -> float:
        return float((edit.encoding.dequantize() - w)[small].norm() / w[small].norm())

    for rtn in (Rtn(bits=4, symmetric=True), Rtn(bits=4, symmetric=True, scale_search="mse"), Rtn(bits=4)):
        assert relative_error(dirty, Olive().run(target(dirty))) < 0.6 * relative_error(dirty, rtn.run(target(dirty)))
    assert error_of_the_small(Olive().run(target(dirty)), dirty) < 2 * error_of_the_small(
        Olive().run(target(clean)), clean
    )
    assert (
        Olive().run(target(dirty)).encoding.bits_per_weight
        == Rtn(bits=4, symmetric=True).run(target(dirty)).encoding.bits_per_weight
    )


def test_the_share_of_victims_is_reported() -> None:
    w = with_outliers(share=0.02, times=40.0)
    edit = Olive(normal="int4").run(target(w))
    victims = (edit.encoding.codes == PAIR_TYPES["int4"].identifier).float().mean()
    assert 0.01 < float(victims) < 0.03
    assert dict(edit.notes) == {"victims": float(victims)}
    assert Olive(bits=8).run(target(weight(4, 8))).notes["victims"] == 0


def test_a_matrix_that_4_bits_fit_badly_is_rescued_with_8_and_no_other() -> None:
    good, bad = weight(8, 128).sign(), weight(8, 128)
    errors = [relative_error(w, Olive().run(target(w))) for w in (good, bad)]
    assert errors[1] > 1.5 * errors[0]
    limit = sum(errors) / 2
    kept, rescued = (Olive(rescue_error=limit).run(target(w)) for w in (good, bad))
    assert torch.equal(kept.encoding.codes, Olive().run(target(good)).encoding.codes)
    assert "rescued_error" not in kept.notes
    assert rescued.notes["rescued_error"] == pytest.approx(errors[1], rel=1e-4)
    assert torch.equal(rescued.encoding.codes, Olive(bits=8).run(target(bad)).encoding.codes)
    assert rescued.encoding.form.bits == 8
    assert "rescued_error" not in Olive(bits=8, rescue_error=1e-9).run(target(bad)).notes


def test_layers_are_rescued_by_name_with_overrides() -> None:
    model = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 8))
    result = compress.apply(model, [Olive(overrides=(Override("1", {"bits": 8}),))])
    assert {name: w.encoding.form.bits for name, w in result.weights.items()} == {"0": 4, "1": 8}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("columns", [64, 63])
def test_masked_weights_stay_zero(bits: int, share: float, columns: int) -> None:
    kept = mask(8, columns, share=share)
    edit = Olive(bits=bits).run(target(with_outliers(8, columns), kept=kept))
    assert torch.equal(edit.mask, kept)
    assert edit.encoding.defect() is None
    assert bool((edit.encoding.dequantize()[~kept] == 0).all())


def test_masked_neighbours_are_victims_that_cost_nothing() -> None:
    w = with_outliers(16, 128, share=0.03, times=20.0)
    alternate = (torch.arange(128) % 2 == 0).expand(16, 128)  # every pair has one weight left
    sparse = Olive(normal="int4").run(target(w, kept=alternate))
    pressed = w[:, ::2].contiguous()  # the same weights with nobody to sacrifice but each other
    dense = Olive(normal="int4").run(target(pressed))
    assert float((sparse.encoding.dequantize() - w * alternate).norm()) < 0.7 * float(
        (dense.encoding.dequantize() - pressed).norm()
    )


def test_of_two_neighbouring_outliers_one_is_lost() -> None:
    w = weight(4, 1024) * 0.1
    w[:, 10], w[:, 11] = 2.0, -3.0
    larger = Olive(normal="int4", double_outlier="larger").run(target(w)).encoding.dequantize()
    even = Olive(normal="int4", double_outlier="even").run(target(w)).encoding.dequantize()
    assert bool((larger[:, 10] == 0).all())
    assert bool(((larger[:, 11] + 3).abs() < 0.6).all())
    assert bool(((even[:, 10] - 2).abs() < 0.4).all())
    assert bool((even[:, 11] == 0).all())


def test_a_wider_search_is_not_worse() -> None:
    w = with_outliers()
    narrow, wide = (Olive(lower=lo, upper=hi).run(target(w)) for lo, hi in ((0.99, 1.0), (0.75, 2.5)))
    assert relative_error(w, wide) < relative_error(w, narrow)


def test_the_error_that_is_returned_is_the_error() -> None:
    w = with_outliers()
    e, error = solve(w, types=("int4", "flint4"), double_outlier="larger", lower=0.75, upper=2.5, step=0.02)
    assert error == pytest.approx(float((e.dequantize() - w).norm() / w.norm()), rel=1e-4)
    zeros = torch.zeros(4, 8)
    assert solve(zeros, types=("int8",), double_outlier="even", lower=1, upper=2, step=1)[1] == 0


def test_olive_needs_no_data_and_is_its_own_fallback() -> None:
    pass_ = Olive(bits=8)
    assert pass_.needs == "none"
    assert pass_.stand_in() == pass_


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"bits": 3}, "bits"),
        ({"lower": 0.0}, "lower"),
        ({"lower": 2.5}, "upper"),
        ({"step": 0.0}, "step"),
        ({"rescue_error": 0.0}, "rescue_error"),
    ],
)
def test_impossible_options_are_named(options: dict[str, object], option: str) -> None:
    assert [e.option for e in errors_in(Olive(**options))] == [option]


@pytest.mark.real
def test_the_demo_model_loses_less_than_with_rounding_at_no_more_bits() -> None:
    model, tokenizer = compress.demo.load()
    evaluation = compress.load_tokens("demo", tokenizer, samples=2, length=256, split="evaluation")
    found = {}
    for pass_ in (Rtn(bits=4, symmetric=True), Olive()):
        found[pass_.key] = compress.apply(model, [pass_], evaluation=evaluation).report.rows
    olive, rtn = found["olive"][-1], found["rtn"][-1]
    assert olive.bits_per_weight == pytest.approx(rtn.bits_per_weight, abs=0.001)
    assert olive.kl < rtn.kl
    assert olive.perplexity < 1.05 * found["olive"][0].perplexity
