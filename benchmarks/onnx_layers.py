"""Speed and memory of a stack of wide linear layers in onnxruntime, packed beside float32.

    python benchmarks/onnx_layers.py [--width 2048] [--layers 8]

Every encoding is written as the exporter writes it and opened twice: in a process of its own, for the memory that
loading takes, and beside the float32 file in one process, for the time of one token on one thread (the two by turns;
the smallest of many). Prints a table and keeps it in results/onnx_layers.json.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from compress.encodings import Encoding, Weight, pack, power, uniform
from compress.encodings import outlier_victim as pairs
from compress.encodings.codebook import Codebooks, nearest
from compress.export.onnx.files import write_constants
from compress.export.onnx.measure import open_onnx
from compress.export.onnx.ops import MICROSOFT, Ops
from compress.export.onnx.products import Style, linear
from compress.progress import Bars

ROOT = Path(__file__).parent
RESULTS = ROOT / "results" / "onnx_layers.json"
GROUP = 128


def grid(bits: int, group: int = GROUP) -> Any:
    def made(weight: Tensor) -> Encoding:
        scale, zero = uniform.fit(weight, bits, groups=weight.shape[1] // group)
        return uniform.Uniform(uniform.quantize(weight, scale, zero, bits), scale, zero, bits, False)

    return made


def codebook(weight: Tensor) -> Encoding:
    table = torch.quantile(weight.flatten()[: 1 << 20], torch.linspace(0.01, 0.99, 16))[None].half()
    rows = torch.zeros(len(weight), dtype=torch.uint8)
    return Codebooks(nearest(weight, table, rows), table, rows)


def powered(weight: Tensor) -> Encoding:
    levels = power.PowerGrid(4, 0.7, "zero")
    scale = weight.abs().amax(1, keepdim=True).half()
    return power.Power(levels.nearest(weight / scale.float()).to(torch.uint8), scale, levels.stored_exponent, 4, "zero")


def paired(weight: Tensor) -> Encoding:
    scale = (weight.abs().amax(1, keepdim=True) / 20).half()
    return pairs.OutlierVictim(pairs.encode(weight, scale, "int4"), scale, "int4")


SHIPPED, FAST, EXACT = Style(), Style(fast=True), Style(accuracy_level=1)
KINDS: dict[str, tuple[Any, Style]] = {
    "float32": (None, SHIPPED),
    "4 bits, 128 columns": (grid(4), SHIPPED),
    "4 bits, 32 columns": (grid(4, 32), SHIPPED),
    "2 bits, 128 columns": (grid(2), SHIPPED),
    "3 bits, 128 columns": (grid(3), SHIPPED),
    "8 bits, 128 columns": (grid(8), SHIPPED),
    "4 bits, 128 columns, exact": (grid(4), EXACT),
    "codebook, 4 bits, fast": (codebook, FAST),
    "power, 4 bits, fast": (powered, FAST),
    "pairs, 4 bits, fast": (paired, FAST),
    "codebook, 4 bits, exact": (codebook, SHIPPED),
}


def write(name: str, width: int, layers: int, folder: Path) -> Path:
    """The graph of the stack: as many layers, each fed by the one before."""
    encode, style = KINDS[name]
    torch.manual_seed(0)
    x = ir.Value(name="x", shape=ir.Shape(["rows", width]), type=ir.TensorType(ir.DataType.FLOAT))
    nodes: list[ir.Node] = []
    constants: list[ir.Value] = []
    shared: dict[str, ir.Value] = {}
    value = x
    for i in range(layers):
        weight = torch.randn(width, width) * width**-0.5
        made = Weight(weight) if encode is None else Weight(encoding=encode(weight))
        spec, tensors = pack(made)
        ops = Ops(f"layers.{i}", shared)
        value = linear(ops, value, spec, tensors.__getitem__, style)
        nodes += ops.nodes
        constants += ops.constants.values()
    value.name, value.shape, value.type = "y", x.shape, x.type
    graph = ir.Graph([x], [value], nodes=nodes, initializers=[*constants, *shared.values()], name="stack",
                     opset_imports={"": 21, MICROSOFT: 1})  # fmt: skip
    folder.mkdir()
    model = ir.Model(graph, ir_version=10)
    write_constants(model, folder, Bars())
    ir.save(model, folder / "model.onnx")
    return folder


def memory(folder: Path) -> dict[str, int]:
    """In a process of its own."""
    code = (
        "import sys, json, pathlib; from compress.export.onnx.measure import open_onnx\n"
        "found = open_onnx(pathlib.Path(sys.argv[1]), 1)\nprint(json.dumps([found.bytes, found.memory]))"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    size, grown = json.loads(ended.stdout)
    return {"bytes": size, "load_memory": grown}


def beside(one: Any, other: Any, width: int, rounds: int) -> tuple[float, float]:
    """Smallest seconds of each for one token, the two by turns."""
    x = {"x": torch.randn(1, width).numpy()}
    best = [9.0, 9.0]
    for _ in range(rounds):
        for i, session in enumerate((one, other)):
            for _ in range(4):
                started = time.perf_counter()
                session.run(None, x)
                best[i] = min(best[i], time.perf_counter() - started)
    return best[0], best[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folders = {n: write(n, args.width, args.layers, Path(temporary) / f"{i}") for i, n in enumerate(KINDS)}
        plain = open_onnx(folders["float32"], 1).runner.session
        for name, folder in folders.items():
            session = open_onnx(folder, 1).runner.session
            dense, own = beside(plain, session, args.width, args.rounds)
            rows.append({"weights": name, **memory(folder), "ms": own * 1e3, "times_float32": dense / own})
            r = rows[-1]
            print(f"{name:28} {r['bytes'] / 1e6:7.1f} MB  +{r['load_memory'] / 1e6:7.1f} MB  {r['ms']:7.3f} ms  "
                  f"x{r['times_float32']:.2f}", flush=True)  # fmt: skip
            del session
    RESULTS.write_text(json.dumps({"width": args.width, "layers": args.layers, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
