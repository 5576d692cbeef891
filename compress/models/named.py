"""Samples of models with several inputs: texts with images, sounds with texts, as a model's processor returns them.

A sample is a batch of one, input by name, so that samples may be of any length and have any number of images. What runs
through the engine are their numbers.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from compress.lazy import torch, transformers
from compress.models.architecture import predicts_next
from compress.models.families.transformers_model import TOKENS, called_with, decodes, first_token, without_cache

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

# What goes with token ids, and makes no other input of them.
WITH_TOKENS = {"input_ids", "attention_mask", "token_type_ids", "position_ids", "labels"}
# Tokens in whose place something else is put, by the names that configurations have for them.
PLACES = (
    "image_token_id", "image_token_index", "video_token_id", "video_token_index", "audio_token_id", "audio_token_index",
)  # fmt: skip
LEFT_OUT = -100  # in the place of a token that nobody predicts


def inputs_of(model: Any) -> set[str]:
    """The names of what a model of transformers can be called with."""
    return set(inspect.signature(model.forward).parameters)


def has_several(model: Any, names: set[str]) -> bool:
    """Whether values of these names are several inputs, and not one as the engine gives it."""
    own = called_with(model)
    beside = (WITH_TOKENS if own == TOKENS else {own, "labels", "label"}) | {own}
    return own in names and bool((names & inputs_of(model)) - beside)


def takes_more_than_text(model: Any) -> bool:
    """Whether a model can be called with images or sounds beside text."""
    if not isinstance(model, transformers.PreTrainedModel):
        return False
    return bool(inputs_of(model) & {"pixel_values", "input_features", "input_values"})


def needs_several(model: Any) -> bool:
    """Whether a model cannot be called with its first input alone: text and images that it compares, as CLIP does."""
    if not isinstance(model, transformers.PreTrainedModel) or called_with(model) != TOKENS:
        return False
    return "pixel_values" in inputs_of(model) and not predicts_next(model) and not decodes(model)


def call_with(model: Any, sample: Mapping[str, Tensor]) -> Any:
    """Run a model on one sample."""
    values = dict(sample)
    if decodes(model) and "decoder_input_ids" not in values:
        values["decoder_input_ids"] = torch.full((1, 1), first_token(model), device=next(iter(values.values())).device)
    return model(**values, **without_cache(model))


def predicted_tokens(model: Any, sample: Mapping[str, Tensor]) -> Tensor:
    """(1, T) token ids of a sample; LEFT_OUT where an image or a sound stands, which nobody predicts."""
    tokens = sample[TOKENS].clone()
    places = [getattr(model.config, name, None) for name in PLACES]
    for place in places:
        if isinstance(place, int):
            tokens[tokens == place] = LEFT_OUT
    if "attention_mask" in sample:
        tokens[sample["attention_mask"] == 0] = LEFT_OUT
    return tokens
