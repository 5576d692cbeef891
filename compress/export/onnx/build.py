"""The whole ONNX graph of a finished folder: traced, placeholders filled in, constants as the folder has them."""

from __future__ import annotations

import itertools
from functools import partial
from typing import TYPE_CHECKING

import onnx_ir as ir
from onnxscript import optimizer

from compress.checkpoint.artifact import Packed
from compress.errors import CompressError
from compress.export.onnx import weights
from compress.export.onnx.experts import ADD, TAKE, added, taken
from compress.export.onnx.functions import LAYER_DOMAIN as LAYERS
from compress.export.onnx.functions import Functions
from compress.export.onnx.inputs import on_grid
from compress.export.onnx.ops import MICROSOFT, ONNX_TYPES, Ops, constant
from compress.export.onnx.placed import INPUT, LINEAR, PLACEHOLDER_DOMAIN, WEIGHT
from compress.export.onnx.products import linear
from compress.export.onnx.trace import quiet, traced
from compress.export.packed import open_packed, specs_in

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from compress.checkpoint.artifact import Artifact
    from compress.encodings import Spec
    from compress.export.base import PackedFolder
    from compress.export.onnx.products import Style

PREFIX = "model."  # of the wrapper around the model
OPSET, OPSET_OF_TWO_BITS = 21, 25


def build_graph(made: PackedFolder, style: Style) -> ir.Model:
    """The graph; numbers are read from `made` while it is written.

    Raises:
        CompressError: the model's own code cannot be traced.
    """
    specs = specs_in(made)
    two = not style.kernels and any(spec.form is not None and spec.form.bits == 2 for spec in specs.values())
    graph = open_packed(made.folder, made.dtype).artifact.graph  # one to be changed
    with quiet():
        model = traced(graph, specs, OPSET_OF_TWO_BITS if two else OPSET)
        _simplify(model)
    _fill_in(model, made.artifact, specs, style)
    _as_stored(model.graph, made.artifact)
    _forget_origins(model)
    if style.kernels:
        model.graph.opset_imports[MICROSOFT] = 1
    return model


def constants(made: PackedFolder, style: Style) -> dict[str, ir.Value]:
    """What a graph holds of packed layers, by name."""
    artifact, specs = made.artifact, specs_in(made)
    found: dict[str, ir.Value] = {}
    for site, spec in specs.items():
        done, ops = artifact.committed[site], Ops(site)
        assert isinstance(done, Packed)
        _lowered(
            ops, WEIGHT if artifact.sites[site].is_convolution else LINEAR, ir.Value(name="x"), spec, done, style, ()
        )
        if artifact.sites[site].is_convolution and spec.inputs is not None:
            on_grid(ops, ir.Value(name="x"), spec.inputs, done.leaf, spec.shape[1])
        found |= ops.constants
    return found


def parameters(made: PackedFolder) -> dict[str, ir.Value]:
    """What a graph may hold of everything else, by name."""
    artifact = made.artifact
    return {n: _parameter(artifact, n) for n, _ in artifact.graph.tensors() if n in artifact.stored}


def computed(made: PackedFolder) -> dict[str, ir.Value]:
    """What a graph may hold of what no file does, such as rotary frequencies, as the model computed it once more."""
    artifact = made.artifact
    found = {}
    for name, buffer in artifact.graph.model.named_buffers():
        if name not in artifact.stored and not buffer.is_meta:
            value = buffer.float() if buffer.is_floating_point() else buffer
            if value.dtype in ONNX_TYPES:
                found[f"{PREFIX}{name}"] = constant(f"{PREFIX}{name}", value.shape, value.dtype, value.clone)
    return found


def _forget_origins(model: ir.Model) -> None:
    """Drop the tracer's notes about the source, and names and shapes of what is in between: larger than the rest."""
    kept = {*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()}
    count = itertools.count()
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        if node.domain not in (MICROSOFT, LAYERS):
            node.name = ""
        for value in node.outputs:
            value.metadata_props.clear()
            if value not in kept:
                value.name, value.shape, value.type = f"{next(count):x}", None, None
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    model.producer_name, model.producer_version, model.doc_string = "compress", "", None
    model.graph.opset_imports.pop(PLACEHOLDER_DOMAIN, None)


def _simplify(model: ir.Model) -> None:
    """Fold what depends on nothing; parameters count as unknown, since they are not read yet."""
    values = {name: value for name, value in model.graph.initializers.items() if name.startswith(PREFIX)}
    numbers = {name: value.const_value for name, value in values.items()}
    for value in values.values():
        value.const_value = None
    optimizer.optimize(model)
    for name, value in values.items():
        value.const_value = numbers[name]


