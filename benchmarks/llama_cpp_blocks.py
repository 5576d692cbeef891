"""Blocks that llama.cpp's quantizer makes of weights: run by an interpreter that has xllamacpp, numpy and safetensors.

    python llama_cpp_blocks.py q4_k GIVEN.safetensors BLOCKS.safetensors

GIVEN has weights (O, I) float32, and for some the importance of their columns (I,) as NAME@inputs.
"""

import ctypes
import sys
from pathlib import Path

import numpy as np
import xllamacpp
from safetensors.numpy import load_file, save_file

TYPES = {"q2_k": (10, 84), "q3_k": (11, 110), "q4_k": (12, 144), "q5_k": (13, 176), "q6_k": (14, 210)}
COLUMNS = 256  # of a super-block, in so many bytes


def main() -> None:
    kind, given, blocks = sys.argv[1:]
    library = ctypes.CDLL(str(next(Path(xllamacpp.__path__[0]).glob("xllamacpp*.so"))))
    quantize = library.ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    number, width = TYPES[kind]
    there, made = load_file(given), {}
    for name, weight in there.items():
        if name.endswith("@inputs"):
            continue
        rows, columns = weight.shape
        out = np.zeros((rows, columns // COLUMNS * width), np.uint8)
        inputs = there.get(f"{name}@inputs")
        at = None if inputs is None else inputs.ctypes.data
        quantize(number, weight.ctypes.data, out.ctypes.data, 0, rows, columns, at)
        made[name] = out
    save_file(made, blocks)


if __name__ == "__main__":
    main()
