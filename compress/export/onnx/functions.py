"""Layers that are written down in the same operators share one function of the graph, so that each is a single node."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from compress.export.onnx.ops import MICROSOFT

if TYPE_CHECKING:
    from compress.export.onnx.ops import Ops

LAYER_DOMAIN = "compress.layers"
SHORT = 4  # nodes that rather stand in the graph themselves


class Functions:
    """The functions of one graph.

    Attributes:
        made: by what they compute.
    """

    def __init__(self, opset: int):
        self.opset = opset
        self.made: dict[tuple[object, ...], ir.Function] = {}

    def call(self, name: str, ops: Ops, x: ir.Value, y: ir.Value) -> tuple[list[ir.Node], ir.Value]:
        """Nodes that compute y from x and the stored constants of `ops`, and their last output.

        Where that is one node, it is called `name`.
        """
        if len(ops.nodes) <= SHORT:
            return ops.nodes, y
        stored = list(ops.constants.values())
        key = _key(ops, x, y)
        if key not in self.made:
            self.made[key] = self._function(ops, x, y, stored)
        function = self.made[key]
        output = ir.Value(name=f"{name}/output")
        return [ir.Node(LAYER_DOMAIN, function.name, [x, *stored], outputs=[output], name=name)], output

    def _function(self, ops: Ops, x: ir.Value, y: ir.Value, stored: list[ir.Value]) -> ir.Function:
        formal = {value: ir.Value(name=f"in{i}") for i, value in enumerate((x, *stored))}
        inner: dict[ir.Value, ir.Value] = {}
        constants: list[ir.Node] = []
        for i, node in enumerate(ops.nodes):
            node.name = ""
            node.outputs[0].name = f"v{i}"
            for place, value in enumerate(node.inputs):
                if value in formal:
                    node.replace_input_with(place, formal[value])
                elif value is not None and value.name in ops.shared:
                    if value not in inner:
                        constants.append(_constant_node(value, f"c{len(constants)}"))
                        inner[value] = constants[-1].outputs[0]
                    node.replace_input_with(place, inner[value])
        imports = {"": self.opset} | ({MICROSOFT: 1} if any(n.domain == MICROSOFT for n in ops.nodes) else {})
        body = ir.Graph(list(formal.values()), [y], nodes=[*constants, *ops.nodes], opset_imports=imports)
        return ir.Function(LAYER_DOMAIN, f"Packed{len(self.made)}", graph=body, attributes=[])


def _constant_node(value: ir.Value, name: str) -> ir.Node:
    assert value.const_value is not None
    tensor = ir.tensor(value.const_value.numpy(), name=name)
    attributes = ir.convenience.convert_attributes({"value": tensor})
    return ir.Node("", "Constant", [], attributes, outputs=[ir.Value(name=name)])


def _key(ops: Ops, x: ir.Value, y: ir.Value) -> tuple[object, ...]:
    """What is computed, whatever the layer is called."""
    said: dict[ir.Value | None, str] = {None: "", x: "x"}
    said |= {value: name.removeprefix(ops.layer) for name, value in ops.constants.items()}
    found: list[object] = []
    for i, node in enumerate(ops.nodes):
        attributes = sorted((a.name, str(a.value)) for a in node.attributes.values() if isinstance(a, ir.Attr))
        inputs = [said.get(value) or (value.name if value else "") for value in node.inputs]
        found.append((node.domain, node.op_type, *inputs, *attributes))
        said[node.outputs[0]] = f"#{i}"
    return (*found, said[y])
