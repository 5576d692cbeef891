"""Models of transformers, of which at least it is known how they are called: by their first input, or by two."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, ClassVar

from compress.lazy import torch, transformers
from compress.models.families.plain import Plain
from compress.models.norms import norms_of
from compress.models.residual import residual_units
from compress.models.symmetry import is_wired, wired_units

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor, nn

    from compress.models.norms import Norm
    from compress.models.residual import Streams
    from compress.models.symmetry import Units, Wiring

TOKENS, IMAGE_INPUT = "input_ids", "pixel_values"


class TransformersModel(Plain):
    """What `from_pretrained` loads; what may be put in another order is known of a wiring only.

    Attributes:
        wiring: how its blocks are put together, or None where that is not known.
        streams: what its parameters have along the residual stream, or None where that is not known.
        code: the folders of `transformers.models` whose classes are wired like that.
        reads: a norm over the stream, by its name in the module that holds it -> the layers that alone read it.
        offset: what such a norm adds to its weight before it scales.
    """

    wiring: ClassVar[Wiring | None] = None
    streams: ClassVar[Streams | None] = None
    code: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    offset: ClassVar[float] = 0.0

    def matches(self, model: nn.Module) -> bool:
        if not isinstance(model, transformers.PreTrainedModel):
            return False
        return self.wiring is None or is_wired(model, self.wiring, self.code)

    def symmetry(self, model: nn.Module, tied: Mapping[str, str]) -> Iterator[Units]:
        return iter(()) if self.wiring is None else wired_units(model, self.wiring, self.code)

    def residual(self, model: nn.Module, tied: Mapping[str, str]) -> Iterator[Units]:
        return iter(()) if self.streams is None else residual_units(model, self.streams, self.code, tied)

    def norms(self, model: nn.Module) -> Iterator[Norm]:
        return norms_of(model, self.reads, self.code, self.offset)


class Language(TransformersModel):
    """Called with token ids."""

    def matches(self, model: nn.Module) -> bool:
        return super().matches(model) and called_with(model) == TOKENS

    def forward(self, model: nn.Module, batch: Tensor) -> Any:
        return model(input_ids=batch, **without_cache(model))


class EncoderDecoder(Language):
    """Called with token ids for both halves: the decoder is shown the encoder's own, one place later."""

    def matches(self, model: nn.Module) -> bool:
        return super().matches(model) and decodes(model)

    def forward(self, model: nn.Module, batch: Tensor) -> Any:
        begun = torch.full_like(batch[:, :1], first_token(model))
        shifted = torch.cat([begun, batch[:, :-1]], dim=1)
        return model(input_ids=batch, decoder_input_ids=shifted, **without_cache(model))


class Images(TransformersModel):
    """Called with images."""

    def matches(self, model: nn.Module) -> bool:
        return super().matches(model) and called_with_images(model)

    def forward(self, model: nn.Module, batch: Tensor) -> Any:
        return model(pixel_values=batch.clone(), **begun(model, batch))  # a first layer may work in place


class Features(TransformersModel):
    """Called with numbers of another kind, such as sound."""

    def matches(self, model: nn.Module) -> bool:
        return super().matches(model)

    def forward(self, model: nn.Module, batch: Tensor) -> Any:
        return model(**{called_with(model): batch.clone()}, **begun(model, batch))


def called_with(model: Any) -> str:
    """The name of the first input of a model of transformers."""
    return str(getattr(model, "main_input_name", TOKENS))


def called_with_images(model: nn.Module) -> bool:
    """Whether the first input of a model of transformers is images."""
    return called_with(model) == IMAGE_INPUT


def decodes(model: Any) -> bool:
    """Whether a model has a decoder that wants tokens of its own."""
    encodes = getattr(model.config, "is_encoder_decoder", False)
    return bool(encodes) and "decoder_input_ids" in inspect.signature(model.forward).parameters


def first_token(model: Any) -> int:
    """The token that a decoder begins with."""
    named = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
    configs = (model.config, model.config.get_text_config(decoder=True))
    found = (getattr(config, name, None) for name in named for config in configs)
    return next((token for token in found if isinstance(token, int)), 0)


def begun(model: Any, batch: Tensor) -> dict[str, Any]:
    """What the decoder of a model is called with that reads no text: the token that it begins with."""
    if not decodes(model):
        return {}
    start = torch.full((len(batch), 1), first_token(model), device=batch.device)
    return {"decoder_input_ids": start, **without_cache(model)}


def without_cache(model: Any) -> dict[str, bool]:
    """Nothing is kept for a next call; not every model asks."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
