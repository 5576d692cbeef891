"""The passes, listed by hand. A new method is one file, one line here and one test file."""

from compress.passes.base import LinearPass, ModelPass, Override, Pass
from compress.passes.prune.global_magnitude import GlobalMagnitude
from compress.passes.prune.magnitude import Magnitude
from compress.passes.prune.sparsegpt import SparseGpt
from compress.passes.prune.wanda import Wanda
from compress.passes.quantize.gptq import Gptq
from compress.passes.quantize.rtn import Rtn

PASSES: tuple[type[Pass], ...] = (Rtn, Gptq, Magnitude, GlobalMagnitude, Wanda, SparseGpt)

__all__ = [
    "PASSES",
    "GlobalMagnitude",
    "Gptq",
    "LinearPass",
    "Magnitude",
    "ModelPass",
    "Override",
    "Pass",
    "Rtn",
    "SparseGpt",
    "Wanda",
]
