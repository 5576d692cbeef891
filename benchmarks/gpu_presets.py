"""Ready-made pipelines on the bundled model, on a graphics processor and on the processor of the same machine.

    python benchmarks/gpu_presets.py [--only NAME ...] [--workers 8] [--seconds 240] [--devices cuda cpu]

Several run side by side, each in a process of its own. Those that learn are run on the graphics processor alone: their
perplexities stand beside those in docs/results.json, which another machine made, and with another version of Python
from other texts: the bundled data are docstrings of the standard library. Prints a table that marks what differs by
more than 0.05 %, and keeps it in results/gpu_presets.json. Needs no network.
"""

import argparse
import json
import sys
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT.parent)]

PRESETS = ROOT.parent / "compress" / "config" / "presets"
RECORDED = ROOT.parent / "docs" / "results.json"
RESULTS = ROOT / "results" / "gpu_presets.json"
QUICK = 30  # seconds on two cores; those that take longer are not run on the processor again
ALLOWED = 0.0005


def result(name: str, device: str, threads: int) -> tuple[float | None, float]:
    """Perplexity at the end, and seconds."""
    import torch

    import compress

    torch.set_num_threads(threads)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = compress.run(name, "demo", f"{folder}/out", device=device)
    return report.rows[-1].perplexity, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--devices", nargs="+", default=["cuda", "cpu"])
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2, help="of each process")
    parser.add_argument("--seconds", type=float, default=240, help="no pipeline is waited for after that")
    given = parser.parse_args()
    recorded = json.loads(RECORDED.read_text())
    names = given.only or sorted(recorded)
    seconds = {name: sum(row["seconds"] or 0 for row in recorded.get(name, [])) for name in names}
    jobs = [(name, device) for device in given.devices for name in sorted(names, key=lambda n: -seconds[n])
            if device != "cpu" or seconds[name] < QUICK]  # fmt: skip
    found: dict[str, dict[str, float | None]] = {name: {} for name in names}
    begun = time.perf_counter()
    pool = ProcessPoolExecutor(given.workers, mp_context=get_context("spawn"))
    waiting = {pool.submit(result, *job, given.threads): job for job in jobs}
    try:
        for done in as_completed(waiting, timeout=given.seconds):
            name, device = waiting[done]
            try:
                perplexity, took = done.result()
            except Exception:  # the others are worth their time all the same
                traceback.print_exc()
                continue
            found[name][device] = perplexity
            print(
                f"{time.perf_counter() - begun:6.0f} s  {name:32} {device:5} {perplexity:10.4f} {took:7.1f} s",
                flush=True,
            )
    except TimeoutError:
        print("not finished:", *(f"{n} on {d}" for f, (n, d) in waiting.items() if not f.done()))
    for process in pool._processes.values():
        process.kill()
    for name, by_device in found.items():
        if "cuda" not in by_device:
            continue
        beside = by_device.get("cpu") or (recorded[name][-1]["perplexity"] if name in recorded else None)
        if beside:
            off = by_device["cuda"] / beside - 1
            what = "here" if "cpu" in by_device else "as recorded"
            mark = "" if abs(off) <= ALLOWED else "<--"
            print(f"{name:32} {by_device['cuda']:10.4f} {beside:10.4f} {what:12} {off:+.4%} {mark}")
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
