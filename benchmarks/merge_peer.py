"""Merge with mergekit, from folders to a folder; prints one JSON line.

python benchmarks/merge_peer.py CONFIG MODEL OUT
"""

import sys
import time
from pathlib import Path

import common
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge


def main() -> None:
    config, _, out = map(Path, sys.argv[1:4])
    common.use_all_cores()
    options = MergeOptions(copy_tokenizer=False, lazy_unpickle=True, low_cpu_memory=True, quiet=True)
    started = time.perf_counter()
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(config.read_text())), str(out), options)
    seconds = time.perf_counter() - started
    common.report(tool="mergekit", seconds=round(seconds, 3), peak_mb=common.peak_mb())


if __name__ == "__main__":
    main()
