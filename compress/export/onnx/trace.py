"""A model as an ONNX graph, with a placeholder where a packed layer stands.

Nothing is read for it: parameters are memory that is never touched, so models larger than memory are traced too.

Shapes: B rows of a batch, T positions, P positions before them; of a cache (B, heads, P, width).
"""

from __future__ import annotations

import inspect
import logging
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import DynamicCache

from compress.errors import CompressError
from compress.export.onnx.experts import place_experts
from compress.export.onnx.placed import INPUT, LINEAR, WEIGHT, placed
from compress.models.architecture import has_logits
from compress.models.convolutions import convolve, is_convolution
from compress.models.logits import logits_in
from compress.models.turned_inputs import turn_inputs

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import onnx_ir as ir
    from torch import Tensor

    from compress.encodings import Spec
    from compress.models.convolutions import Convolution
    from compress.models.graph import Graph

ROWS, LENGTH, PAST = 2, 3, 4  # of the example: a dynamic size must not be one, or it would be taken for fixed
SIDE = 64  # of an example image, where the model does not say
QUIET = ("torch.onnx", "torch.export", "torch._dynamo", "onnxscript", "onnx_ir")


class PlacedLinear(nn.Module):
    """Stands for a packed linear layer."""

    def __init__(self, name: str, spec: Spec, bias: nn.Parameter | None):
        super().__init__()
        self.name, self.rows, self.bias = name, spec.shape[0], bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        made: Tensor = placed(LINEAR, (x,), self.name, (*x.shape[:-1], self.rows))
        return made if self.bias is None else made + self.bias


class PlacedConvolution(nn.Module):
    """Stands for a packed convolution; has the geometry that models read."""

    def __init__(self, name: str, spec: Spec, replaced: Convolution):
        super().__init__()
        self.name, self.bias, self.rounds = name, replaced.bias, spec.inputs is not None
        self.in_channels, self.out_channels, self.groups = replaced.in_channels, replaced.out_channels, replaced.groups
        self.kernel_size, self.stride, self.dilation = replaced.kernel_size, replaced.stride, replaced.dilation
        self.padding, self.padding_mode = replaced.padding, replaced.padding_mode
        self.edges = list(replaced._reversed_padding_repeated_twice)
        self.shape = tuple(replaced.weight.shape)

    @property
    def weight(self) -> Tensor:
        """Some models ask it for its type."""
        return torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, *positions) -> (N, out, *places)."""
        if self.rounds:
            x = placed(INPUT, (x,), self.name, tuple(x.shape))
        weight = placed(WEIGHT, (x,), self.name, self.shape)
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x, padding = nn.functional.pad(x, self.edges, mode=self.padding_mode), 0
        return convolve(x, weight, self.bias, self.stride, padding, self.dilation, self.groups)


@dataclass(frozen=True)
class CallSignature:
    """How a model is called: wrapper, examples, names and dynamic axes of inputs, names of outputs."""

    module: nn.Module
    examples: tuple[Tensor, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic: tuple[dict[int, str], ...]


def traced(graph: Graph, specs: Mapping[str, Spec], opset: int) -> ir.Model:
    """The graph of a model; its parameters are constants named as in the model, without numbers worth reading.

    The model of `graph` is changed: it is of no use for anything else afterwards.
    """
    model = graph.model
    experts = {site.name for site in graph.sites if site.is_expert}
    place_experts(graph, specs)
    for name, spec in specs.items():
        if name in experts:
            continue
        old = model.get_submodule(name)
        made = (
            PlacedConvolution(name, spec, old)
            if is_convolution(old)
            else PlacedLinear(name, spec, getattr(old, "bias", None))
        )
        model.set_submodule(name, made)
    turn_inputs(model)  # hooks of layers that others now stand for are gone
    _materialise(model)
    with torch.no_grad():
        try:
            signature = _call_signature(graph)
            dynamic: Any = signature.dynamic
            if isinstance(signature.module, TracedDecoder):  # whose last argument is a tuple
                dynamic = (*dynamic[:2], dynamic[2:])
            program = torch.onnx.export(
                signature.module, signature.examples, dynamo=True, verbose=False, optimize=False, opset_version=opset,
                input_names=list(signature.inputs), output_names=list(signature.outputs), dynamic_shapes=dynamic,
            )  # fmt: skip
        except CompressError:
            raise
        except Exception as error:  # whatever the model's own code does that cannot be traced
            raise CompressError(
                f"{type(model).__name__} cannot be exported to ONNX: torch.onnx cannot trace it ({_cause(error)}). Use "
                "another format; what is done is kept"
            ) from error
    assert program is not None
    return program.model


def _cause(error: BaseException) -> str:
    """What an error comes from, behind all that was made of it on the way."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


