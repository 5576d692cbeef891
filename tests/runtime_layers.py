"""Packed layers of every encoding, on random codes."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from compress.encodings import (
    Codebooks,
    Floats,
    LowRankFactors,
    OutlierVictim,
    Power,
    Uniform,
    Weight,
    fit_inputs,
    pack,
    spec_of,
)
from compress.encodings.base import Encoding
from compress.encodings.inputs import InputForm
from compress.encodings.minifloat import MINIFLOATS, Number
from compress.encodings.outlier_victim import encode, search
from compress.runtime.linear import PackedLinear

ENCODINGS = (
    *(f"uniform {bits}" for bits in range(2, 9)),
    *(f"uniform {bits} groups" for bits in range(2, 9)),
    "uniform 4 tensor",
    "uniform 4 symmetric",
    "uniform 8 symmetric groups",
    *(f"power {bits} {levels}" for bits in (2, 3, 4, 8) for levels in ("zero", "half")),
    "power 4 zero groups",
    *(f"codebook {bits}" for bits in range(2, 9)),
    "codebook 4 tables",
    "codebook 3 tables scaled",
    "codebook 3 tables groups",
    "codebook 4 groups",
    "olive int4",
    "olive flint4",
    "olive int8",
    "float e4m3",
    "float e4m3 tensor",
    "float e4m3 blocks",
    "float e2m1 powers",
    "float e2m1 outer",
)
# One of each kind and of each way that codes lie in bytes: `make test` runs these, `make real` all.
FEW = (
    "uniform 2", "uniform 3", "uniform 4 groups", "uniform 7 groups", "uniform 8", "uniform 4 tensor", "power 3 zero",
    "power 4 half", "power 4 zero groups", "codebook 4", "codebook 5", "codebook 3 tables scaled", "codebook 4 groups",
    "olive int4", "olive flint4", "olive int8", "float e4m3", "float e4m3 blocks", "float e2m1 outer",
)  # fmt: skip


def encoding(name: str, kept: Tensor, made: torch.Generator) -> Encoding:
    """Codes with random tables, for an (O, I) mask; `groups` are of 32 columns where those divide, else two."""
    rows, columns = kept.shape
    family, kind, *rest = name.split()
    if family == "olive":
        values = torch.randn(rows, columns, generator=made) ** 3 * kept
        scale, _ = search(values, kind)
        return OutlierVictim(encode(values, scale, kind), scale, kind)
    if family == "float":
        return floats_of(kind, rest[0] if rest else "", rows, columns, made)
    bits = int(kind)
    groups = columns // 128 if "wide" in rest else 1
    if "groups" in rest:
        groups = columns // 32 if columns % 32 == 0 else 2 if columns % 2 == 0 else 1
    of_rows = 1 if "tensor" in rest else rows
    scale = (torch.rand(of_rows, groups, generator=made) + 0.5).half()
    codes = torch.randint(2**bits, (rows, columns), generator=made, dtype=torch.uint8)
    if family == "uniform":
        zero = torch.randint(2**bits, scale.shape, generator=made, dtype=torch.uint8)
        symmetric = "symmetric" in rest
        return Uniform(codes, scale, torch.full_like(zero, 2 ** (bits - 1)) if symmetric else zero, bits, symmetric)
    if family == "power":
        codes = codes.clamp(max=2**bits - 2) if rest[0] == "zero" else codes
        return Power(codes, scale, torch.tensor([0.7]), bits, rest[0])
    tables = 3 if "tables" in rest else 1
    table = torch.randn(tables, 2**bits, generator=made).sort(1).values.half()
    row_group = torch.randint(tables, (rows,), generator=made, dtype=torch.uint8)
    return Codebooks(codes, table, row_group, scale if {"scaled", "groups"} & {*rest} else None)


def floats_of(number: Number, scales: str, rows: int, columns: int, made: torch.Generator) -> Floats:
    """Codes that are numbers, with scales for each row, the tensor or blocks, or in bytes for groups."""
    kind = MINIFLOATS[number]
    magnitude = torch.randint(kind.count, (rows, columns), generator=made, dtype=torch.uint8)
    codes = magnitude | torch.randint(2, (rows, columns), generator=made, dtype=torch.uint8) << (kind.bits - 1)
    groups = next(g for g in (columns // 16, 2, 1) if g and columns % g == 0)
    if scales in ("powers", "outer"):
        low, high = (120, 132) if scales == "powers" else (1, 127)
        scale = torch.randint(low, high, (rows, groups), generator=made, dtype=torch.uint8)
        return Floats(codes, scale, torch.tensor([0.25]) if scales == "outer" else None, number)
    shape = {"": (rows, 1), "tensor": (1, 1), "blocks": (rows // 2 if rows % 2 == 0 else 1, groups)}[scales]
    return Floats(codes, (torch.rand(shape, generator=made) + 0.5).half(), None, number)


def weight(name: str, rows: int = 48, columns: int = 64, *, mask: str = "", rank: int = 0) -> Weight:
    """`mask`: `` (dense), `2:4` or `half` (unstructured); `rank`: of a correction in float16."""
    made = torch.Generator().manual_seed(len(name) + rows)
    kept = torch.ones(rows, columns, dtype=torch.bool)
    if mask == "half":
        kept = torch.rand(rows, columns, generator=made) < 0.5
    elif mask == "2:4":
        kept = torch.rand(rows, columns // 4, 4, generator=made).argsort(-1).view(rows, columns) < 2
    codes = encoding(name, kept, made)
    if not codes.form.stores_idle:
        codes = replace(codes, codes=torch.where(kept, codes.codes, codes.idle().expand(kept.shape)))
    factors = [torch.randn(shape, generator=made).half() for shape in ((rank, columns), (rows, rank))]
    return Weight(mask=kept if mask else None, encoding=codes, low_rank=LowRankFactors(*factors) if rank else None)


def layer(
    of: Weight, *, bias: bool = False, transposed: bool = False, input_bits: int = 0, dtype: torch.dtype = torch.float32
) -> PackedLinear:
    """With the weight loaded into it; `dtype` is the type of the bias."""
    if input_bits:
        of = replace(of, inputs=fit_inputs(InputForm(bits=input_bits), 0, 0, torch.zeros(1, 1)))
    _, tensors = pack(of)
    made = PackedLinear(spec_of(of), bias=bias, transposed=transposed, dtype=dtype)
    made.load_state_dict(tensors | ({"bias": torch.linspace(-1, 1, made.out_features)} if bias else {}))
    return made


def off(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest value."""
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max())


