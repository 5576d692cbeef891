"""OUT/onnx: one graph with packed weights, for onnxruntime and whatever else reads ONNX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from compress.errors import OptionError
from compress.export.base import Exporter
from compress.export.hf import plain_config
from compress.export.onnx.names import DATA, EXACT, MODEL
from compress.export.refusals import refuse_missing, refuse_read, refuse_tables
from compress.io.atomic import write_json
from compress.lazy import torch
from compress.models.companions import copy_companions
from compress.models.experts import mixtures, says_how

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    from compress.encodings import Spec
    from compress.export.base import Logits, PackedFolder
    from compress.export.onnx.products import Style
    from compress.models.graph import Graph
    from compress.progress import Bars

TIGHT, LOOSE = 1e-4, 0.05
NEEDED = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True, kw_only=True)
class Onnx(Exporter):
    """An ONNX file whose weights stay packed on disk, and in memory where an operator of the runtime takes them packed.

    Beside it lie the model's configuration and tokenizer, as optimum has them.

    Causal language models have a cache, as `past_key_values.{i}.key` and so on; rows, lengths and what went before are
    dynamic. Computes in float32.

    Args:
        style: `kernels` uses onnxruntime's own operators for uniform codes (`MatMulNBits`); `qdq` nothing but standard
            ones, which runtimes fuse.
        mode: of other codes than uniform ones. `exact` looks every weight up while loading, after which it is float32
            in memory; `fast` rounds their tables to 8 bits, for the same operators.
        accuracy_level: of `MatMulNBits`: 4 rounds what weights are multiplied with to 8 bits and is several times
            quicker, 1 does not.
    """

    style: Literal["kernels", "qdq"] = "kernels"
    mode: Literal["exact", "fast"] = "exact"
    accuracy_level: Literal[1, 4] = 4

    key: ClassVar[str] = "onnx"
    files: ClassVar[tuple[str, ...]] = (MODEL, DATA, "config.json")
    used: ClassVar[tuple[str, str]] = (
        "python",
        'import onnxruntime\n\nsession = onnxruntime.InferenceSession("FOLDER/model.onnx")',
    )
    computes: ClassVar[str | None] = "float32"
    libraries: ClassVar[int] = 250 << 20
    turns: ClassVar[bool] = True

    @property
    def written_as(self) -> Style:
        """What the graph is made with."""
        from compress.export.onnx.products import Style

        return Style(self.style == "kernels", self.mode == "fast", self.accuracy_level)

    def check(self) -> Iterator[OptionError]:
        yield from super().check()
        if self.style == "qdq" and self.mode == "fast":
            yield OptionError("mode", "fast needs onnxruntime's own operators; leave out style: qdq")
        if self.style == "qdq" and self.accuracy_level != 4:
            yield OptionError(
                "accuracy_level",
                "a file with style: qdq has no such attribute; who runs it chooses, with the session option "
                "session.qdq_matmulnbits_accuracy_level",
            )

    def refusals(self, graph: Graph, specs: Mapping[str, Spec], added: Collection[str]) -> Iterator[str]:
        for package in NEEDED:
            yield from refuse_missing(package, "onnx")
        yield from _refuse_experts(graph, specs)
        yield from refuse_read(graph, specs, "ONNX")
        yield from refuse_tables(graph, specs, "its nodes look rows up in plain tables")
        turned = [s.name for s in graph.sites if s.is_convolution and s.ref.transposed and s.name in specs]
        if turned:
            yield (
                f"it has no graph for the {len(turned)} transposed convolutions that are compressed, such as "
                f"{turned[0]}; `exclude` them, or export hf"
            )
        pairs = [s.name for s in graph.sites if s.is_convolution and s.name in specs and _pairs_inputs(specs[s.name])]
        if pairs:
            yield (
                f"it cannot round images to outlier-victim pairs, and {len(pairs)} convolutions do, such as "
                f"{pairs[0]}; `exclude` them, use activation_grid: int, or leave this format out of `export:`"
            )

    def write(self, made: PackedFolder, folder: Path, final: Path, bars: Bars) -> None:
        from compress.export.onnx.files import write_graph

        write_graph(made, self.written_as, folder, bars)
        write_json(plain_config(made.folder, torch.float32), folder / "config.json")  # where optimum looks for it
        copy_companions(made.folder, folder)

    def verify(self, made: PackedFolder, folder: Path, bars: Bars) -> dict[str, Any]:
        from compress.export.onnx.files import compare

        return {"tensors_equal": compare(made, self.written_as, folder, bars)}

    def tolerance(self, specs: Mapping[str, Spec]) -> float:
        # An input half-way between two steps of its grid may be rounded to either, whose difference then goes on.
        rounded = any(spec.inputs is not None for spec in specs.values())
        return LOOSE if rounded or self.mode == "fast" else TIGHT

    def runner(self, made: PackedFolder, folder: Path) -> Logits:
        from compress.export.onnx.session import Runner, at_level, open_session

        if self.style == "qdq":
            return Runner(open_session(folder / MODEL, exact=True))
        at_level(folder / MODEL, 1, folder / EXACT)
        try:
            return Runner(open_session(folder / EXACT))
        finally:
            (folder / EXACT).unlink()

    def shipped(self, made: PackedFolder, folder: Path) -> Logits | None:
        from compress.export.onnx.session import Runner, open_session

        return Runner(open_session(folder / MODEL)) if self.accuracy_level == 4 else None

    def first_nan(self, folder: Path, inputs: Tensor) -> str:
        from compress.export.onnx.nan import first_nan

        return first_nan(folder, inputs)


def _pairs_inputs(spec: Spec) -> bool:
    return spec.inputs is not None and spec.inputs.kind.paired


def _refuse_experts(graph: Graph, packed: Collection[str]) -> Iterator[str]:
    """Why the experts of a mixture have no graph; nothing where they have."""
    strange = [(name, module) for name, module in mixtures(graph.model).items() if not says_how(module)]
    for name, module in strange[:1]:
        yield (
            f"it has graphs for experts that compute as transformers' other ones do, and {name} is a "
            f"{type(module).__name__}, which does it in its own way; export hf"
        )
    whole = {site.parameter for site in graph.sites if site.is_expert and site.name in packed}
    some = [site.name for site in graph.sites if site.parameter in whole and site.name not in packed]
    if some:
        yield (
            f"it holds the experts of one tensor all packed or all dense, and {len(some)} are not packed beside others "
            f"that are, such as {some[0]}; compress all of them or none"
        )
