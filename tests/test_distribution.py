"""The shape of a generalised Gaussian is found again, and the entropy is that of the codes which are used."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compress.checkpoint.artifact import Packed
from compress.encodings import Uniform, Weight, fit, pack, quantize
from compress.report.distribution import SHAPES, distribution_of, shape_of


@pytest.mark.parametrize("shape", [0.5, 1.0, 1.5, 2.0, 4.0])
def test_the_shape_of_a_generalised_gaussian_is_found_again(shape: float) -> None:
    torch.manual_seed(0)
    # |x|^b of a generalised Gaussian is Gamma distributed with 1 / b.
    sizes = torch.distributions.Gamma(1 / shape, 1.0).sample((400_000,)) ** (1 / shape)
    signs = torch.randint(2, sizes.shape) * 2 - 1
    assert shape_of(0.01 * sizes * signs) == pytest.approx(shape, rel=0.02)


def test_distributions_without_a_shape_are_told() -> None:
    assert shape_of(torch.zeros(5)) is None
    assert shape_of(torch.zeros(0)) is None
    assert shape_of(torch.tensor([1.0, -1.0])) == pytest.approx(SHAPES[1])
    assert shape_of(torch.eye(2000)) == pytest.approx(SHAPES[0])


def test_what_is_masked_counts_neither_among_numbers_nor_codes(tmp_path: Path) -> None:
    torch.manual_seed(1)
    values = torch.randn(64, 64)
    mask = torch.rand(64, 64) < 0.4
    scale, zero = fit(values, 4, symmetric=True)
    codes = quantize(values, scale, zero, 4)
    sparse = Weight(mask=mask, encoding=Uniform(codes.masked_fill(~mask, 8), scale, zero, 4, symmetric=True))
    spec, tensors = pack(sparse)
    save_file({f"a.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "weights")
    found = distribution_of(Packed(tmp_path / "weights", "a", spec))
    shares = torch.bincount(codes[mask]).double() / int(mask.sum())
    assert found.entropy == pytest.approx(float(-torch.xlogy(shares, shares).sum() / torch.log(torch.tensor(2.0))))
    assert found.shape == shape_of(sparse.dequantize()[mask])
    assert found.shape == pytest.approx(2, abs=0.4)
