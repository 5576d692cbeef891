"""Run by `test_kernels.py`, with TRITON_INTERPRET=1: errors of the CUDA kernels, as JSON."""

import json
import sys

import torch
from runtime_layers import ENCODINGS, layer, off, weight

from compress.encodings import unpack
from compress.runtime import triton_jit
from compress.runtime.lookup import GpuLookup

WIDE, NARROW = (torch.float16, 20), (torch.bfloat16, 3)
EXACT = (torch.float32, 1)
MASKED = ("uniform 4 groups", "uniform 3", "power 4 zero", "power 4 half", "codebook 4", "codebook 8", "olive int4")
ODD = ("uniform 3", "uniform 5 groups", "uniform 7", "uniform 8", "codebook 4 tables", "olive flint4", "olive int8")
CASES = {
    **{f"{name}, dense": (name, 40, 64, "", (NARROW, WIDE)) for name in ENCODINGS},
    **{f"{name}, 2:4": (name, 24, 64, "2:4", (NARROW,)) for name in MASKED},
    **{f"{name}, odd": (name, 19, 37, "", (EXACT, WIDE, NARROW)) for name in ODD},
    "long rows": ("uniform 3 groups", 16, 288, "half", (EXACT, NARROW, WIDE)),
    "groups of 128": ("uniform 4 wide", 32, 640, "", (EXACT, NARROW, WIDE)),
    "levels in groups of 128": ("power 4 zero wide", 32, 640, "", (EXACT, NARROW, WIDE)),
    "two groups in a row of 100": ("uniform 4 groups", 16, 100, "", (EXACT, NARROW, WIDE)),
}
# One of every kind: `make test` runs these, `make real` all.
QUICK = (
    "uniform 4 groups, dense", "power 4 half, dense", "codebook 4, dense", "olive int4, dense",
    "uniform 4 groups, 2:4", "codebook 8, 2:4", "olive flint4, odd", "two groups in a row of 100",
)  # fmt: skip


def main(names: list[str]) -> None:
    if not triton_jit.AVAILABLE:
        print("null")
        return
    found: dict[str, dict[str, float | None]] = {}
    for case in names or CASES:
        name, rows, columns, mask, inputs = CASES[case]
        made = layer(weight(name, rows, columns, mask=mask, rank=2 if "uniform 4" in name else 0))
        kernel = GpuLookup.prepare(made.spec, unpack(made.spec, made.stored()), made.stored())
        found[case] = {}
        if kernel is None:
            continue
        for dtype, length in inputs:
            x = torch.randn(length, columns).to(dtype)
            y = kernel(x)
            assert y.dtype == dtype
            found[case][f"{dtype} {length}"] = off(y, x.float() @ made.dequantize().T)
    print(json.dumps(found))


if __name__ == "__main__":
    torch.manual_seed(0)
    main(sys.argv[1:])
