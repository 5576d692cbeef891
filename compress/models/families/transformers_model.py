"""Models of transformers, of which at least it is known how they are called: with token ids, or with images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from compress.lazy import transformers
from compress.models.families.plain import Plain
from compress.models.symmetry import is_wired, wired_units

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor, nn

    from compress.models.symmetry import Units, Wiring

IMAGE_INPUT = "pixel_values"


class TransformersModel(Plain):
    """What `from_pretrained` loads; what may be put in another order is known of a wiring only.

    Attributes:
        wiring: how its blocks are put together, or None where that is not known.
        code: the folders of `transformers.models` whose classes are wired like that.
    """

    wiring: ClassVar[Wiring | None] = None
    code: ClassVar[tuple[str, ...]] = ()

    def matches(self, model: nn.Module) -> bool:
        if not isinstance(model, transformers.PreTrainedModel):
            return False
        return self.wiring is None or is_wired(model, self.wiring, self.code)

    def symmetry(self, model: nn.Module, tied: Mapping[str, str]) -> Iterator[Units]:
        return iter(()) if self.wiring is None else wired_units(model, self.wiring, self.code)


class Language(TransformersModel):
    """Called with token ids."""

    def matches(self, model: nn.Module) -> bool:
        return super().matches(model) and not called_with_images(model)

    def forward(self, model: nn.Module, batch: Tensor) -> Any:
        return model(input_ids=batch, use_cache=False)


class Images(TransformersModel):
    """Called with images."""

    def matches(self, model: nn.Module) -> bool:
        return super().matches(model) and called_with_images(model)

    def forward(self, model: nn.Module, batch: Tensor) -> Any:
        return model(pixel_values=batch.clone())  # a first layer may work in place


def called_with_images(model: nn.Module) -> bool:
    """Whether the first input of a model of transformers is images."""
    return getattr(model, "main_input_name", "") == IMAGE_INPUT
