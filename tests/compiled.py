"""Run by `test_kernels.py`: the CUDA kernels, compiled for a device that need not be there."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from compress.runtime import triton_kernels

TYPES = {"codes": "*u8", "table": "*fp32", "first": "*i32", "zero": "*u8", "scale": "*fp16"}
SIZES = {
    "vector": {"BN": 16, "BK": 128},
    "matrix": {"BM": 16, "BN": 32, "BK": 64, "WIDE": False},
}


def main() -> None:
    for lookup, bits, given in ((0, 3, "fp32"), (1, 4, "bf16"), (2, 8, "fp16")):
        for name, sizes in SIZES.items():
            function = getattr(triton_kernels, name)
            constants = sizes | {"BITS": bits, "LOOKUP": lookup, "ROWS": 1}
            types = TYPES | {"x": f"*{given}", "y": f"*{given}"} | dict.fromkeys(constants, "constexpr")
            signature = {argument: types.get(argument, "i32") for argument in function.arg_names}
            source = ASTSource(function, signature, constexprs=constants)
            assert triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["cubin"]


if __name__ == "__main__":
    main()
