"""Run by `test_kernels.py`: the CUDA kernels, compiled for a device that need not be there."""

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from compress.passes.quantize import division_kernel, entry_kernel
from compress.passes.solvers import column_kernel
from compress.runtime import triton_kernels

TYPES = {"codes": "*u8", "table": "*fp32", "first": "*i32", "zero": "*u8", "scale": "*fp16"}
SIZES = {
    "vector": {"BN": 16, "BK": 128},
    "matrix": {"BM": 16, "BN": 32, "BK": 64, "WIDE": False},
}


COLUMN_TYPES = {"codes": "*u8", "kept": "*i8", "group": "*i64", "rows": "i32", "width": "i32", "groups_row": "i32"}
SIZE_TYPES = {"N": "i32", "G": "i32", "C": "i32", "HIGHEST": "fp32"}


def compiled(function: Any, types: dict[str, str], constants: dict[str, Any], warps: int = 4) -> None:
    """Compile a kernel whose other arguments are float32."""
    types = dict.fromkeys(function.arg_names, "*fp32") | types | dict.fromkeys(constants, "constexpr")
    signature = {argument: types[argument] for argument in function.arg_names}
    source = ASTSource(function, signature, constexprs=constants)
    assert triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": warps}).asm["cubin"]


def solvers() -> None:
    for kind, masked in ((0, False), (0, True), (1, True), (2, True)):
        chosen = {"KIND": kind, "MASKED": masked, "HIGHEST": 15.0, "OWN": 1, "KEPT": 2, "OF": 4, "T": 128}
        compiled(column_kernel.project, COLUMN_TYPES, chosen | {"BR": column_kernel.ROWS}, column_kernel.WARPS)
    for gradient in ("*fp32", "*bf16"):
        chosen = {"OWN": 1, "BN": 8, "BC": 128}
        compiled(division_kernel.divide_back, SIZE_TYPES | {"gradient": gradient}, chosen)
    compiled(division_kernel.divide, SIZE_TYPES, chosen)
    for index in ("*u8", "*i64"):
        compiled(entry_kernel.sum_entries, {"index": index, "columns": "i32"}, {"K": 16, "BLOCK": 1024})


def main() -> None:
    for lookup, bits, given in ((0, 3, "fp32"), (1, 4, "bf16"), (2, 8, "fp16")):
        for name, sizes in SIZES.items():
            function = getattr(triton_kernels, name)
            constants = sizes | {"BITS": bits, "LOOKUP": lookup, "ROWS": 1}
            types = TYPES | {"x": f"*{given}", "y": f"*{given}"} | dict.fromkeys(constants, "constexpr")
            signature = {argument: types.get(argument, "i32") for argument in function.arg_names}
            source = ASTSource(function, signature, constexprs=constants)
            assert triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["cubin"]
    solvers()


if __name__ == "__main__":
    main()
