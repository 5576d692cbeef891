"""Quantize a checkpoint with this package, from folder to folder; prints one JSON line.

    python benchmarks/memory_ours.py METHOD MODEL TOKENS.npz OUT

METHOD is rtn or gptq, at 4 bits in groups of 128; nothing is evaluated.
"""

import sys
import time
from pathlib import Path

import common

import compress


def compress_folder(method: str, model_folder: Path, tokens: Path, out: Path) -> None:
    pipeline = {"passes": [{method: {"bits": 4, "group_size": 128}}]}
    calibration = None if method == "rtn" else common.load_tokens(tokens, "calib")
    compress.run(pipeline, model_folder, out, calibration=calibration, fresh=True)


def main() -> None:
    method, model_folder, tokens, out = sys.argv[1], *map(Path, sys.argv[2:5])
    common.use_all_cores()
    started = time.perf_counter()
    compress_folder(method, model_folder, tokens, out)
    seconds = time.perf_counter() - started
    common.report(tool="compress", method=method, seconds=round(seconds, 3), peak_mb=common.peak_mb())


if __name__ == "__main__":
    main()
