"""Tensors that a packed folder holds entropy-coded: which, how long, and what they are once decoded.

`coded` in `quantization_config` maps the name of such a tensor to its form. In the file it has its own name, and is
a vector of bytes; whoever reads it decodes it once, and everything behind that sees the ordinary packed tensor.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from compress.encodings.rans import CodedForm
from compress.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from compress.encodings import Spec


def forms_of(coded: object, specs: Mapping[str, Spec]) -> dict[str, dict[str, CodedForm]]:
    """Layer -> its coded tensors, name -> form; of what a configuration states.

    Args:
        coded: full name of a tensor -> its form, as JSON has it.
        specs: of every packed layer.

    Raises:
        ValueError: no such mapping, or one that names what no packed layer has.
    """
    if not isinstance(coded, dict):
        raise ValueError("`coded` must map names of tensors to how they are entropy-coded")
    found: dict[str, dict[str, CodedForm]] = {}
    for name, data in coded.items():
        layer, _, leaf = str(name).rpartition(".")
        if layer not in specs or leaf not in specs[layer].streams():
            raise ValueError(f"`coded` names {name!r:.100}, which is no stream of codes of a packed layer")
        try:
            found.setdefault(layer, {})[leaf] = CodedForm.from_json(data)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return found


def stored_shapes(spec: Spec, coded: Mapping[str, CodedForm]) -> dict[str, tuple[int, ...]]:
    """The shape that each tensor of a layer has in the file."""
    return {leaf: (coded[leaf].size,) if leaf in coded else shape for leaf, (shape, _) in spec.tensors().items()}


def coded_bytes(spec: Spec, coded: Mapping[str, CodedForm]) -> int:
    """What the tensors of a layer take in the file."""
    types = {leaf: dtype for leaf, (_, dtype) in spec.tensors().items()}
    return sum(math.prod(shape) * types[leaf].itemsize for leaf, shape in stored_shapes(spec, coded).items())


def decoded(form: CodedForm, stored: Tensor, shape: tuple[int, ...], where: str) -> Tensor:
    """The packed tensor of a shape.

    Args:
        form: how it is coded.
        stored: its bytes.
        shape: of the packed tensor.
        where: what it is called, for messages.

    Raises:
        CheckpointError: the bytes are damaged.
    """
    try:
        return form.decode(stored, shape)
    except ValueError as error:
        raise CheckpointError(
            f"{where} is entropy-coded, and cannot be decoded: {error}; the file is damaged: write or fetch it again"
        ) from error


__all__ = ["coded_bytes", "decoded", "forms_of", "stored_shapes"]