def _materialise(model: nn.Module) -> None:
    """Memory for every parameter, which the system only finds when it is touched; buffers as they are, in float32."""
    there: dict[nn.Parameter, nn.Parameter] = {}  # tied ones stay one
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in there:
                    empty = torch.empty(parameter.shape, dtype=torch.float32)
                    there[parameter] = nn.Parameter(empty, requires_grad=False)
                module._parameters[leaf] = there[parameter]
        for leaf, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[leaf] = buffer.float()


class TracedDecoder(nn.Module):
    """A language model with its cache as flat tensors: `past_key_values.{i}.key` and so on, as runtimes name them."""

    def __init__(self, model: nn.Module, layers: int, positions: bool):
        super().__init__()
        self.model, self.layers, self.positions = model, layers, positions

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """Logits, then the keys and values of every layer."""
        position = {"position_ids": rest[0]} if self.positions else {}
        past = rest[1:] if self.positions else rest
        cache = DynamicCache(ddp_cache_data=[(past[2 * i], past[2 * i + 1]) for i in range(self.layers)])
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **position
        )
        layers = out.past_key_values.layers
        return (out.logits, *[t for layer in layers for t in (layer.keys, layer.values)])


class Encoder(nn.Module):
    """A model of tokens without a cache."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits, or what the last layer makes."""
        return logits_in(self.model(input_ids=input_ids, attention_mask=attention_mask))


class TracedImageModel(nn.Module):
    """A model of images."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits."""
        found: Tensor = self.model(pixel_values=pixel_values).logits
        return found


def _call_signature(graph: Graph) -> CallSignature:
    model, config = graph.model, graph.model.config
    if graph.is_image_model:
        size: Any = getattr(config, "image_size", None)
        down, across = size if isinstance(size, list | tuple) else (size or SIDE, size or SIDE)
        image = torch.zeros(ROWS, getattr(config, "num_channels", 3), down, across)
        axes = {0: "batch"} if size else {0: "batch", 2: "height", 3: "width"}
        return CallSignature(TracedImageModel(model), (image,), ("pixel_values",), ("logits",), (axes,))
    tokens, axes = torch.zeros(ROWS, LENGTH, dtype=torch.long), {0: "batch", 1: "length"}
    cache = _cache_of(model, tokens)
    if cache is None:
        ones = torch.ones_like(tokens)
        made = "logits" if has_logits(model) else "last_hidden_state"
        return CallSignature(Encoder(model), (tokens, ones), ("input_ids", "attention_mask"), (made,), (axes, axes))
    positions = "position_ids" in inspect.signature(model.forward).parameters
    layers = len(cache)
    mask = torch.ones(ROWS, PAST + LENGTH, dtype=torch.long)
    place = torch.arange(PAST, PAST + LENGTH).expand(ROWS, -1).contiguous()
    past = [torch.zeros(ROWS, each.shape[1], PAST, each.shape[3]) for pair in cache for each in pair]
    names = [f"{i}.{kind}" for i in range(layers) for kind in ("key", "value")]
    return CallSignature(
        TracedDecoder(model, layers, positions),
        (tokens, mask, *([place] if positions else []), *past),
        ("input_ids", "attention_mask", *(["position_ids"] if positions else []),
         *(f"past_key_values.{name}" for name in names)),
        ("logits", *(f"present.{name}" for name in names)),
        (axes, {0: "batch", 1: "total"}, *([axes] if positions else []), *[{0: "batch", 2: "past"}] * (2 * layers)),
    )  # fmt: skip


def _cache_of(model: nn.Module, tokens: Tensor) -> list[tuple[Tensor, Tensor]] | None:
    """The keys and values that each layer of a decoder keeps; None of a model that keeps none.

    Raises:
        CompressError: some layers keep states of another kind.
    """
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        return None
    found: Any = model(input_ids=tokens, use_cache=True)
    layers = getattr(getattr(found, "past_key_values", None), "layers", [])
    kept = [(layer.keys, layer.values) for layer in layers if getattr(layer, "keys", None) is not None]
    if kept and len(kept) < len(layers):
        raise CompressError(
            f"{type(model).__name__} cannot be exported to ONNX: {len(layers) - len(kept)} of its {len(layers)} layers "
            "keep states that are no keys and values. Use another format; what is done is kept"
        )
    return kept or None


@contextmanager
def quiet() -> Iterator[None]:
    """Exporting logs and warns about its own insides."""
    loggers = {name: logging.getLogger(name) for name in QUIET}
    before = {name: logger.level for name, logger in loggers.items()}
    try:
        for logger in loggers.values():
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, logger in loggers.items():
            logger.setLevel(before[name])
