"""What stored numbers mean, and how they lie in bytes. Imports nothing else of the package."""

from compress.encodings.base import Encoding, Form
from compress.encodings.uniform import Uniform, UniformForm, fit, quantize
from compress.encodings.weight import Spec, Weight, pack, spec_of, unpack

__all__ = [
    "Encoding",
    "Form",
    "Spec",
    "Uniform",
    "UniformForm",
    "Weight",
    "fit",
    "pack",
    "quantize",
    "spec_of",
    "unpack",
]
