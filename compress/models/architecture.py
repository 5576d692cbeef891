"""Which class of transformers a configuration names; nothing of a folder's own code is ever run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.lazy import transformers

if TYPE_CHECKING:
    from collections.abc import Iterator

# In the order in which they are tried for a configuration that names no class, and named to people who load a model.
AUTO_CLASSES = (
    "AutoModelForCausalLM", "AutoModelForImageClassification", "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM", "AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq", "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification", "AutoModelForTokenClassification", "AutoModelForQuestionAnswering",
    "AutoModelForMultipleChoice", "AutoModelForNextSentencePrediction", "AutoModelForCTC",
    "AutoModelForAudioClassification", "AutoModelForAudioFrameClassification", "AutoModelForAudioXVector",
    "AutoModelForObjectDetection", "AutoModelForSemanticSegmentation", "AutoModelForInstanceSegmentation",
    "AutoModelForUniversalSegmentation", "AutoModelForDepthEstimation", "AutoModelForVideoClassification",
    "AutoModelForMaskedImageModeling", "AutoModelForZeroShotImageClassification",
    "AutoModelForZeroShotObjectDetection", "AutoModelForTextToWaveform", "AutoModelForPreTraining", "AutoModel",
)  # fmt: skip
NEXT_TOKEN = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
ENCODERS = ("bert-generation",)  # beside all that transformers knows as masked language models
UNNAMED = AUTO_CLASSES[:2]  # what a configuration without `architectures` is taken for


def class_of(config: transformers.PreTrainedConfig) -> Any:
    """The class that `config.architectures` names; without a known name a language model or image classifier.

    Returns:
        A subclass of `PreTrainedModel`; None where transformers has none.
    """
    named = listed(config)
    if named:
        found = getattr(transformers, named, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) and _is_for(found, config):
            return found
        alike = (each for auto in AUTO_CLASSES for each in mapped(auto, config))  # MPTForCausalLM: Mpt...
        found = next((each for each in alike if each.__name__.lower() == named.lower()), None)
        if found is not None:
            return found
    # Of a model with several parts AutoModelForCausalLM takes the language model alone.
    return next((each for auto in UNNAMED for each in mapped(auto, config) if _is_for(each, config)), None)


def listed(config: transformers.PreTrainedConfig) -> str:
    """The first name in `architectures`; empty without one."""
    names = getattr(config, "architectures", None)
    first = names[0] if isinstance(names, list) and names else ""
    return first if isinstance(first, str) else ""


def _is_for(found: Any, config: transformers.PreTrainedConfig) -> bool:
    wanted = getattr(found, "config_class", None)
    return isinstance(wanted, type) and isinstance(config, wanted)


def mapped(auto: str, config: transformers.PreTrainedConfig) -> Iterator[Any]:
    """The classes that an Auto class makes of a configuration."""
    made = getattr(transformers, auto, None)  # newer than the oldest transformers that is accepted
    mapping = getattr(made, "_model_mapping", {})
    if type(config) in mapping:
        found = mapping[type(config)]
        yield from found if isinstance(found, list | tuple) else (found,)


def predicts_next(model: Any) -> bool:
    """Whether a model of transformers is a causal language model: it has logits for the token after each."""
    config, made = model.config, type(model)
    if getattr(config, "is_encoder_decoder", False) or sees_the_answer(config):
        return False
    return any(made is each for auto in NEXT_TOKEN for each in mapped(auto, config))


def sees_the_answer(config: transformers.PreTrainedConfig) -> bool:
    """Whether a model is shown every token that it predicts: a masked language model that is no decoder."""
    masked = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING or config.model_type in ENCODERS
    causal = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    return masked and not causal


def predicts_masked(model: Any) -> bool:
    """Whether a model of transformers has logits for tokens that were masked."""
    return any(type(model) is each for each in mapped("AutoModelForMaskedLM", model.config))


def has_logits(model: Any) -> bool:
    """Whether what a model of transformers returns are logits, of tokens or of classes."""
    heads = getattr(model, "get_output_embeddings", lambda: None)()
    return heads is not None or type(model).__name__.endswith(("Classification", "ForCTC"))


def auto_class(config: transformers.PreTrainedConfig) -> str:
    """Name of the class, of all models where one fits, that loads what `class_of` says."""
    wanted = class_of(config)
    fitting = (auto for auto in AUTO_CLASSES if next(mapped(auto, config), None) is wanted)
    return next(fitting, "AutoModel" if wanted is None else str(wanted.__name__))
