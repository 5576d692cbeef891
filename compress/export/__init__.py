"""Containers for finished weights. An exporter chooses bytes; it neither rounds nor rescales."""

from compress.export.base import Exporter, Made
from compress.export.hf import Hf
from compress.export.peft import Peft

EXPORTERS: tuple[type[Exporter], ...] = (Hf, Peft)

__all__ = ["EXPORTERS", "Exporter", "Hf", "Made", "Peft"]
