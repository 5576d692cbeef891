"""The families of models, listed by hand: the first that matches is a model's. A new one is a file and a line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.models.families.bert import Bert
from compress.models.families.gpt2 import Gpt2
from compress.models.families.gpt_neox import GptNeoX
from compress.models.families.llama import GatedDecoder, Gemma, Gemma2, Llama, Olmo2
from compress.models.families.opt import Opt
from compress.models.families.plain import Plain
from compress.models.families.resnet import ResNet
from compress.models.families.transformers_model import EncoderDecoder, Features, Images, Language
from compress.models.families.vit import Vit

if TYPE_CHECKING:
    from torch import nn

    from compress.models.families.base import Family

FAMILIES: tuple[Family, ...] = (
    EncoderDecoder(),
    Llama(),
    Gemma(),
    Gemma2(),
    Olmo2(),
    GatedDecoder(),
    Gpt2(),
    GptNeoX(),
    Opt(),
    Bert(),
    Vit(),
    ResNet(),
    Language(),
    Images(),
    Features(),
    Plain(),
)


def family_of(model: nn.Module) -> Family:
    """The kind of a model; at last that of any module."""
    return next(family for family in FAMILIES if family.matches(model))