def _fill_in(model: ir.Model, artifact: Artifact, specs: Mapping[str, Spec], style: Style) -> None:
    """Put what a packed layer computes in the place of every placeholder."""
    graph = model.graph
    shared: dict[str, ir.Value] = {}
    functions = Functions(graph.opset_imports[""])
    for node in [node for node in graph if node.domain == PLACEHOLDER_DOMAIN]:
        site = node.attributes["site"].as_string()
        if node.op_type in (TAKE, ADD):
            ops = Ops(f"{site}/{node.op_type.lower()}", shared)
            given = [value for value in node.inputs if value is not None]
            new = taken(ops, *given) if node.op_type == TAKE else added(ops, *given)
            _replace(graph, node, ops.nodes, new)
            continue
        done, spec = artifact.committed[site], specs[site]
        assert isinstance(done, Packed)
        ops = Ops(site, shared)
        x = node.inputs[0]
        assert x is not None
        last = _lowered(ops, node.op_type, x, spec, done, style, artifact.sites[site].ref.stored)
        name = site if node.op_type == LINEAR else f"{site}/{node.op_type.lower()}"
        nodes, new = functions.call(name, ops, x, last)
        for value in ops.constants.values():
            if value.name not in graph.initializers:
                graph.register_initializer(value)
        _replace(graph, node, nodes, new)
    for value in shared.values():
        if value.uses():
            graph.register_initializer(value)
    for function in functions.made.values():
        model.functions[function.identifier()] = function
    if functions.made:
        graph.opset_imports[LAYERS] = 1


def _replace(graph: ir.Graph, node: ir.Node, nodes: Sequence[ir.Node], new: ir.Value) -> None:
    """Put nodes in the place of a placeholder."""
    old = node.outputs[0]
    new.shape, new.type = old.shape, old.type
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, [old], [new])


def _lowered(
    ops: Ops, kind: str, x: ir.Value, spec: Spec, done: Packed, style: Style, stored: tuple[int, ...]
) -> ir.Value:
    """What a placeholder stands for."""
    if kind == LINEAR:
        return linear(ops, x, spec, done.leaf, style)
    if kind == INPUT:
        assert spec.inputs is not None
        return on_grid(ops, x, spec.inputs, done.leaf, spec.shape[1])
    return ops.reshape(weights.whole_weight(weights.source_of(ops, spec, done.leaf), spec), *stored)


def _parameter(artifact: Artifact, name: str) -> ir.Value:
    """A constant that is read when it is wanted, in the type the folder has it in."""
    source = artifact.source
    return constant(name, source.shape(name), source.dtype(name), partial(source.read, name))


def _as_stored(graph: ir.Graph, artifact: Artifact) -> None:
    """Constants of parameters in the type the folder has them in; a cast behind them where that is not float32.

    Raises:
        CompressError: the graph has a parameter that the folder lacks.
    """
    known = {f"{PREFIX}{name}" for name, _ in artifact.graph.model.named_buffers()}
    for name in [name for name in graph.initializers if name.startswith(PREFIX)]:
        old = graph.initializers[name]
        parameter = artifact.graph.tied.get(name.removeprefix(PREFIX), name.removeprefix(PREFIX))
        if parameter not in artifact.stored:  # computed, not stored: rotary frequencies
            if name not in known and not isinstance(old.const_value, ir.LazyTensor):  # traced without its numbers
                raise CompressError(f"the graph has {parameter}, which the packed folder does not hold")
            continue
        new = _parameter(artifact, parameter)
        uses = list(old.uses())
        del graph.initializers[name]
        graph.register_initializer(new)
        if new.dtype == old.dtype:
            ir.convenience.replace_all_uses_with(old, new)
            continue
        _widen(graph, old, new, uses)


def _widen(graph: ir.Graph, old: ir.Value, new: ir.Value, uses: Sequence[tuple[ir.Node, int]]) -> None:
    """Cast what is stored in fewer bits: of a table, the rows that are looked up; of all else, the whole."""
    to = int(old.dtype or ir.DataType.FLOAT)
    wide: ir.Value | None = None
    for node, index in uses:
        if node.op_type == "Gather" and index == 0:
            out = node.outputs[0]
            node.replace_input_with(0, new)
            cast = _cast(out, to, f"{out.name}_wide")
            cast.outputs[0].shape, cast.outputs[0].type = out.shape, out.type
            out.type = ir.TensorType(new.dtype or ir.DataType.FLOAT)
            ir.convenience.replace_all_uses_with(out, cast.outputs[0])
            cast.replace_input_with(0, out)
            graph.insert_after(node, cast)
            continue
        if wide is None:
            cast = _cast(new, to, f"{new.name}_wide")
            cast.outputs[0].shape, cast.outputs[0].type = old.shape, old.type
            graph.insert_before(graph[0], cast)
            wide = cast.outputs[0]
        node.replace_input_with(index, wide)


def _cast(x: ir.Value, to: int, name: str) -> ir.Node:
    attributes = ir.convenience.convert_attributes({"to": to})
    return ir.Node("", "Cast", [x], attributes, outputs=[ir.Value(name=name)], name=name)
