"""What stored numbers mean, and how they lie in bytes. Imports nothing else of the package."""

from __future__ import annotations

from compress.encodings.base import Encoding, Form
from compress.encodings.codebook import CodebookForm, Codebooks
from compress.encodings.floats import FloatForm, Floats
from compress.encodings.inputs import InputForm, InputGrid, fit_inputs
from compress.encodings.low_rank import LowRankFactors, LowRankForm
from compress.encodings.outlier_victim import OutlierVictim, OutlierVictimForm
from compress.encodings.power import Power, PowerForm
from compress.encodings.super_blocks import SuperBlockForm, SuperBlocks
from compress.encodings.uniform import Uniform, UniformForm, fit, quantize
from compress.encodings.weight import FACTORED, Spec, Weight, pack, spec_of, unpack

__all__ = [
    "FACTORED",
    "CodebookForm",
    "Codebooks",
    "Encoding",
    "FloatForm",
    "Floats",
    "Form",
    "InputForm",
    "InputGrid",
    "LowRankFactors",
    "LowRankForm",
    "OutlierVictim",
    "OutlierVictimForm",
    "Power",
    "PowerForm",
    "Spec",
    "SuperBlockForm",
    "SuperBlocks",
    "Uniform",
    "UniformForm",
    "Weight",
    "fit",
    "fit_inputs",
    "pack",
    "quantize",
    "spec_of",
    "unpack",
]
