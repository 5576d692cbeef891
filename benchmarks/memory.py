"""Memory and time to quantize a random Llama checkpoint from folder to folder, this package beside llm-compressor.

    python benchmarks/memory.py FOLDER --peer-python .venv-peer/bin/python --layers 6 22

Writes the checkpoints into FOLDER where they are missing (22 blocks: 1.1 billion parameters, 2.2 GB), then runs every
method of every tool in a process of its own. Prints a table and keeps it in results/memory.json, where rows measured
earlier stay until they are measured again.

seconds  from the first read to the finished folder; "with imports" is the whole process
peak     largest resident memory; also counts pages mapped from the checkpoint, which can be dropped at any time
private  the same without mapped pages (sampled; only on Linux)
"""

import json
import math
import shutil
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import checkpoint
import numpy as np
import runner

METHODS = {"ours": ("rtn", "gptq"), "peer": ("rtn", "rtn_model_free", "gptq", "gptq_offloaded")}
TOOLS = {"ours": "compress", "peer": "llmcompressor"}
WINDOWS, LENGTH = 16, 256
FILE = "memory.json"
KEY = ("layers", "method", "tool")


def write_tokens(file: Path) -> None:
    numbers = np.random.default_rng(0).integers(0, checkpoint.VOCABULARY, (WINDOWS, LENGTH))
    np.savez(file, calib=numbers)


def folder_mb(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) // 2**20


def read_once(folder: Path) -> None:
    """Into the operating system's cache, so that no tool pays for the disk and the next one does not."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            while stream.read(2**24):
                pass


def measure(side: str, python: Path | str, method: str, model: Path, tokens: Path, out: Path) -> dict[str, Any]:
    shutil.rmtree(out, ignore_errors=True)
    read_once(model)
    result = runner.run(python, f"memory_{side}.py", method, model, tokens, out)
    result["output_mb"] = folder_mb(out)
    shutil.rmtree(out)
    return result


def earlier_rows() -> list[dict[str, Any]]:
    file = runner.RESULTS / FILE
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"] if file.exists() else []
    return rows


def show(rows: list[dict[str, Any]]) -> str:
    head = (
        "method",
        "tool",
        "blocks",
        "parameters",
        "seconds",
        "with imports",
        "peak MiB",
        "private MiB",
        "written MiB",
    )
    return runner.table(
        head,
        [
            (
                r["method"],
                r["tool"],
                r["layers"],
                f"{r['parameters'] / 1e9:.2f} B",
                f"{r['seconds']:.1f}",
                f"{r['wall']:.1f}",
                r["peak_mb"],
                r["anonymous_mb"],
                r["output_mb"],
            )
            for r in rows
        ],
        text_columns=2,
    )


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where checkpoints and results of the runs go")
    parser.add_argument("--layers", type=int, nargs="+", default=[22], metavar="N", help="numbers of blocks")
    parser.add_argument("--sides", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["rtn", "rtn_model_free", "gptq"],
        help="also gptq_offloaded, slow (default: %(default)s)",
    )
    parser.add_argument("--peer-python", type=Path, default=Path(".venv-peer/bin/python"))
    args = parser.parse_args()
    pythons = {"ours": sys.executable, "peer": args.peer_python}

    args.folder.mkdir(parents=True, exist_ok=True)
    tokens = args.folder / "tokens.npz"
    write_tokens(tokens)
    rows = {tuple(row[k] for k in KEY): row for row in earlier_rows()}
    about = {
        "machine": runner.machine(),
        "peer": runner.versions(pythons["peer"], "llmcompressor", "torch", "transformers"),
        "calibration": [WINDOWS, LENGTH],
    }
    for layers in args.layers:
        model = args.folder / f"layers-{layers}"
        checkpoint.write(model, layers)
        parameters = sum(math.prod(shape) for shape in checkpoint.shapes(layers).values())
        for side in args.sides:
            for method in (m for m in METHODS[side] if m in args.methods):
                print(f"{TOOLS[side]} {method}, {layers} blocks", file=sys.stderr, flush=True)
                result = measure(side, pythons[side], method, model, tokens, args.folder / "out")
                row = {"layers": layers, "parameters": parameters} | result
                rows[tuple(row[k] for k in KEY)] = row
                runner.write(FILE, about | {"rows": [rows[key] for key in sorted(rows)]})
    print(show([rows[key] for key in sorted(rows)]))


if __name__ == "__main__":
    main()
