"""A written ONNX file in onnxruntime on this machine's processor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from compress.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

PAST = "past_key_values"
EXACT_LEVEL = 1  # the accuracy level at which `MatMulNBits` leaves its inputs as they are


def open_session(file: Path, *, threads: int = 0, exact: bool = False) -> Any:
    """An InferenceSession.

    Args:
        file: of the graph; its data beside it.
        threads: of one operator; 0 for as many as onnxruntime sees fit.
        exact: let standard operators be fused without rounding what weights are multiplied with.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if exact:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(EXACT_LEVEL))
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def at_level(file: Path, level: int, to: Path) -> None:
    """The same graph, beside the same data, with another accuracy level."""
    model = ir.load(file)
    for node in (n for nodes in (model.graph, *model.functions.values()) for n in nodes):
        if "accuracy_level" in node.attributes:
            node.attributes.add(ir.AttrInt64("accuracy_level", level))
    ir.save(model, to)


class Runner:
    """Logits of an ONNX file: of a decoder, of windows without anything before them."""

    def __init__(self, session: Any):
        self.session = session
        self.inputs = {i.name: i for i in session.get_inputs()}
        self.made = session.get_outputs()[0].name  # logits; of an encoder without a head what its last layer makes

    def __call__(self, inputs: Tensor) -> Tensor:
        """Token ids (rows, length), or images -> logits float32."""
        if "pixel_values" in self.inputs:
            return torch.from_numpy(self.session.run([self.made], {"pixel_values": inputs.float().numpy()})[0])
        logits, _ = self.step(inputs, None)
        return logits

    @property
    def width(self) -> int:
        """How many tokens or classes it gives logits for; 0 where the file does not say."""
        found = next((o.shape[-1] for o in self.session.get_outputs() if o.name == self.made), 0)
        return found if isinstance(found, int) else 0

    @property
    def decodes(self) -> bool:
        """Whether it goes on from what it kept."""
        return "past_key_values.0.key" in self.inputs

    def step(self, tokens: Tensor, past: dict[str, Any] | None) -> tuple[Tensor, dict[str, Any]]:
        """Logits of further tokens, and what a decoder keeps for the next step."""
        given = self._given(tokens, past)
        names = [name for name in self.inputs if name.startswith(PAST)]
        wanted = [self.made, *(name.replace(PAST, "present") for name in names)]
        logits, *present = self.session.run(wanted, given)
        return torch.from_numpy(logits), dict(zip(names, present, strict=True))

    def values(self, inputs: Tensor, names: Sequence[str]) -> dict[str, Any]:
        """What values of the graph that it gives out are, as arrays: of token ids (rows, length), or of images."""
        images = {"pixel_values": inputs.float().numpy()} if "pixel_values" in self.inputs else None
        made = self.session.run(list(names), images or self._given(inputs, None))
        return dict(zip(names, made, strict=True))

    def _given(self, tokens: Tensor, past: dict[str, Any] | None) -> dict[str, Any]:
        """All that a model of tokens takes."""
        import numpy

        rows, length = tokens.shape
        if past is None:
            shapes = {name: each.shape for name, each in self.inputs.items() if name.startswith(PAST)}
            past = {n: numpy.zeros((rows, s[1], 0, s[3]), numpy.float32) for n, s in shapes.items()}
        before = next(iter(past.values())).shape[2] if past else 0
        given: dict[str, Any] = {
            "input_ids": tokens.numpy(),
            "attention_mask": numpy.ones((rows, before + length), numpy.int64),
        }
        if "position_ids" in self.inputs:
            given["position_ids"] = numpy.arange(before, before + length)[None].repeat(rows, 0)
        return given | past
