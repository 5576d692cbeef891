"""What stored numbers mean, and how they lie in bytes. Imports nothing else of the package."""

from compress.encodings.uniform import Uniform, fit, quantize
from compress.encodings.weight import Spec, Weight, pack, spec_of, unpack

__all__ = ["Spec", "Uniform", "Weight", "fit", "pack", "quantize", "spec_of", "unpack"]
