"""What is said of a model that is tried: its class, how it is made small, its inputs, what is to come out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
import transformers
from shrink import IMAGE, SPECIAL, VOCABULARY, shrunk
from torch import Tensor

Inputs = Literal["tokens", "sequences", "images", "pairs", "speech", "waves"]
SAMPLES, LENGTH = 4, 16
FRAMES = 32  # of a spectrogram
WAVE = 800  # numbers of a sound


@dataclass(frozen=True)
class Entry:
    """A model of transformers.

    Attributes:
        architecture: its class.
        changes: what its configuration has otherwise than `shrink.py` says.
        inputs: what it is called with.
        share: of the numbers in its matrices that a quantizer is to reach at least, embeddings and what is `apart` left
            out.
        apart: patterns of parameters that are said to stay dense.
        exclude: patterns of layers that the passes leave out, such as those that no group divides.
        without: methods that refuse it, in words.
        refused: words of the message with which the package refuses it today.
        tolerance: largest difference between outputs of the packed and the dense folder.
        exports: containers that hold it.
        quick: tried in `make test`; all others in `make real`.
        label: after its class, where a class is there twice.
    """

    architecture: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    inputs: Inputs = "tokens"
    share: float = 0.9
    apart: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    refused: str = ""
    tolerance: float = 0.0
    exports: tuple[str, ...] = ("hf",)
    quick: bool = False
    label: str = ""

    @property
    def name(self) -> str:
        """By which it is chosen."""
        return f"{self.architecture}-{self.label}" if self.label else self.architecture

    @property
    def model_type(self) -> str:
        """What its config.json says."""
        found: str = self._class().config_class.model_type
        return found

    def build(self) -> transformers.PreTrainedModel:
        """The model, small and random, the same at every call."""
        torch.manual_seed(7)
        config = shrunk(self._class().config_class, self.changes)
        model: transformers.PreTrainedModel = self._class()(config).eval()
        return model

    def stays_dense(self, name: str) -> bool:
        """Whether a parameter or module is among those that are said to stay dense."""
        return any(fnmatchcase(name, pattern) for pattern in self.apart)

    def batch(self, seed: int) -> dict[str, Tensor]:
        """What the model is called with, by name."""
        made = torch.Generator().manual_seed(seed)

        def ids() -> Tensor:
            return torch.randint(4, VOCABULARY - SPECIAL, (SAMPLES, LENGTH), generator=made)

        def numbers(*shape: int) -> Tensor:
            return torch.rand(SAMPLES, *shape, generator=made)

        match self.inputs:
            case "tokens":
                return {"input_ids": ids()}
            case "sequences":
                return {"input_ids": ids(), "decoder_input_ids": ids()}
            case "images":
                return {"pixel_values": numbers(3, IMAGE, IMAGE)}
            case "pairs":
                return {"input_ids": ids(), "pixel_values": numbers(3, IMAGE, IMAGE)}
            case "speech":
                return {"input_features": numbers(80, 2 * FRAMES), "decoder_input_ids": ids()}
            case "waves":
                return {"input_values": numbers(WAVE)}

    def calibration(self) -> Any:
        """The same as `compress.run` takes it: the first tensor alone, from which a decoder's own inputs follow."""
        return self._given(self.batch(1))

    def evaluation(self) -> Any:
        """Other data, to measure with; of an image classifier, with labels."""
        data = self._given(self.batch(2))
        return (data, torch.arange(SAMPLES) % 2) if "ImageClassification" in self.architecture else data

    def _given(self, batch: dict[str, Tensor]) -> Any:
        return batch if self.inputs == "pairs" else next(iter(batch.values()))

    def _class(self) -> Any:
        return getattr(transformers, self.architecture)
