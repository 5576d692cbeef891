"""One statement of an encoding: a grid that the package does not know is decoded, multiplied with and exported."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

import pytest
import torch
from runtime_layers import ENCODINGS, by_onnxruntime, off, weight
from torch import Tensor

from compress.encodings import Encoding, Form, Weight, pack, unpack
from compress.encodings.base import StoredShapes
from compress.encodings.decode import Decoder
from compress.encodings.lookup import BlockScale, Table
from compress.export.gguf.blocks import misfit
from compress.runtime.kernels import Bytes, Codes, Kernel, Tiles
from compress.runtime.low_bit import Halves, Int4

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)  # E2M1
BLOCKS = [(1, 16), (4, 16), (48, 64)]


@dataclass(frozen=True, kw_only=True)
class FloatForm(Form):
    """Floats of 4 bits with a scale for each block, and a scale of the scales."""

    rows: int
    columns: int
    family: ClassVar[str] = "float4"

    def tables(self, shape: tuple[int, int]) -> StoredShapes:
        blocks = (shape[0] // self.rows, shape[1] // self.columns)
        return {"scale": (blocks, torch.float16), "outer_scale": ((1,), torch.float32)}

    def encoding(self, codes: Tensor, tables: Mapping[str, Tensor]) -> "Floats":
        return Floats(codes, tables["scale"], tables["outer_scale"])

    def table(self, tensors: Mapping[str, Tensor], device: torch.device) -> Table:
        return Table(torch.tensor(VALUES, device=device).view(1, -1, 1), self.bits)


@dataclass(frozen=True)
class Floats(Encoding):
    """Codes of such floats."""

    codes: Tensor
    scale: Tensor
    outer_scale: Tensor

    @property
    def form(self) -> FloatForm:
        (rows, columns), (down, across) = self.codes.shape, self.scale.shape
        return FloatForm(bits=4, rows=rows // down, columns=columns // across)

    def tables(self) -> dict[str, Tensor]:
        return {"scale": self.scale, "outer_scale": self.outer_scale}

    def dequantize(self) -> Tensor:
        form = self.form
        scale = self.scale.float() * self.outer_scale
        values = torch.tensor(VALUES)[self.codes.long()]
        return values * scale.repeat_interleave(form.rows, 0).repeat_interleave(form.columns, 1)

    def rows(self, part: slice) -> Self:
        form = self.form
        scale = self.scale.repeat_interleave(form.rows, 0)[part]
        return replace(self, codes=self.codes[part], scale=scale)

    def idle(self) -> Tensor:
        return torch.zeros(1, 1, dtype=torch.uint8)

    def defect(self) -> str | None:
        return self._codes_defect()


def floats(rows: int, columns: int, masked: bool) -> Weight:
    """48 rows of 64 columns, in blocks of so many."""
    made = torch.Generator().manual_seed(rows + columns)
    codes = torch.randint(16, (48, 64), generator=made, dtype=torch.uint8)
    scale = (torch.rand(48 // rows, 64 // columns, generator=made) + 0.5).half()
    mask = torch.rand(48, 64, generator=made) < 0.5 if masked else None
    codes = codes if mask is None else codes * mask
    return Weight(mask=mask, encoding=Floats(codes, scale, torch.tensor([0.37])))


each_block = pytest.mark.parametrize(("rows", "columns"), BLOCKS)
each_mask = pytest.mark.parametrize("masked", [False, True])


@each_block
@each_mask
def test_a_grid_of_a_file_of_its_own_is_decoded_bit_for_bit(rows: int, columns: int, masked: bool) -> None:
    of = floats(rows, columns, masked)
    spec, tensors = pack(of)
    assert torch.equal(unpack(spec, tensors).dequantize(), of.dequantize())
    assert torch.equal(Decoder(spec, tensors).dequantize(), of.dequantize())


@each_block
@each_mask
def test_kernels_multiply_with_it_or_say_that_they_do_not(rows: int, columns: int, masked: bool) -> None:
    of = floats(rows, columns, masked)
    spec, tensors = pack(of)
    x = torch.randn(3, 64)
    kinds: tuple[type[Kernel], ...] = (Tiles, Bytes, Codes, Halves, Int4)
    kernels = {kind.name: kind.prepare(spec, of, tensors) for kind in kinds}
    taken = {name: kernel for name, kernel in kernels.items() if kernel is not None}
    assert taken.keys() >= {"tiles", *(["bytes"] if masked else [])}
    assert not taken.keys() & {"codes", "int4"}, "neither whole numbers nor even steps"
    for name, kernel in taken.items():
        assert off(kernel(x), x @ of.dequantize().T) <= 2e-6, name


@each_block
@each_mask
@pytest.mark.parametrize("fast", [False, True])
def test_onnx_computes_with_it(rows: int, columns: int, masked: bool, fast: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    of, given = floats(rows, columns, masked), torch.randn(3, 64)
    found = by_onnxruntime(of, given, tmp_path, fast=fast)
    assert off(found, given @ of.dequantize().T) <= (0.02 if fast else 2e-6)


def test_blocks_of_ggml_refuse_it_by_its_name() -> None:
    assert misfit(pack(floats(1, 16, False))[0]) == "float4 codes; use a uniform quantizer such as rtn or gptq"


@pytest.mark.parametrize("name", ENCODINGS)
def test_units_times_scales_are_what_a_family_dequantizes_to(name: str) -> None:
    of = weight(name, 12, 64)
    assert of.encoding is not None
    lookup, codes = of.encoding.lookup(), of.encoding.codes
    for part in (slice(None), slice(3, 7)):
        found = lookup.units(codes[part], part)
        if lookup.scale is not None:
            scale = lookup.scale.of(part)
            found = (found.view(len(found), scale.shape[1], -1) * scale[..., None]).view(found.shape)
        assert torch.equal(found, of.encoding.dequantize()[part])


@pytest.mark.parametrize("name", ENCODINGS)
def test_whole_and_even_steps_are_what_the_table_holds(name: str) -> None:
    of = weight(name, 12, 64)
    assert of.encoding is not None
    form, lookup = of.encoding.form, of.encoding.lookup()
    if form.whole:
        assert torch.equal(lookup.table.values.round(), lookup.table.values)
    if form.steps:
        assert form.whole
        assert lookup.scale is not None
        assert bool((lookup.table.values.flatten().diff() == 1).all())
        codes = lookup.steps_from()
        assert codes.shape == lookup.scale.of().shape
        at_zero = codes[:, :1].expand(12, 1).repeat_interleave(64, 1)
        if codes.shape[1] == 1:
            assert not lookup.units(at_zero).any()


def test_a_scale_of_blocks_is_repeated_for_their_rows_and_multiplied_with_the_outer_one() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).half()
    plain = BlockScale(values, 2, 8)
    assert plain.of(slice(1, 3)).tolist() == [[1, 2], [3, 4]]
    assert plain.as_stored().dtype == torch.float16
    outer = replace(plain, outer=torch.tensor([0.5]))
    assert outer.of(slice(1, 3)).tolist() == [[0.5, 1], [1.5, 2]]
    assert outer.as_stored().dtype == torch.float32
    assert BlockScale(values[:1], 4, 8).of(slice(2, 4)).tolist() == [[1, 2]]
