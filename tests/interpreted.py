"""Run by `test_kernels.py`, with TRITON_INTERPRET=1: errors of the CUDA kernels, as JSON."""

import json

import torch
from runtime_layers import ENCODINGS, layer, off, weight

from compress.encodings import unpack
from compress.runtime import triton_kernels
from compress.runtime.lookup import GpuLookup

CASES = {
    **{f"{name}, {mask or 'dense'}": (name, 40, 64, mask) for name in ENCODINGS for mask in ("", "2:4")},
    **{f"{name}, odd": (name, 19, 37, "") for name in ENCODINGS},
    "long rows": ("uniform 3 groups", 16, 288, "half"),
}


def main() -> None:
    if not triton_kernels.AVAILABLE:
        print("null")
        return
    found: dict[str, dict[str, float | None]] = {}
    for case, (name, rows, columns, mask) in CASES.items():
        made = layer(weight(name, rows, columns, mask=mask))
        kernel = GpuLookup.prepare(made.spec, unpack(made.spec, made.stored()), made.stored())
        if kernel is None:
            found[case] = {}
            continue
        found[case] = {}
        for dtype, lengths in ((torch.float32, (1, 3, 17)), (torch.float16, (1, 3)), (torch.bfloat16, (1, 3))):
            for length in lengths:
                x = torch.randn(length, columns).to(dtype)
                y = kernel(x)
                assert y.dtype == dtype
                found[case][f"{dtype} {length}"] = off(y, x.float() @ made.dequantize().T)
    print(json.dumps(found))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
