"""What kernels are written with: Triton where it is installed, and names that do no harm where it is not."""

from __future__ import annotations

import os
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

AVAILABLE = triton is not None
jit: Any = triton.jit if AVAILABLE else lambda function: function
# For what is launched: for any number M of rows of input it is compiled once.
kernel: Any = triton.jit(do_not_specialize=["M"]) if AVAILABLE else jit
constexpr: Any = tl.constexpr if AVAILABLE else lambda value: value  # by this name: annotations are read as text
SPELLED = constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # by an interpreter, which has no assembler

__all__ = ["AVAILABLE", "SPELLED", "constexpr", "jit", "kernel", "tl"]