def by_onnxruntime(of: Weight, x: Tensor, folder: Path, *, fast: bool) -> Tensor:
    """x times a weight, by a file of ONNX in an empty folder."""
    import onnx_ir as ir
    import onnxruntime

    from compress.export.onnx.files import write_constants
    from compress.export.onnx.ops import MICROSOFT, Ops
    from compress.export.onnx.products import Style, linear
    from compress.progress import Bars

    spec, tensors = pack(of)
    columns = x.shape[1]
    given = ir.Value(name="x", shape=ir.Shape(["rows", columns]), type=ir.TensorType(ir.DataType.FLOAT))
    ops = Ops("layer", {})
    y = linear(ops, given, spec, tensors.__getitem__, Style(fast=fast, accuracy_level=1))
    y.name, y.shape, y.type = "y", ir.Shape(["rows", spec.shape[0]]), given.type
    constants = [*ops.constants.values(), *ops.shared.values()]
    graph = ir.Graph([given], [y], nodes=ops.nodes, initializers=constants, opset_imports={"": 21, MICROSOFT: 1})
    model = ir.Model(graph, ir_version=10)
    write_constants(model, folder, Bars())
    ir.save(model, folder / "model.onnx")
    return torch.from_numpy(onnxruntime.InferenceSession(folder / "model.onnx").run(None, {"x": x.numpy()})[0])
