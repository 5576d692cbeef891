"""One process with two threads beside two processes with one thread each, by turns, on blocks of a 1.1 B model.

The blocks are those of `checkpoint.py`. "seconds" are those of the stage, which reads the blocks, runs the calibration
data through them, sums up and solves; starting Python and reading the texts is left out.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from argparse import ArgumentParser
from pathlib import Path

import checkpoint

METHODS = {
    "wanda": "wanda: {sparsity: 0.5}",
    "gptq": "gptq: {scheme: w4g128}",
    "flexround": "flexround: {scheme: w4g128, steps: 20}",
}
TOGETHER = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29817"]


def seconds(folder: Path, method: str, processes: int, threads: int) -> float:
    """How long the stage takes."""
    out = folder / "out"
    words = ["-m", "compress", "-q", "run", str(folder / f"{method}.yaml"), str(folder / "model"), "-o", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    start = [sys.executable, *(TOGETHER if processes == 2 else []), *words]
    subprocess.run([*start, "--fresh", "--overwrite"], env=environment, check=True, stdout=subprocess.DEVNULL)
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    shutil.rmtree(out)
    return float(report["rows"][-1]["seconds"])


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=["wanda", "gptq"], choices=list(METHODS))
    parser.add_argument("--folder", type=Path, help="keeps the checkpoint for another time")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    checkpoint.write(folder / "model", options.blocks)
    (folder / "words.txt").write_text("word " * (options.windows * options.length + 1), encoding="utf-8")
    data = f"{{source: {folder / 'words.txt'}, samples: {options.windows}, length: {options.length}}}"
    for method in options.methods:
        text = f"calibration: {data}\npasses:\n  - {METHODS[method]}\n"
        (folder / f"{method}.yaml").write_text(text, encoding="utf-8")
        ratios = []
        for _ in range(options.pairs):
            one, two = seconds(folder, method, 1, 2), seconds(folder, method, 2, 1)
            ratios.append(two / one)
            print(f"{method}: one process {one:.1f} s, two {two:.1f} s, ratio {two / one:.2f}", flush=True)
        print(f"{method}: median ratio {statistics.median(ratios):.2f}", flush=True)
    if options.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
