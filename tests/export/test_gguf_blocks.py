"""Blocks of GGML hold exactly the values of codes."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compress.encodings import Codebooks, SuperBlockForm, SuperBlocks, Uniform
from compress.encodings.super_blocks import KINDS, SuperBlockKind
from compress.export.gguf.blocks import NON_LINEAR, common_type, largest_bytes, to_blocks

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.usefixtures("one_thread")


def uniform(bits: int, symmetric: bool, low: int = 0, high: int | None = None, groups: int = 8) -> Uniform:
    codes = torch.randint(low, 2**bits if high is None else high, (6, 512), dtype=torch.uint8)
    scale = (torch.rand(6, groups) + 0.1).half()
    zero = torch.full(scale.shape, 2 ** (bits - 1), dtype=torch.uint8)
    return Uniform(codes, scale, zero if symmetric else torch.randint_like(zero, 2**bits), bits, symmetric)


def powers(zero: int) -> Uniform:
    """Scales whose multiples are float16."""
    found = uniform(4, False)
    return Uniform(found.codes, torch.full((6, 8), 0.25).half(), torch.full((6, 8), zero, dtype=torch.uint8), 4, False)


def codebook(factor: float = 1.0) -> Codebooks:
    table = torch.tensor([NON_LINEAR]) * factor
    scale = torch.rand(6, 1).half()
    return Codebooks(torch.randint(16, (6, 64), dtype=torch.uint8), table, torch.zeros(6, dtype=torch.uint8), scale)


def super_blocks(kind: SuperBlockKind) -> SuperBlocks:
    """Every code, scale and offset there is."""
    form, columns = SuperBlockForm(bits=KINDS[kind].bits, kind=kind), 512
    tables = {}
    for name, (shape, dtype) in form.tables((6, columns)).items():
        tables[name] = torch.randint(256, shape, dtype=dtype) if dtype == torch.uint8 else torch.randn(shape).half()
    return form.encoding(torch.randint(2**form.bits, (6, columns), dtype=torch.uint8), tables)


BLOCKS: dict[str, tuple[Callable[[], Any], str]] = {
    "three levels": (lambda: uniform(2, True, low=1, groups=2), "TQ2_0"),
    "three levels in small groups": (lambda: uniform(2, True, low=1), "Q4_0"),
    **{f"symmetric {bits}": (lambda bits=bits: uniform(bits, True), kind)
       for bits, kind in zip(range(2, 9), ["Q4_0"] * 3 + ["Q5_0"] + ["Q8_0"] * 3, strict=True)},
    **{f"asymmetric {bits}": (lambda bits=bits: uniform(bits, False), kind)
       for bits, kind in zip(range(2, 8), ["Q4_0"] * 2 + ["Q5_0"] + ["Q8_0"] * 3, strict=True)},
    "exact minimum": (lambda: powers(3), "Q4_1"),
    "its codebook": (codebook, "IQ4_NL"),
    **{kind: (lambda kind=kind: super_blocks(kind), kind.upper()) for kind in KINDS},
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_hold_exactly_the_values_of_the_codes(name: str) -> None:
    make, kind = BLOCKS[name]
    encoding = make()
    blocks = to_blocks(encoding)
    assert not isinstance(blocks, str)
    assert blocks.type == kind
    found = gguf.quants.dequantize(blocks.data.numpy(), gguf.GGMLQuantizationType[kind])
    assert torch.equal(torch.from_numpy(found).view(torch.int32), encoding.dequantize().view(torch.int32))


@pytest.mark.parametrize("name", BLOCKS)
def test_the_size_that_a_plan_shows_is_enough_and_not_twice_too_much(name: str) -> None:
    encoding = BLOCKS[name][0]()
    blocks = to_blocks(encoding)
    assert not isinstance(blocks, str)
    shown = largest_bytes(SimpleNamespace(form=encoding.form, shape=tuple(encoding.codes.shape)))  # type: ignore[arg-type]
    assert blocks.data.numel() <= shown <= (4 if blocks.type == "TQ2_0" else 2) * blocks.data.numel()


def test_what_fits_no_type_exactly_is_said() -> None:
    single = Uniform(uniform(4, True).codes, torch.rand(6, 8), torch.full((6, 8), 8, dtype=torch.uint8), 4, True)
    assert to_blocks(single) == "scales that are not float16"
    assert "from their zero point" in str(to_blocks(uniform(8, False)))
    assert "IQ4_NL's" in str(to_blocks(codebook(1.01)))


@pytest.mark.parametrize(
    ("kinds", "common"),
    [
        (["Q4_0", "Q4_0"], "Q4_0"),
        (["Q4_0", "Q8_0", "Q5_0"], "Q8_0"),
        (["Q4_1", "Q4_1"], "Q4_1"),
        (["Q4_1", "Q4_0"], "Q5_0"),
        (["TQ2_0", "Q4_0"], "Q4_0"),
        (["Q4_0", ""], None),
        (["IQ4_NL", "Q4_0"], None),
        (["Q4_K", "Q4_K"], "Q4_K"),
        (["Q4_K", "Q6_K"], None),
        (["Q4_K", "Q4_0"], None),
    ],
)
def test_several_weights_share_the_narrowest_type_that_holds_all(kinds: list[str], common: str | None) -> None:
    assert common_type(kinds) == common


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "Q8_0"])
def test_a_wider_type_holds_the_same_values(kind: str) -> None:
    codes = torch.randint(16, (4, 64), dtype=torch.uint8)
    weight = Uniform(codes, (torch.rand(4, 2) + 0.1).half(), torch.full((4, 2), 8, dtype=torch.uint8), 4, True)
    found = to_blocks(weight, kind)
    assert not isinstance(found, str)
    values = gguf.quants.dequantize(found.data.numpy(), gguf.GGMLQuantizationType[kind])
    assert torch.equal(torch.from_numpy(values), weight.dequantize())
