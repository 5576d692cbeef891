"""Merge with this package, from folders to a folder; prints one JSON line.

python benchmarks/merge_ours.py PIPELINE MODEL OUT
"""

import json
import sys
import time
from pathlib import Path

import common

import compress


def main() -> None:
    pipeline, model, out = map(Path, sys.argv[1:4])
    common.use_all_cores()
    started = time.perf_counter()
    compress.run(json.loads(pipeline.read_text()), model, out, fresh=True)
    seconds = time.perf_counter() - started
    common.report(tool="compress", seconds=round(seconds, 3), peak_mb=common.peak_mb())


if __name__ == "__main__":
    main()
