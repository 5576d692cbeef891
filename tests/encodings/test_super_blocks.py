"""Super-blocks: what is stored, what it means, and how scales are found."""

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from runtime_layers import by_onnxruntime, off
from torch import Tensor

from compress.encodings import Spec, SuperBlocks, Weight, pack, super_blocks, super_scales, unpack
from compress.encodings.decode import Decoder
from compress.encodings.rows import decode_rows, row_starts
from compress.encodings.super_blocks import KINDS, SuperBlockKind
from compress.runtime.columns import CodeColumns
from compress.runtime.kernels import Bytes, Codes, Kernel, Tiles
from compress.runtime.low_bit import Halves, Int4, Int8

BITS = {"q2_k": 2.625, "q3_k": 3.4375, "q4_k": 4.5, "q5_k": 5.5, "q6_k": 6.5625}
pytestmark = pytest.mark.usefixtures("one_thread")


def weight(rows: int = 6, columns: int = 512, seed: int = 0) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    spread = torch.rand(rows, columns // 16, generator=made).mul(3).exp().repeat_interleave(16, 1)
    return torch.randn(rows, columns, generator=made) * spread * 0.02


def rounded(w: Tensor, kind: SuperBlockKind, search: Any = "minmax", importance: Tensor | None = None) -> SuperBlocks:
    return super_blocks.quantize(w, kind, *super_scales.fit(w, kind, search=search, importance=importance))


def test_what_is_stored_says_all_of_it_and_every_way_of_decoding_gives_the_same() -> None:
    for kind, masked in product(KINDS, (False, True)):
        w = weight()
        mask = torch.rand(w.shape, generator=torch.Generator().manual_seed(1)) < 0.5 if masked else None
        found = rounded(w, kind, "mse")
        if mask is not None:
            found = replace(found, codes=torch.where(mask, found.codes, found.idle()))
        of = Weight(mask=mask, encoding=found)
        spec, tensors = pack(of)
        assert found.defect() is None
        assert Spec.from_json(spec.to_json()) == spec
        assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == spec.tensors()
        meant, rows = of.dequantize(), torch.tensor([4, 1, 4])
        assert torch.equal(unpack(spec, tensors).dequantize(), meant)
        assert torch.equal(Decoder(spec, tensors).dequantize(), meant)
        starts = row_starts(spec, tensors) if masked else None
        assert torch.equal(decode_rows(spec, tensors, rows, starts), meant[rows])
        if not masked:
            assert found.bits_per_weight == 8 * spec.num_bytes / w.numel() == BITS[kind]


def test_every_weight_is_at_the_nearest_step_of_its_block() -> None:
    for kind in KINDS:
        w = weight()
        found, stated = rounded(w, kind, "mse"), KINDS[kind]
        codes = [torch.full_like(found.codes, code) for code in range(2**stated.bits)]
        every = [replace(found, codes=each).dequantize() for each in codes]
        distance = (torch.stack(every) - w).abs().amin(0)
        assert torch.allclose((found.dequantize() - w).abs(), distance, rtol=1e-4, atol=1e-7)


def test_a_search_loses_less_and_weighs_columns_where_asked() -> None:
    w, importance = weight(seed=3), torch.rand(512, generator=torch.Generator().manual_seed(4)).mul(4).exp()

    def lost(found: SuperBlocks, weighed: bool) -> float:
        error = (found.dequantize() - w).square()
        return float((error * importance if weighed else error).sum())

    for kind in KINDS:
        usual, least = rounded(w, kind), rounded(w, kind, "mse")
        assert lost(least, weighed=False) < 0.95 * lost(usual, weighed=False)
        assert lost(rounded(w, kind, "weighted", importance), weighed=True) < lost(least, weighed=True)


def test_weights_of_one_sign_zeros_and_very_small_and_large_ones_are_held() -> None:
    for kind, search in product(KINDS, ("minmax", "mse")):
        w = weight(8)
        w[1], w[2], w[3] = w[1].abs() + 0.1, -w[2].abs() - 0.1, 0.0
        w[4, :256], w[5], w[6], w[7] = 0.0, w[5] * 1e-9, w[6] * 1e6, 0.5
        found = rounded(w, kind, search)
        assert found.defect() is None
        made = found.dequantize()
        assert not made[3].any()
        assert not made[4, :256].any()
        coarse = {"q2_k": 0.4, "q3_k": 0.2}.get(kind, 0.1)
        for row in (0, 1, 2, 6, 7):
            assert float((made[row] - w[row]).norm() / w[row].norm()) < coarse, row


def test_a_column_that_nothing_reads_does_not_stop_a_weighted_search() -> None:
    importance = torch.ones(512)
    importance[:64] = 0
    for kind in KINDS:
        for given in (importance, torch.zeros(512)):
            found = rounded(weight(), kind, "weighted", given)
            assert float((found.dequantize() - weight()).norm() / weight().norm()) < 0.3


def test_rows_are_what_they_are_in_the_whole_and_put_together_again() -> None:
    for kind in KINDS:
        found = rounded(weight(), kind)
        whole = found.dequantize()
        assert torch.equal(rounded(weight()[1:4], kind).dequantize(), whole[1:4])
        assert torch.equal(found.rows(slice(1, 4)).dequantize(), whole[1:4])
        parts = [found.rows(part) for part in (slice(0, 2), slice(2, 3), slice(3, 6))]
        together = parts[0].above(parts[1:])
        assert torch.equal(together.dequantize(), whole)
        assert all(torch.equal(t, found.tables()[name]) for name, t in together.tables().items())


def test_kernels_and_onnx_multiply_with_them_or_say_that_they_do_not(tmp_path: Path) -> None:
    for kind, masked in product(KINDS, (False, True)):
        w = weight(32)
        mask = torch.rand(w.shape, generator=torch.Generator().manual_seed(1)) < 0.5 if masked else None
        of = Weight(mask=mask, encoding=rounded(w, kind))
        spec, tensors = pack(of)
        x = torch.randn(3, 512, generator=torch.Generator().manual_seed(2))
        kinds: tuple[type[Kernel], ...] = (Tiles, Bytes, Codes, Halves, Int4, CodeColumns)
        taken = {each.name: kernel for each in kinds if (kernel := each.prepare(spec, of, tensors))}
        assert "tiles" in taken
        for name, kernel in taken.items():
            assert off(kernel(x), x @ of.dequantize().T) <= 2e-6, name
        pytest.importorskip("onnxruntime")
        for fast in (False, True):
            folder = tmp_path / f"{kind} {masked} {fast}"
            folder.mkdir()
            assert off(by_onnxruntime(of, x, folder, fast=fast), x @ of.dequantize().T) <= 2e-6
        again = Int8.prepare(spec, of, tensors)
        assert again is not None
        assert off(again(x), x @ of.dequantize().T) <= 0.03


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kind": "q7_k"}, "'q7_k' with 4 bits .* reads q2_k of 2 bits"),
        ({"bits": 5}, "'q4_k' with 5 bits"),
        ({"shape": [6, 384]}, "384 columns are not a multiple of 256"),
    ],
    ids=str,
)
def test_a_file_that_states_something_else_is_refused(changed: dict[str, object], message: str) -> None:
    spec, _ = pack(Weight(encoding=rounded(weight(), "q4_k")))
    with pytest.raises(ValueError, match=message):
        Spec.from_json({**spec.to_json(), **changed})


def test_scales_that_are_not_finite_are_defects() -> None:
    found = rounded(weight(), "q4_k")
    assert found.scale.outer is not None
    broken = replace(found, scale=replace(found.scale, outer=found.scale.outer * torch.inf))
    assert broken.defect() == "scales that are not finite"
    assert "do not fit 4 bits" in str(replace(found, codes=found.codes | 16).defect())
