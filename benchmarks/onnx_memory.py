"""Memory and time to export a large checkpoint, packed to 4 bits, to ONNX, and of the file in onnxruntime.

    python benchmarks/onnx_memory.py FOLDER [--layers 22]

Writes a random Llama checkpoint of 1.1 billion parameters into FOLDER and packs it, where that is missing; exports it
in a process of its own, then lets a fresh one load the file and generate. Keeps it in results/onnx_memory.json.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import checkpoint
import common
import runner

import compress

RESULTS = runner.RESULTS / "onnx_memory.json"


def export(out: Path) -> dict[str, Any]:
    started = time.perf_counter()
    found = compress.export_to(out, [compress.Onnx()])["onnx"]
    seconds = time.perf_counter() - started
    return {"seconds": round(seconds, 1), "peak_mb": common.peak_mb(), **found}


def generate(out: Path) -> dict[str, Any]:
    from compress.export.onnx.measure import open_onnx

    opened = open_onnx(out / "onnx")
    rate = opened.tokens_per_second(checkpoint.VOCABULARY)
    return {"bytes": opened.bytes, "load_memory": opened.memory, "tokens_per_second": rate, "peak_mb": common.peak_mb()}


def alone(step: str, out: Path) -> dict[str, Any]:
    """One step in a process of its own."""
    command = [sys.executable, __file__, str(out), "--step", step]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--step", choices=["export", "generate"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        print(json.dumps({"export": export, "generate": generate}[args.step](args.folder)))
        return
    model, out = args.folder / f"model-{args.layers}", args.folder / f"out-{args.layers}"
    if not out.exists():
        if not model.exists():
            checkpoint.write(model, args.layers)
        compress.run({"passes": [{"rtn": {"bits": 4, "group_size": 128}}]}, model, out)
    found = {
        "layers": args.layers,
        "packed_bytes": (out / "compress.safetensors").stat().st_size,
        "export": alone("export", out),
        "generate": alone("generate", out),
    }
    print(json.dumps(found, indent=1))
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
