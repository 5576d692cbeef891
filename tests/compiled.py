"""Run by `test_kernels.py`: the CUDA kernels, compiled for devices that need not be there."""

import re
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from compress.passes.quantize import division_kernel, entry_kernel
from compress.passes.solvers import column_kernel
from compress.runtime import triton_kernels
from compress.runtime.launch import EACH, GATHER, ONE, PAIRS, RECORDS, SLABS, STEPS, TABLE

TYPES = {"words": "*i32", "tables": "*i32", "first": "*i32", "zero": "*u8", "scale": "*fp16"}
PRODUCT = {"GROUP": 128, "SHARED": True, "ESCAPE": -1, "P": 4}
NARROW = {"FULL": True, "BM": 8, "AHEAD": 1, "WIDTH": 4}
WIDE = {"BM": 64, "STAGES": 3}
ALIGNED = ("K", "N", "G", "stride")


def compiled(name: str, given: str, architecture: int = 90, **constants: object) -> str:
    """The kernel between Triton's language and machine code, where layouts are seen."""
    function = getattr(triton_kernels, name)
    constants = PRODUCT | (NARROW if name == "narrow" else WIDE) | constants
    types = TYPES | {"x": f"*{given}", "y": f"*{given}", "table": f"*{given}"} | dict.fromkeys(constants, "constexpr")
    signature = {argument: types.get(argument, "i32") for argument in function.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, argument in enumerate(function.arg_names)
        if signature[argument].startswith("*") or argument in ALIGNED
    }
    source = ASTSource(function, signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": 4, "num_stages": 1 if name == "narrow" else 3}
    found = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    assert found.asm["cubin"]
    return str(found.asm["ttgir"])


COLUMN_TYPES = {"codes": "*u8", "kept": "*i8", "group": "*i64", "rows": "i32", "width": "i32", "groups_row": "i32"}
SIZE_TYPES = {"N": "i32", "G": "i32", "C": "i32", "HIGHEST": "fp32"}


def machine_code(function: Any, types: dict[str, str], constants: dict[str, Any], warps: int = 4) -> None:
    """Compile a kernel whose other arguments are float32."""
    types = dict.fromkeys(function.arg_names, "*fp32") | types | dict.fromkeys(constants, "constexpr")
    signature = {argument: types[argument] for argument in function.arg_names}
    source = ASTSource(function, signature, constexprs=constants)
    assert triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": warps}).asm["cubin"]


def solvers() -> None:
    for kind, masked, again in (
        (0, False, False), (0, True, False), (0, False, True), (0, True, True), (1, True, False), (2, True, False),
    ):  # fmt: skip
        solver(kind, masked, again)
    for gradient in ("*fp32", "*bf16"):
        chosen = {"OWN": 1, "BN": 8, "BC": 128}
        machine_code(division_kernel.divide_back, SIZE_TYPES | {"gradient": gradient}, chosen)
    machine_code(division_kernel.divide, SIZE_TYPES, chosen)
    for index in ("*u8", "*i64"):
        machine_code(entry_kernel.sum_entries, {"index": index, "columns": "i32"}, {"K": 16, "BLOCK": 1024})


def solver(kind: int, masked: bool, again: bool) -> None:
    chosen = {"KIND": kind, "MASKED": masked, "HIGHEST": 15.0, "OWN": 1, "KEPT": 2, "OF": 4, "AGAIN": again}
    chosen |= {"T": 128, "BR": column_kernel.ROWS}
    machine_code(column_kernel.project, COLUMN_TYPES, chosen, column_kernel.WARPS)


def main() -> None:
    quick = {
        "steps": {"MODE": STEPS, "BITS": 4, "GROUPS": RECORDS, "ZEROS": True, "WIDTH": 8},
        "steps from the middle": {"MODE": STEPS, "BITS": 3, "GROUPS": ONE, "ZEROS": False},
        "table of each row": {"MODE": TABLE, "BITS": 4, "GROUPS": RECORDS, "ZEROS": False, "SHARED": False},
        "pairs": {"MODE": PAIRS, "BITS": 4, "GROUPS": ONE, "ZEROS": False, "ESCAPE": 8},
        "read one by one": {"MODE": GATHER, "BITS": 8, "GROUPS": SLABS, "ZEROS": False, "GROUP": 32, "ESCAPE": 128},
    }
    if sys.argv[1] == "one":
        compiled("narrow", "bf16", BM=8, **quick["steps"])
        solver(0, masked=True, again=True)
        return
    for name, constants in quick.items():
        for given, rows in (("bf16", 8), ("fp16", 16)):
            text = compiled("narrow", given, BM=rows, **constants)
            # A weight that is decoded in another order than the product wants goes through shared memory.
            assert set(re.findall(r"kWidth = (\d+)", text)) == {str(constants.get("WIDTH", 4))}, (name, given)
            assert "local_alloc" not in text, (name, given)
        assert compiled("narrow", "fp32", **constants), name
    constants = {"BITS": 4, "GROUPS": EACH, "ZEROS": True, "FULL": False, "AHEAD": 2}
    assert compiled("narrow", "fp32", MODE=STEPS, **constants)
    assert compiled("narrow", "bf16", MODE=TABLE, **constants)
    for architecture in (80, 90):
        text = compiled("wide", "bf16", architecture, **{k: v for k, v in quick["steps"].items() if k != "WIDTH"})
        assert architecture == 80 or "warp_group_dot" in text
    assert compiled("wide", "fp16", MODE=PAIRS, BITS=4, GROUPS=SLABS, ZEROS=False, GROUP=32)
    solvers()


if __name__ == "__main__":
    main()
